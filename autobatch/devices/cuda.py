"""A CUDA or ROCm GPU's memory, through PyTorch's caching allocator."""

import gc
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor

from autobatch.compat.platform import spilling_platform
from autobatch.devices.base import HOST, MemoryDevice, MemoryReading, on_host
from autobatch.devices.host_memory import host_memory
from autobatch.devices.nvml import by_uuid
from autobatch.errors import DeviceUnavailableError
from autobatch.results.remedies import EXPANDABLE_SEGMENTS
from autobatch.results.search import OtherProcess

_Copied = TypeVar("_Copied")

# By a card's index: the thread that limits its allocator. The limit is the whole process's.
_holders: Final[defaultdict[int, threading.RLock]] = defaultdict(threading.RLock)


class CudaDevice(MemoryDevice):
    """One GPU as PyTorch sees it.

    The next micro-batch is copied from pinned memory on a stream of its own, so one more than
    computes is on the GPU at any time.

    Args:
        torch_device: The GPU; without an index the current one is meant.
    """

    copies_ahead = True

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(_with_index(torch_device))
        self._stream: torch.cuda.Stream | None = None  # For copies; made with the first copy.

    @property
    def name(self) -> str:
        """The card's name."""
        return torch.cuda.get_device_name(self._device)

    def read(self) -> MemoryReading:
        """Return the driver's free and total bytes and the allocator's own."""
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        outside = max(total - free - reserved, 0)
        if getattr(torch.cuda.get_device_properties(self._device), "is_integrated", False):
            # The memory is the host's too, and a host without memory hangs (pytorch#174358).
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
        """Return what NVML says of other processes on this card.

        In a container NVML gives the host's process numbers, so this process may be listed as well:
        a process that holds more than all other processes together can hold is skipped.
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
            DeviceUnavailableError: If another thread of this process limits the card already.
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

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a copy on the GPU. CUDA has read memory that is not pinned when this returns."""
        return tensor.to(self._device, non_blocking=True, copy=True)

    def start_copy(
        self, copy: Callable[[Callable[[Tensor], Tensor]], _Copied]
    ) -> tuple[_Copied, Callable[[], None]]:
        """Begin a copy on the side stream; the function returned lets the current stream wait."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        # The copy may take the memory of the last but one, whose work is on the current stream.
        # Therefore record_stream is not needed, which would hold memory while the host runs ahead.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            made = copy(self._copied_from_pinned)
        copied = self._stream.record_event()
        return made, lambda: torch.cuda.current_stream(self._device).wait_event(copied)

    def start_reading(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Begin to copy numbers to the host: reading them then waits for no later work."""
        host = torch.empty_like(numbers, device=HOST, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.current_stream(numbers.device).record_event()

        def read() -> list[float]:
            arrived.synchronize()
            return host.tolist()

        return read

    @staticmethod
    def count(kind: str) -> int:  # noqa: ARG004  # This class serves one kind.
        """Return how many GPUs torch sees."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    @staticmethod
    def start(torch_device: torch.device) -> torch.device:
        """Return the GPU with its index, initialised: its generator exists from here on."""
        torch.cuda.init()
        return _with_index(torch_device)

    @staticmethod
    def rng_states() -> list[Tensor]:
        """Return the generators' states of all GPUs, if CUDA is in use."""
        return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    @staticmethod
    def set_rng_states(states: Sequence[Tensor]) -> None:
        """Put the generators' states back, as far as there are GPUs."""
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(list(states[: torch.cuda.device_count()]))

    @staticmethod
    def write_memory_snapshot(path: Path) -> None:
        """Write the allocator's blocks, for https://pytorch.org/memory_viz, if CUDA is in use."""
        if torch.cuda.is_initialized():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))

    @staticmethod
    def memory_notes() -> Sequence[str]:
        """Return what to know of a driver that spills to the host, and of cuDNN's choices."""
        notes: list[str] = []
        if spilling := spilling_platform():
            notes.append(
                f"on {spilling} the driver may keep in the host's memory what the GPU cannot hold, "
                "and slow down instead of running out; the limit and twice the headroom keep away "
                "from that"
            )
        if torch.backends.cudnn.benchmark:
            notes.append(
                "cudnn.benchmark is on: cuDNN chooses algorithms, and the workspaces that they "
                "need, at each shape anew, so a smaller size may need more memory; those that ran "
                "are known"
            )
        return notes

    @staticmethod
    def fragmentation_remedy() -> str:
        """Return the allocator's setting, unless it is on or the platform lacks it."""
        return "" if spilling_platform() or _expands_segments() else EXPANDABLE_SEGMENTS

    def _copied_from_pinned(self, tensor: Tensor) -> Tensor:
        if 0 in tensor.stride():  # Expanded: several elements in one place cannot be written to.
            tensor = tensor.contiguous()
        if on_host(tensor) and not tensor.is_pinned() and tensor.layout is torch.strided:
            tensor = tensor.pin_memory()
        return self.copied(tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchGpu:
    """A GPU as torch sees it.

    Attributes:
        device: Its name there, such as ``cuda:0``.
        uuid: As torch's properties give it; NVML's has a prefix.
        name: The card's name.
        total_bytes: What can be used of its memory.
    """

    device: str
    uuid: str
    name: str
    total_bytes: int


def visible_gpus() -> tuple[TorchGpu, ...]:
    """Return the GPUs that torch can use. No CUDA context is made."""
    properties = [
        torch.cuda.get_device_properties(index) for index in range(CudaDevice.count("cuda"))
    ]
    return tuple(
        TorchGpu(
            device=f"cuda:{index}",
            uuid=str(gpu.uuid),
            name=gpu.name,
            total_bytes=gpu.total_memory,
        )
        for index, gpu in enumerate(properties)
    )


def _with_index(device: torch.device) -> torch.device:
    with torch.cuda.device(device):  # A device without an index is the current one.
        return torch.device("cuda", torch.cuda.current_device())


def _expands_segments() -> bool:
    """Whether the allocator joins its pieces already; False where it does not say."""
    try:
        settings = torch.cuda.memory._snapshot()["allocator_settings"]
        return bool(settings["expandable_segments"])
    except Exception:  # noqa: BLE001  # The function is private: it may be gone or return less.
        return False
