"""How much of a device's memory a step may take: a limit of the user's, or what is free."""

from dataclasses import dataclass
from typing import Final

from autobatch.devices.base import MemoryReading
from autobatch.platforms import spilling_platform
from autobatch.units import Size, parse_bytes, parse_headroom

HEADROOM_FRACTION: Final = 0.02
HEADROOM_BYTES: Final = 300 * 2**20


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
