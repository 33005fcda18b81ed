"""GPUs of other makes: XPU through torch.accelerator, MPS through that or through torch.mps.

No such device is at hand where this is tested: stand-ins answer as the documentation says.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

from autobatch.devices.base import MemoryDevice, MemoryReading
from autobatch.devices.host_memory import host_memory
from autobatch.results import OtherProcess
from autobatch.units import format_bytes

_SetLimit = Callable[[int | None], None]  # In bytes; None is what there was before.

_MPS_RATIO: Final = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"
_MPS_STANDARD: Final = 1.7  # Its default, as documented; 0 is no limit at all.
_LEAST_SHARE: Final = 1e-9  # For MPS takes 0 for no limit.


class AcceleratorDevice:
    """A device whose allocator torch.accelerator can read.

    Where the backend can hold a process to a share of the memory (XPU, MPS) it does. Where it
    cannot, the limit is judged once the work is done: a peak above it counts as out of memory.

    Args:
        torch_device: With its index.
    """

    def __init__(self, torch_device: torch.device) -> None:
        self._device = torch_device
        self._set_limit = _limiter(torch_device)
        self._limit_bytes: int | None = None
        self._peak_bytes = 0  # Since the limit was set, as far as it was counted before a reset.

    @property
    def torch_device(self) -> torch.device:
        """The device, with its index."""
        return self._device

    @property
    def name(self) -> str:
        """The card's name, or the backend's where it tells none."""
        ask = getattr(torch.get_device_module(self._device.type), "get_device_name", None)
        return self._device.type.upper() if ask is None else str(ask(self._device))

    @property
    def counts_host(self) -> bool:
        """False: even where the memory is one, the limit is that of the device's allocator."""
        return False

    @property
    def is_exact(self) -> bool:
        """False: a caching allocator may have more room, or less, another time."""
        return False

    def read(self) -> MemoryReading:
        """Return the allocator's figures, and the driver's free and total bytes."""
        index, read = self._device.index, torch.accelerator
        reserved, allocated = read.memory_reserved(index), read.memory_allocated(index)
        free, total = self._free_and_total(reserved)
        outside = max(total - free - reserved, 0)
        if self._device.type == "mps":  # The memory is the host's too.
            free, outside = min(free, host_memory()[1]), 0
        return MemoryReading(
            total_bytes=total,
            free_bytes=free,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            peak_bytes=max(read.max_memory_allocated(index), allocated),
            peak_reserved_bytes=max(read.max_memory_reserved(index), reserved),
            outside_bytes=outside,
            retries=read.memory_stats(index).get("num_alloc_retries", 0),
        )

    def others(self) -> tuple[OtherProcess, ...]:
        """Return nothing: nobody tells."""
        return ()

    @contextmanager
    def limited_to(self, limit_bytes: int) -> Iterator[None]:
        """Hold the allocator to ``limit_bytes`` inside; a limit inside a limit is only tighter."""
        outer = self._limit_bytes
        self._limit_bytes = limit_bytes if outer is None else min(limit_bytes, outer)
        if outer is None:
            self._peak_bytes = 0
        try:
            self._apply_limit()
            yield
        finally:
            self._limit_bytes = outer
            self._apply_limit()

    def reset_peak(self) -> None:
        """Count peaks from here on."""
        self._peak_bytes = max(self._peak_bytes, self.read().peak_bytes)
        torch.accelerator.reset_peak_memory_stats(self._device.index)

    def release_cached(self) -> None:
        """Collect reference cycles, then give unused blocks back to the driver."""
        gc.collect()
        torch.accelerator.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device: its errors surface here, and so does a limit it could not hold.

        Raises:
            torch.OutOfMemoryError: If the peak is above a limit that the backend cannot enforce.
        """
        torch.accelerator.synchronize(self._device.index)
        if self._set_limit is not None or self._limit_bytes is None:
            return
        peak_bytes = max(self._peak_bytes, self.read().peak_bytes)
        if peak_bytes > self._limit_bytes:
            raise torch.OutOfMemoryError(
                f"{self.name} out of memory, as counted afterwards: the peak of "
                f"{format_bytes(peak_bytes)} passes the limit of {format_bytes(self._limit_bytes)}"
            )

    def _apply_limit(self) -> None:
        if self._set_limit is not None:
            self._set_limit(self._limit_bytes)

    def _free_and_total(self, reserved: int) -> tuple[int, int]:
        try:
            free, total = torch.accelerator.get_memory_info(self._device.index)
        except RuntimeError:  # Some drivers do not tell what is free.
            module = torch.get_device_module(self._device.type)
            total = module.get_device_properties(self._device).total_memory
            free = total - reserved
        return free, total


class MpsDevice(AcceleratorDevice):
    """Apple's GPU where torch.accelerator cannot read its allocator (pytorch#167447).

    ``torch.mps`` counts no peaks. What is read instead is what the driver holds for this process,
    which keeps all that was needed until its cache is released: so counting begins with an empty
    cache, and the peak is an upper bound, rounded up to the allocator's blocks.
    """

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self._held_bytes = 0  # The most since the peak was reset.

    def read(self) -> MemoryReading:
        """Return what Metal holds for this process, and what it recommends to hold at most."""
        total, reserved = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
        self._held_bytes = max(self._held_bytes, reserved)
        return MemoryReading(
            total_bytes=total,
            free_bytes=max(min(total - reserved, host_memory()[1]), 0),
            allocated_bytes=torch.mps.current_allocated_memory(),
            reserved_bytes=reserved,
            peak_bytes=self._held_bytes,
            peak_reserved_bytes=self._held_bytes,
            outside_bytes=0,
        )

    def reset_peak(self) -> None:
        """Empty the cache: what the driver holds afterwards is what is needed from here on."""
        torch.mps.synchronize()
        torch.mps.empty_cache()
        self._held_bytes = 0

    def release_cached(self) -> None:
        """Collect reference cycles, then give unused blocks back to the driver."""
        gc.collect()
        torch.mps.empty_cache()


def open_accelerator(device: torch.device) -> MemoryDevice:
    """Return the memory of a device that is neither a CPU nor CUDA's.

    Args:
        device: Of the accelerator that torch was built for, with its index.
    """
    if device.type == "mps" and not _is_read_by_torch():
        return MpsDevice(device)
    return AcceleratorDevice(device)


def _is_read_by_torch() -> bool:
    try:
        torch.accelerator.memory_allocated()
    except RuntimeError:  # "Allocator for mps is not a DeviceAllocator" (pytorch#186430).
        return False
    return True


def _limiter(device: torch.device) -> _SetLimit | None:
    """What holds the allocator to so many bytes; None where the backend cannot."""
    if device.type == "mps":
        return _limit_mps
    module = torch.get_device_module(device.type)
    put = getattr(module, "set_per_process_memory_fraction", None)
    get = getattr(module, "get_per_process_memory_fraction", None)
    if put is None or get is None:
        return None
    before: list[float] = []

    def limit(limit_bytes: int | None) -> None:
        if limit_bytes is None:
            while before:
                put(before.pop(), device)
            return
        if not before:
            before.append(get(device))
        total = module.get_device_properties(device).total_memory
        put(min(max(limit_bytes / total, 0.0), before[0]), device)

    return limit


def _limit_mps(limit_bytes: int | None) -> None:
    """Limit what Metal holds for this process, as a share of what it recommends.

    The share cannot be read: what is put back is the environment's, or the standard one.
    """
    before = float(os.environ.get(_MPS_RATIO, _MPS_STANDARD))
    if limit_bytes is None:
        torch.mps.set_per_process_memory_fraction(before)
        return
    share = max(limit_bytes / torch.mps.recommended_max_memory(), _LEAST_SHARE)
    torch.mps.set_per_process_memory_fraction(min(share, before or 2.0))
