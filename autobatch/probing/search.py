"""Find the largest candidate that fits. Knows integers, not tensors."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

_FIRST: Final = 4  # Large enough for a slope, small enough to fit nearly everywhere.
_STRETCH: Final = 64  # How far beyond what has run to go at once: the host holds the batch too.
_SPARE: Final = 4  # Trials that readings may cost beyond plain bisection.


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The memory of one stretch of a trial: at its start, and at most."""

    floor_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a trial showed.

    Attributes:
        fits: Whether the size ran.
        phases: Its memory; empty for a failure, or where nothing was read.
        explained: For a failure, whether the readings were near the limit when it came. If not,
            something other than the memory that is read keeps sizes out.
    """

    fits: bool
    phases: tuple[Phase, ...] = ()
    explained: bool = True

    @property
    def peak_bytes(self) -> int | None:
        """The largest peak, or None where nothing was read."""
        return max((phase.peak_bytes for phase in self.phases), default=None)


def largest_fitting(
    candidates: Sequence[int], attempt: Callable[[int], Outcome], *, limit_bytes: int
) -> int:
    """Return the largest candidate that fits, or 0 if none does.

    Bisects, with each guess taken from a line through the peaks that were read as long as that
    pays. Readings only ever choose what to try next: what is returned ran, and the next larger
    candidate, if there is one, was tried and failed. No candidate is tried twice, none is more
    than 64 times what has run (where candidates lie that close), and at most
    ``ceil(log2(len(candidates) + 1)) + 4`` are tried, with one more for each such leap that ran.

    Args:
        candidates: Ascending, without repeats.
        attempt: Must be monotone: what fits at ``n`` fits below ``n``.
        limit_bytes: Where the line is to be cut.
    """
    search = _Search(candidates, limit_bytes)
    while search.bad - search.good > 1:
        size = candidates[search.guess()]
        search.learn(size, attempt(size))
    return candidates[search.good] if search.good >= 0 else 0


class _Search:
    """The bracket, as positions in ``candidates``, and what was read so far."""

    def __init__(self, candidates: Sequence[int], limit_bytes: int) -> None:
        self.good, self.bad = -1, len(candidates)  # Seen to fit; seen to fail, or out of range.
        self._candidates = candidates
        self._limit_bytes = limit_bytes
        self._budget = math.ceil(math.log2(len(candidates) + 1)) + _SPARE
        self._passed: list[tuple[int, Outcome]] = []
        self._readings_explain = True

    def learn(self, size: int, outcome: Outcome) -> None:
        position = bisect.bisect_left(self._candidates, size)
        if not (outcome.fits and position == self._farthest()):  # A leap that ran costs nothing.
            self._budget -= 1
        if outcome.fits:
            self.good = position
            self._passed.append((size, outcome))
            return
        self.bad = position
        self._readings_explain &= outcome.explained

    def guess(self) -> int:
        """The next position to try, always inside the bracket."""
        bisects = self._budget <= math.ceil(math.log2(self.bad - self.good))
        wanted = (self.good + self.bad) // 2 if bisects else self._hint()
        position = min(max(min(wanted, self._farthest()), self.good + 1), self.bad - 1)
        # One example last: a model may refuse it for a reason of its own, as BatchNorm does.
        alone = self._candidates[position] == 1 and self.bad > 1
        return position + 1 if alone else position

    def _farthest(self) -> int:
        """The last position that what has run is a measure of."""
        size = self._passed[-1][0] if self._passed else _FIRST
        return bisect.bisect_right(self._candidates, _STRETCH * size) - 1

    def _hint(self) -> int:
        candidates, untried = self._candidates, self.bad == len(self._candidates)
        if not self._passed:
            first = bisect.bisect_right(candidates, _FIRST) - 1
            return first if untried else (self.good + self.bad) // 2
        size, outcome = self._passed[-1]
        if self._readings_explain and outcome.peak_bytes is not None:
            reach = self._reach()
            inside = bisect.bisect_right(candidates, reach) - 1
            if inside < self.bad:
                return inside
        if self._readings_explain and not untried:
            return (self.good + self.bad) // 2
        # Nothing to go by: doubling, then the geometric mean. A size far too large costs time, host
        # memory for its batch, and a failure.
        far = 2 * size if untried else math.isqrt(size * candidates[self.bad])
        return bisect.bisect_right(candidates, far) - 1

    def _reach(self) -> int:
        """The size at which the line through the last two passes meets the limit.

        With one pass the line starts at its floor, which is too steep: it stays short.
        """
        (size, last) = self._passed[-1]
        floor = min(phase.floor_bytes for phase in last.phases)
        before, low = (0, floor) if len(self._passed) == 1 else self._line_start()
        peak = last.peak_bytes or 0
        slope = max(peak - low, 1) / (size - before)
        return size + max(0, math.floor((self._limit_bytes - peak) / slope))

    def _line_start(self) -> tuple[int, int]:
        size, outcome = self._passed[-2]
        return size, outcome.peak_bytes or 0
