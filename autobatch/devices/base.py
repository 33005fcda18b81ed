"""What probing and training may ask of a device's memory."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from autobatch.results import OtherProcess

SLACK_BYTES: Final = 16 * 2**20  # Less than any process takes that begins to use a device.


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """A device's memory at one moment, in bytes.

    Attributes:
        total_bytes: What the device has.
        free_bytes: What nobody holds.
        allocated_bytes: Live tensors of this process.
        reserved_bytes: Held by this process's allocator, live or cached; at least ``allocated``.
        peak_bytes: The most ``allocated_bytes`` since the peak was reset.
        peak_reserved_bytes: The most ``reserved_bytes``; None where nothing is cached.
        outside_bytes: Held on the device but not by this process's allocator: the driver's
            context, libraries, other processes.
        retries: How often the allocator had to give its cache back before it found room.
    """

    total_bytes: int
    free_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    peak_bytes: int
    peak_reserved_bytes: int | None
    outside_bytes: int
    retries: int = 0


class MemoryDevice(Protocol):
    """All that probing and training may ask of a device."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors go."""

    @property
    def name(self) -> str:
        """The device's name, for people."""

    @property
    def counts_host(self) -> bool:
        """Whether a batch on the host lies in the memory that is limited."""

    @property
    def is_exact(self) -> bool:
        """Whether it reads to the byte, and what failed will always fail."""

    def read(self) -> MemoryReading:
        """Return the memory as it is now."""

    def others(self) -> tuple[OtherProcess, ...]:
        """Return other processes that compute here, as far as told; for people to read."""

    def limited_to(self, limit_bytes: int) -> AbstractContextManager[None]:
        """Let the allocator hold at most ``limit_bytes`` inside; the old limit is put back."""

    def reset_peak(self) -> None:
        """Count peaks from here on."""

    def release_cached(self) -> None:
        """Give back what nobody uses. Call it only once no exception is alive."""

    def synchronize(self) -> None:
        """Wait until the device has done, and failed at, all that it was asked."""


def outside_changed(
    before: MemoryReading, after: MemoryReading, *, slack_bytes: int = SLACK_BYTES
) -> bool:
    """Return whether memory outside this process's allocator came or went.

    Then a failure between the two may have another cause than its size. Take ``before`` after a
    first step: that loads libraries, which lie there as well.
    """
    return abs(after.outside_bytes - before.outside_bytes) > slack_bytes
