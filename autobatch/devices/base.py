"""What the library wants of a device: one class for each kind of device answers it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor

from autobatch.results.search import OtherProcess

HOST: Final = torch.device("cpu")
"""Where copies wait, and where data comes from."""

_Copied = TypeVar("_Copied")

SLACK_BYTES: Final = 16 * 2**20  # A process that begins to use a device takes more than this.


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """A device's memory at one moment, in bytes.

    Attributes:
        total_bytes: All memory of the device.
        free_bytes: Memory that no process holds.
        allocated_bytes: Live tensors of this process.
        reserved_bytes: Held by this process's allocator, live or cached; at least ``allocated``.
        peak_bytes: The most ``allocated_bytes`` since the peak was reset.
        peak_reserved_bytes: The most ``reserved_bytes``; None where nothing is cached.
        outside_bytes: Held on the device outside of this process's allocator: the driver's
            context, libraries, other processes.
        retries: How often the allocator had to release its cache before it found room.
    """

    total_bytes: int
    free_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    peak_bytes: int
    peak_reserved_bytes: int | None
    outside_bytes: int
    retries: int = 0


class MemoryDevice(ABC):
    """A device as the library uses it: a new kind of device is one subclass of this.

    A name and five methods about memory have to be written. Everything else has a default, which is
    that of an accelerator without streams, with float64, and without random numbers of its own.

    Args:
        torch_device: Where tensors go, with its index.

    Attributes:
        counts_host: Whether a batch on the host lies in the memory that is limited.
        is_exact: Whether memory is read to the byte, and a size that failed will always fail.
        limit_costs_time: Whether a limit slows every operation down. Then training is held to a
            limit only where the user gives one.
        copies_ahead: Whether the next micro-batch is copied while the current one computes.
        reads_at_once: Whether a number can be read from a tensor without waiting for other work.
        counts_foreach_writes: Whether a tensor's version counts what an operation on many tensors
            writes, under a dispatch mode too.
    """

    counts_host: bool = False
    is_exact: bool = False
    limit_costs_time: bool = False
    copies_ahead: bool = False
    reads_at_once: bool = False
    counts_foreach_writes: bool = True

    def __init__(self, torch_device: torch.device) -> None:
        self._device = torch_device

    @property
    def torch_device(self) -> torch.device:
        """Where tensors go, with its index."""
        return self._device

    # Memory: what every kind of device has to say.

    @property
    @abstractmethod
    def name(self) -> str:
        """The device's name, for people."""

    @abstractmethod
    def read(self) -> MemoryReading:
        """Return the memory as it is now."""

    @abstractmethod
    def limited_to(self, limit_bytes: int) -> AbstractContextManager[None]:
        """Let the allocator hold at most ``limit_bytes`` inside; the old limit is put back."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Count peaks from here on."""

    @abstractmethod
    def release_cached(self) -> None:
        """Release unused memory. Call it when no exception is alive: an exception holds tensors."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done all work that was given to it; errors surface here."""

    def others(self) -> tuple[OtherProcess, ...]:
        """Return other processes that compute here, as far as known; for people to read."""
        return ()

    # Copies to the device, and numbers from it.

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a copy, on the device, of a tensor that lies elsewhere."""
        return tensor.to(self._device, copy=True)

    def start_copy(
        self, copy: Callable[[Callable[[Tensor], Tensor]], _Copied]
    ) -> tuple[_Copied, Callable[[], None]]:
        """Begin a copy to the device.

        Args:
            copy: Copies its tensors, each by the function that it is given.

        Returns:
            The copy, and a function that must be called before the copy is used.
        """
        return copy(self.copied), _nothing

    def start_reading(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Begin to bring numbers to the host.

        Args:
            numbers: On the device, of shape ``(count,)``.

        Returns:
            A function that waits for the numbers and returns them.
        """
        return numbers.tolist

    # The kind of device: these are called on the class.

    @classmethod
    def open(
        cls,
        torch_device: torch.device,
        residents: Callable[[], Iterable[Tensor]],  # noqa: ARG003  # Subclasses may read it,
        *,
        counts_host: bool,  # noqa: ARG003  # and this too.
    ) -> "MemoryDevice":
        """Return the device.

        Args:
            torch_device: As ``start`` returned it.
            residents: Lists the tensors that live on the device between steps.
            counts_host: For the CPU, whether the limit is the host's own memory.
        """
        return cls(torch_device)

    @staticmethod
    def count(kind: str) -> int | None:  # noqa: ARG004  # A subclass may serve several kinds.
        """Return how many devices of this kind are here; None where all indices mean one device.

        Args:
            kind: As in ``torch.device.type``.
        """
        return None

    @staticmethod
    def start(torch_device: torch.device) -> torch.device:
        """Return the device with its index, ready for use: its random numbers can be taken.

        Args:
            torch_device: One that is here; without an index the current one is meant.
        """
        return torch_device

    @staticmethod
    def widest_dtype(torch_device: torch.device) -> torch.dtype:  # noqa: ARG004
        """Return the widest floating type that the device computes in."""
        return torch.float64

    @staticmethod
    def rng_states() -> list[Tensor]:
        """Return the generators' states of all devices of this kind that are in use.

        A device that is idle is not started. The CPU's own generator is not among them.
        """
        return []

    @staticmethod  # noqa: B027  # It need not be written.
    def set_rng_states(states: Sequence[Tensor]) -> None:
        """Put back what ``rng_states`` returned, except for devices that are not here."""

    @staticmethod  # noqa: B027  # It need not be written.
    def write_memory_snapshot(path: Path) -> None:
        """Write what the allocator holds, if it can say so and is in use."""

    @staticmethod
    def memory_notes() -> Sequence[str]:
        """Return sentences on how this kind of device takes memory, for the user to read."""
        return ()

    @staticmethod
    def fragmentation_remedy() -> str:
        """Return the setting that joins fragmented memory; empty if there is none, or it is on."""
        return ""


def on_host(tensor: Tensor) -> bool:
    """Whether a tensor's values lie in the host's memory, where NumPy can share them."""
    return tensor.is_cpu


def _nothing() -> None:
    """Wait for nothing: the copy is there."""


def outside_changed(
    before: MemoryReading, after: MemoryReading, *, slack_bytes: int = SLACK_BYTES
) -> bool:
    """Return whether memory outside this process's allocator came or went between two readings.

    If it did, a failure between the two may have another cause than its size. Take ``before`` after
    a first step, because the first step loads libraries, which lie outside the allocator as well.
    """
    return abs(after.outside_bytes - before.outside_bytes) > slack_bytes
