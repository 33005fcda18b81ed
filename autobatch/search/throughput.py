"""Measure the training throughput of several sizes, on whole logical batches in turns."""

import bisect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final

from autobatch.devices.base import MemoryDevice
from autobatch.devices.oom import MEMORY_VERDICTS, verdict_of
from autobatch.results.search import Speed
from autobatch.search.trial import TrialProgram

_SHARES: Final = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)  # Timed sizes / tolerable batch.
_ROUNDS: Final = range(3, 8)  # The fewest and the most windows that are timed at each size.
FEWEST_WINDOWS: Final = 1 + _ROUNDS.start  # Windows of each size, with the warm-up.
_SECONDS: Final = 5.0  # No round begins later.


def sizes_to_time(candidates: Sequence[int], largest: int) -> tuple[int, ...]:
    """Return the largest size and a few smaller sizes, near fixed shares of it, ascending.

    Args:
        candidates: Sizes, ascending.
        largest: One of the candidates.
    """
    below = [bisect.bisect_right(candidates, largest * share) for share in _SHARES]
    return tuple(sorted({candidates[place - 1] for place in below if place}))


def speeds(
    program: TrialProgram,
    device: MemoryDevice,
    windows: Mapping[int, Sequence[int]],
    limited: Callable[[], AbstractContextManager[None]],
) -> tuple[Speed, ...]:
    """Return the throughput of each size, without the sizes that run out of memory.

    Each size runs once as a warm-up. Then the sizes run in turns, so that a change of the device's
    clock rate, such as that of a GPU that gets warm, affects all sizes alike. The throughput of a
    size is the median over its windows.

    Args:
        program: The training step.
        device: The device that it runs on.
        windows: For each size, the sizes of the micro-batches of a whole logical batch.
        limited: Returns the context that limits memory as training does.
    """
    ready: dict[int, Callable[[], float]] = {}
    for size, sizes in windows.items():
        ready[size] = _timed_run(program, device, sizes, limited)
    seconds: dict[int, list[float]] = {size: [] for size in ready}
    began = time.perf_counter()
    for round_number in range(_ROUNDS.stop):
        if round_number > _ROUNDS.start and time.perf_counter() - began > _SECONDS:
            break
        for size in list(seconds):
            took = _seconds_or_none(ready[size])
            if took is None:
                del seconds[size]
                program.clear()
                device.release_cached()
            elif round_number:
                seconds[size].append(took)
        if not round_number:
            began = time.perf_counter()
    program.clear()
    return tuple(
        Speed(
            size=size,
            examples_per_second=sum(windows[size]) / statistics.median(took),
            windows=len(took),
        )
        for size, took in seconds.items()
    )


def _timed_run(
    program: TrialProgram,
    device: MemoryDevice,
    sizes: Sequence[int],
    limited: Callable[[], AbstractContextManager[None]],
) -> Callable[[], float]:
    window = program.prepare(sizes, lambda: None)

    def run() -> float:
        device.synchronize()
        began = time.perf_counter()
        with limited():
            window()
            device.synchronize()
        return time.perf_counter() - began

    return run


def _seconds_or_none(run: Callable[[], float]) -> float | None:
    """The seconds of a run; None if it ran out of memory. The error is deleted on return."""
    try:
        return run()
    except Exception as error:
        if verdict_of(error) not in MEMORY_VERDICTS:
            raise
    return None
