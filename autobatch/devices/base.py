"""What probing and training may ask of a device's memory."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from autobatch.compat.platform import spilling_platform
from autobatch.results import OtherProcess
from autobatch.units import Size, parse_bytes, parse_headroom

HEADROOM_FRACTION: Final = 0.02
HEADROOM_BYTES: Final = 300 * 2**20
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


def standard_headroom(total_bytes: int) -> int:
    """Return what is kept free of a device where nobody says: 2 %, and at least 300 MiB."""
    return max(int(total_bytes * HEADROOM_FRACTION), HEADROOM_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the user allows, in bytes.

    Attributes:
        memory_limit_bytes: The whole process's, or None for what is free.
        headroom_bytes: Kept free, or None for the standard.
    """

    memory_limit_bytes: int | None
    headroom_bytes: int | None

    @classmethod
    def parse(cls, memory_limit: Size | None, headroom: Size | None) -> "Budget":
        """Read ``memory_limit`` and ``headroom`` as the public functions take them.

        Raises:
            TypeError, ValueError: With the value that came.
        """
        return cls(
            memory_limit_bytes=(
                None if memory_limit is None else parse_bytes(memory_limit, name="memory_limit")
            ),
            headroom_bytes=None if headroom is None else parse_headroom(headroom),
        )

    def limit_bytes(self, reading: MemoryReading) -> int:
        """Return the bytes that the allocator may hold; zero or less where nothing is left.

        Without a ``memory_limit`` that is what is free or held already, less the headroom (2 % of
        the device, at least 300 MiB; twice that of a GPU on Windows and WSL). A ``memory_limit``
        is the whole process's, so what the driver's context and other processes hold comes off it,
        and it needs no headroom: 24 GiB on a larger card plans for a card of 24 GiB.
        """
        reachable = reading.free_bytes + reading.reserved_bytes
        if self.memory_limit_bytes is None:
            headroom_bytes = self.headroom_bytes
            if headroom_bytes is None:
                headroom_bytes = standard_headroom(reading.total_bytes)
                # A GPU's; its ceiling lies below what is said to be free (WSL#41176).
                if reading.peak_reserved_bytes is not None and spilling_platform():
                    headroom_bytes *= 2
            return reachable - headroom_bytes
        allowed = self.memory_limit_bytes - reading.outside_bytes
        return min(allowed, reachable) - (self.headroom_bytes or 0)


def moved(before: MemoryReading, after: MemoryReading, *, slack_bytes: int = SLACK_BYTES) -> bool:
    """Return whether memory outside this process's allocator came or went.

    Then a failure between the two may have another cause than its size. Take ``before`` after a
    first step: that loads libraries, which lie there as well.
    """
    return abs(after.outside_bytes - before.outside_bytes) > slack_bytes
