"""A CUDA or ROCm GPU's memory, through PyTorch's caching allocator."""

import gc
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from autobatch.devices.base import MemoryReading
from autobatch.devices.host_memory import host_memory
from autobatch.devices.nvml import by_uuid
from autobatch.errors import DeviceUnavailableError
from autobatch.results import OtherProcess

# By a card's number: whose thread holds its allocator to a limit, which is all the process's.
_holders: Final[defaultdict[int, threading.RLock]] = defaultdict(threading.RLock)


class CudaDevice:
    """One GPU as PyTorch sees it."""

    def __init__(self, torch_device: torch.device) -> None:
        with torch.cuda.device(torch_device):
            self._device = torch.device("cuda", torch.cuda.current_device())

    @property
    def torch_device(self) -> torch.device:
        """The GPU, with its index."""
        return self._device

    @property
    def name(self) -> str:
        """The card's name."""
        return torch.cuda.get_device_name(self._device)

    @property
    def counts_host(self) -> bool:
        """False: the host's memory is another."""
        return False

    @property
    def is_exact(self) -> bool:
        """False: the allocator rounds, and memory is torn into pieces of many sizes."""
        return False

    def read(self) -> MemoryReading:
        """Return the driver's free and total bytes and the allocator's own."""
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        outside = max(total - free - reserved, 0)
        if getattr(torch.cuda.get_device_properties(self._device), "is_integrated", False):
            # The memory is the host's too, and a host without any hangs (pytorch#174358).
            free, outside = min(free, host_memory()[1]), 0
        return MemoryReading(
            total_bytes=total,
            free_bytes=free,
            allocated_bytes=torch.cuda.memory_allocated(self._device),
            reserved_bytes=reserved,
            peak_bytes=torch.cuda.max_memory_allocated(self._device),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(self._device),
            outside_bytes=outside,
            retries=torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0),
        )

    def others(self) -> tuple[OtherProcess, ...]:
        """Return what NVML tells of other processes on this card.

        In a container they have the host's numbers, and we may be among them: whoever is said to
        hold more than all others together do is left out.
        """
        gpu = by_uuid(getattr(torch.cuda.get_device_properties(self._device), "uuid", ""))
        if gpu is None:
            return ()
        outside = self.read().outside_bytes
        return tuple(
            OtherProcess(pid=process.pid, used_bytes=process.used_bytes)
            for process in gpu.processes
            if (process.used_bytes or 0) <= outside
        )

    @contextmanager
    def limited_to(self, limit_bytes: int) -> Iterator[None]:
        """Hold the allocator's share of the card at ``limit_bytes`` inside.

        The share bounds reserved bytes: context and libraries come on top (pytorch#58466).

        Raises:
            DeviceUnavailableError: If another thread of this process does so already.
        """
        holder = _holders[self._device.index]
        if not holder.acquire(blocking=False):
            raise DeviceUnavailableError(
                f"{self._device} is under the limit of another thread's search or training, and a "
                "limit is the whole process's; run them in turns, or in processes of their own"
            )
        try:
            with self._share_of(limit_bytes):
                yield
        finally:
            holder.release()

    @contextmanager
    def _share_of(self, limit_bytes: int) -> Iterator[None]:
        total = torch.cuda.get_device_properties(self._device).total_memory
        before = torch.cuda.get_per_process_memory_fraction(self._device)
        share = min(max(limit_bytes / total, 0.0), before)
        torch.cuda.set_per_process_memory_fraction(share, self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self._device)

    def reset_peak(self) -> None:
        """Count peaks from here on."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def release_cached(self) -> None:
        """Collect reference cycles, then give unused blocks back to the driver."""
        gc.collect()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the GPU: its errors surface here."""
        torch.cuda.synchronize(self._device)
