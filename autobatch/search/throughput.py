"""How fast sizes train: whole logical batches, by the clock, in turns."""

import bisect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final

from autobatch.devices.base import MemoryDevice
from autobatch.devices.oom import MEMORY_VERDICTS, verdict_of
from autobatch.results.search import Speed
from autobatch.search.trial import SizedRun

_SHARES: Final = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)  # Of the tolerable batch: what is timed.
_ROUNDS: Final = range(3, 8)  # At least and at most so many windows of each size.
FEWEST_WINDOWS: Final = 1 + _ROUNDS.start  # Of each size: one is not measured.
_SECONDS: Final = 5.0  # After which no further round begins.


def sizes_to_time(candidates: Sequence[int], largest: int) -> tuple[int, ...]:
    """Return the largest size and a few below it, ascending: next to fixed shares of it.

    Args:
        candidates: Ascending.
        largest: One of them.
    """
    below = [bisect.bisect_right(candidates, largest * share) for share in _SHARES]
    return tuple(sorted({candidates[place - 1] for place in below if place}))


def speeds(
    rehearsal: SizedRun,
    device: MemoryDevice,
    windows: Mapping[int, Sequence[int]],
    limited: Callable[[], AbstractContextManager[None]],
) -> tuple[Speed, ...]:
    """Return how fast each size trains; one that runs out of memory is left out.

    Each runs once unmeasured. Then all of them run in turns, so that a clock that wanders, as a
    GPU's does when it gets warm, wanders for all. The median of a size's windows counts.

    Args:
        rehearsal: Training's own step.
        device: Where it runs.
        windows: For each size, the micro-batches of a whole logical batch.
        limited: The context in which training runs.
    """
    ready: dict[int, Callable[[], float]] = {}
    for size, sizes in windows.items():
        ready[size] = _timed(rehearsal, device, sizes, limited)
    seconds: dict[int, list[float]] = {size: [] for size in ready}
    began = time.perf_counter()
    for place in range(_ROUNDS.stop):
        if place > _ROUNDS.start and time.perf_counter() - began > _SECONDS:
            break
        for size in list(seconds):
            took = _seconds(ready[size])
            if took is None:
                del seconds[size]
                rehearsal.clear()
                device.release_cached()
            elif place:
                seconds[size].append(took)
        if not place:
            began = time.perf_counter()
    rehearsal.clear()
    return tuple(
        Speed(
            size=size,
            examples_per_second=sum(windows[size]) / statistics.median(took),
            windows=len(took),
        )
        for size, took in seconds.items()
    )


def _timed(
    rehearsal: SizedRun,
    device: MemoryDevice,
    sizes: Sequence[int],
    limited: Callable[[], AbstractContextManager[None]],
) -> Callable[[], float]:
    window = rehearsal.prepare(sizes, lambda: None)

    def run() -> float:
        device.synchronize()
        began = time.perf_counter()
        with limited():
            window()
            device.synchronize()
        return time.perf_counter() - began

    return run


def _seconds(run: Callable[[], float]) -> float | None:
    """How long it took; None, and the error has let go of the window, if memory ran out."""
    try:
        return run()
    except Exception as error:
        if verdict_of(error) not in MEMORY_VERDICTS:
            raise
    return None
