"""Samples of a noisy clock, and what is said of them."""

import statistics
import time
from collections.abc import Callable, Iterator


class Samples(list[float]):
    """One number, measured at least once."""

    @property
    def median(self) -> float:
        """The middle."""
        return statistics.median(self)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{min(self):.3g}, {max(self):.3g}]"


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes; it waits for its device itself."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternated(
    one: Callable[[], object],
    other: Callable[[], object],
    pairs: int,
    *,
    deadline: float = float("inf"),
) -> Iterator[tuple[float, float]]:
    """Yield the seconds of both, ``pairs`` times; they take turns at being the first.

    A machine that slows down for a while slows both of a pair, so their ratio stays. After the
    deadline, by ``time.monotonic``, no pair begins but the first.
    """
    for place in range(pairs):
        if place and time.monotonic() > deadline:
            return
        if place % 2:
            second = seconds_of(other)
            yield seconds_of(one), second
        else:
            first = seconds_of(one)
            yield first, seconds_of(other)
