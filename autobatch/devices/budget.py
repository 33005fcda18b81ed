"""How much of a device's memory a step may take: the user's limit, or what is free."""

from dataclasses import dataclass
from typing import Final

from autobatch.compat.platform import spilling_platform
from autobatch.devices.base import MemoryReading
from autobatch.units import Size, parse_bytes, parse_headroom

HEADROOM_FRACTION: Final = 0.02
HEADROOM_BYTES: Final = 300 * 2**20


def standard_headroom(total_bytes: int) -> int:
    """Return the bytes kept free where the user gives no headroom: 2 %, and at least 300 MiB."""
    return max(int(total_bytes * HEADROOM_FRACTION), HEADROOM_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the user allows, in bytes.

    Attributes:
        memory_limit_bytes: The limit of the whole process; None stands for what is free.
        headroom_bytes: Bytes to keep free; None stands for ``standard_headroom``.
    """

    memory_limit_bytes: int | None
    headroom_bytes: int | None

    @classmethod
    def parse(cls, memory_limit: Size | None, headroom: Size | None) -> "Budget":
        """Return the budget for ``memory_limit`` and ``headroom`` of the public functions.

        Raises:
            TypeError, ValueError: With the value that was passed.
        """
        return cls(
            memory_limit_bytes=(
                None if memory_limit is None else parse_bytes(memory_limit, name="memory_limit")
            ),
            headroom_bytes=None if headroom is None else parse_headroom(headroom),
        )

    def limit_bytes(self, reading: MemoryReading) -> int:
        """Return the bytes that the allocator may hold; zero or less where nothing is left.

        Without a ``memory_limit`` the allocator may hold what is free or held already, less the
        headroom (2 % of the device, at least 300 MiB; for a GPU on Windows and WSL twice as much).
        A ``memory_limit`` is the limit of the whole process: the bytes of the driver's context and
        of other processes are subtracted, and no headroom is needed. 24 GiB on a larger card plans
        for a card of 24 GiB.

        Args:
            reading: The device's memory now.
        """
        reachable = reading.free_bytes + reading.reserved_bytes
        if self.memory_limit_bytes is None:
            headroom_bytes = self.headroom_bytes
            if headroom_bytes is None:
                headroom_bytes = standard_headroom(reading.total_bytes)
                # A GPU's ceiling lies below the free bytes that are reported (WSL#41176).
                if reading.peak_reserved_bytes is not None and spilling_platform():
                    headroom_bytes *= 2
            return reachable - headroom_bytes
        allowed = self.memory_limit_bytes - reading.outside_bytes
        return min(allowed, reachable) - (self.headroom_bytes or 0)
