"""GPUs of other makes: XPU through torch.accelerator, MPS through the same or torch.mps.

No such device is at hand where this is tested: stand-ins answer as the documentation says.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from autobatch.devices.base import MemoryDevice, MemoryReading
from autobatch.devices.host_memory import host_memory
from autobatch.units import format_bytes

_SetLimit = Callable[[int | None], None]  # In bytes; None is the limit of before.

_MPS_RATIO: Final = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"
_MPS_STANDARD: Final = 1.7  # Its default, as documented; 0 is no limit at all.
_LEAST_SHARE: Final = 1e-9  # MPS takes 0 for no limit.


class AcceleratorDevice(MemoryDevice):
    """A device whose allocator torch.accelerator can read.

    Some backends (XPU, MPS) can hold a process to a share of the memory, which sets the limit. For
    the others the limit is checked after the work: a peak above it counts as out of memory.

    Args:
        torch_device: With its index.
    """

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self._set_limit = self._limiter()
        self._limit_bytes: int | None = None
        self._peak_bytes = 0  # Since the limit was set, as far as it was counted before a reset.

    @staticmethod
    def count(kind: str) -> int:
        """Return how many devices of this kind are here."""
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.accelerator.device_count() if found is not None and found.type == kind else 0

    @staticmethod
    def start(torch_device: torch.device) -> torch.device:
        """Return the device with its index, initialised: its generator exists from here on."""
        kind = torch_device.type
        initialise = getattr(torch.get_device_module(kind), "init", None)
        if initialise is not None:
            initialise()
        current = torch.accelerator.current_device_index()
        return torch.device(kind, current) if torch_device == torch.device(kind) else torch_device

    @property
    def name(self) -> str:
        """The card's name, or the backend's where the backend does not name the card."""
        name_of = getattr(torch.get_device_module(self._device.type), "get_device_name", None)
        return self._device.type.upper() if name_of is None else str(name_of(self._device))

    def read(self) -> MemoryReading:
        """Return the allocator's figures, and the driver's free and total bytes."""
        index, read = self._device.index, torch.accelerator
        reserved, allocated = read.memory_reserved(index), read.memory_allocated(index)
        free, total = self._free_and_total(reserved)
        return MemoryReading(
            total_bytes=total,
            free_bytes=free,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            peak_bytes=max(read.max_memory_allocated(index), allocated),
            peak_reserved_bytes=max(read.max_memory_reserved(index), reserved),
            outside_bytes=max(total - free - reserved, 0),
            retries=read.memory_stats(index).get("num_alloc_retries", 0),
        )

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
        """Wait for the device: errors surface here, and so does a limit that was not enforced.

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
        except RuntimeError:  # Some drivers do not say what is free.
            module = torch.get_device_module(self._device.type)
            total = module.get_device_properties(self._device).total_memory
            free = total - reserved
        return free, total

    def _limiter(self) -> _SetLimit | None:
        """A function that holds the allocator to so many bytes; None where the backend has none."""
        device, module = self._device, torch.get_device_module(self._device.type)
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


class XpuDevice(AcceleratorDevice):
    """A GPU of Intel's."""

    @staticmethod
    def widest_dtype(torch_device: torch.device) -> torch.dtype:
        """Return float64 if the card has it, else float32."""
        has_float64 = torch.xpu.get_device_properties(torch_device).has_fp64
        return torch.float64 if has_float64 else torch.float32

    @staticmethod
    def rng_states() -> list[Tensor]:
        """Return the generators' states of all cards, if XPU is in use."""
        return torch.xpu.get_rng_state_all() if torch.xpu.is_initialized() else []

    @staticmethod
    def set_rng_states(states: Sequence[Tensor]) -> None:
        """Put the generators' states back, as far as there are cards."""
        if torch.xpu.is_available():
            torch.xpu.set_rng_state_all(list(states[: torch.xpu.device_count()]))


class MpsDevice(AcceleratorDevice):
    """Apple's GPU, whose memory is the host's too."""

    @classmethod
    def open(
        cls,
        torch_device: torch.device,
        residents: Callable[[], Iterable[Tensor]],  # noqa: ARG003  # The base's.
        *,
        counts_host: bool,  # noqa: ARG003  # The base's.
    ) -> MemoryDevice:
        """Return the device, read through torch.accelerator if possible, else torch.mps."""
        try:
            torch.accelerator.memory_allocated()
        except RuntimeError:  # "Allocator for mps is not a DeviceAllocator" (pytorch#186430).
            return UncountedMpsDevice(torch_device)
        return cls(torch_device)

    def read(self) -> MemoryReading:
        """Return the allocator's figures; what is free is no more than what the host has left."""
        reading = super().read()
        return replace(
            reading, free_bytes=min(reading.free_bytes, host_memory()[1]), outside_bytes=0
        )

    @staticmethod
    def widest_dtype(torch_device: torch.device) -> torch.dtype:  # noqa: ARG004  # The base's.
        """Return float32: Metal has no float64."""
        return torch.float32

    @staticmethod
    def rng_states() -> list[Tensor]:
        """Return the state of the GPU's generator."""
        return [torch.mps.get_rng_state()] if torch.mps.is_available() else []

    @staticmethod
    def set_rng_states(states: Sequence[Tensor]) -> None:
        """Put the generator's state back, if the GPU is here."""
        if torch.mps.is_available():
            for state in states:
                torch.mps.set_rng_state(state)

    def _limiter(self) -> _SetLimit:
        return _limit_mps


class UncountedMpsDevice(MpsDevice):
    """Apple's GPU where torch.accelerator cannot read its allocator (pytorch#167447).

    ``torch.mps`` counts no peaks. This class reads what the driver holds instead.
    The driver keeps all memory that was needed until its cache is released: counting therefore
    begins with an empty cache, and the peak is an upper bound, rounded up to whole blocks.
    """

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self._held_bytes = 0  # The most since the peak was reset.

    def read(self) -> MemoryReading:
        """Return the bytes that Metal holds for this process, and the most that it recommends."""
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
        """Empty the cache: the driver then holds only memory that is needed from here on."""
        torch.mps.synchronize()
        torch.mps.empty_cache()
        self._held_bytes = 0

    def release_cached(self) -> None:
        """Collect reference cycles, then give unused blocks back to the driver."""
        gc.collect()
        torch.mps.empty_cache()


def _limit_mps(limit_bytes: int | None) -> None:
    """Limit what Metal holds for this process, as a share of the size that Metal recommends.

    The share cannot be read, so None restores the environment's share, or the standard one.
    """
    before = float(os.environ.get(_MPS_RATIO, _MPS_STANDARD))
    if limit_bytes is None:
        torch.mps.set_per_process_memory_fraction(before)
        return
    share = max(limit_bytes / torch.mps.recommended_max_memory(), _LEAST_SHARE)
    torch.mps.set_per_process_memory_fraction(min(share, before or 2.0))
