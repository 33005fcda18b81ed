"""Where a device's memory goes at a trial."""

from collections.abc import Mapping, Sequence

from autobatch.devices.base import MemoryDevice
from autobatch.devices.budget import Budget
from autobatch.results.memory import Breakdown, break_down
from autobatch.results.remedies import needed_bytes
from autobatch.results.search import OtherProcess, Trial


def account_for(
    needs: Mapping[str, int],
    *,
    device: MemoryDevice,
    budget: Budget,
    limit_bytes: int,
    trial: Trial | None,
) -> Breakdown:
    """Return where the memory goes at a trial; if the trial failed, the least that it needs.

    Args:
        needs: Bytes that live on the device whatever the size, by the names of
            ``Breakdown.parts``.
        device: Whose memory it is.
        budget: What the user allows.
        limit_bytes: The most that a step may allocate.
        trial: None before the first one.
    """
    reading = device.read()
    outside = max(reading.total_bytes - reading.free_bytes - reading.reserved_bytes, 0)
    total = reading.total_bytes
    if budget.memory_limit_bytes is not None:  # The limit plans for a smaller device.
        outside = reading.outside_bytes
        total = limit_bytes + outside + (budget.headroom_bytes or 0)
    return break_down(
        needs,
        peak_bytes=0 if trial is None else _peak_bytes(trial),
        reserved_bytes=None if trial is None else trial.reserved_bytes,
        limit_bytes=limit_bytes,
        total_bytes=total,
        outside_bytes=outside,
        others_bytes=_held_by(device.others()),
    )


def _peak_bytes(trial: Trial) -> int:
    if trial.peak_bytes is not None:
        return trial.peak_bytes
    return max(trial.needed_bytes, needed_bytes(trial.message))


def _held_by(others: Sequence[OtherProcess]) -> int | None:
    """The bytes that other processes hold; None where those of one process are unknown."""
    held = [other.used_bytes for other in others]
    return None if None in held else sum(count or 0 for count in held)
