"""Find the largest candidate that fits. Knows integers, not tensors."""

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from autobatch.results import Phase, Upper

Confirm = Literal["extrapolated", "failed"]

_FIRST: Final = 4  # Large enough for a slope, small enough to fit nearly everywhere.
_STRETCH: Final = 64  # How far beyond what has run to go at once: the host holds the batch too.
_SPARE: Final = 4  # Trials that readings may cost beyond plain bisection.


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a trial showed.

    Attributes:
        fits: Whether the size ran.
        phases: Its memory, in the same stretches at every size: the first micro-batch, those after
            it, the optimizer's step. Empty for a failure, or where nothing was read.
        explained: For a failure, whether the readings were near the limit when it came. If not,
            something other than the memory that is read keeps sizes out.
    """

    fits: bool
    phases: tuple[Phase, ...] = ()
    explained: bool = True

    @property
    def peak_bytes(self) -> int:
        """The most that was read, or 0."""
        return max((phase.peak_bytes for phase in self.phases), default=0)


class Search:
    """Chooses what to try next, and knows when nothing is left to try.

    Memory is read phase by phase: the peak of all of them bends where another phase takes over,
    but within one it is convex in the size, as each allocation is constant, or grows with the
    examples. So the line through the two largest sizes that ran is a lower bound on what any
    larger one needs. It says what to try next, and what need not be tried. A reading below the
    line shows that memory is not convex here, and ends its use as a proof; a failure that the
    readings do not explain ends their use altogether.

    What is returned ran. Under one limit no candidate is asked for twice by ``next``, none is more
    than 64 times what has run (where candidates lie that close), and at most
    ``ceil(log2(len(candidates) + 1)) + 4`` are asked for, with one more for a prior that failed,
    and for each such leap that ran.

    Args:
        candidates: Ascending, without repeats.
        limit_bytes: What a step may allocate.
        slack_bytes: How far readings may be rounded.
        confirm: ``"extrapolated"``: what the bound excludes is not tried. ``"failed"``: the next
            larger candidate is always tried.
        undivided: The candidate that is the whole logical batch: it has no later micro-batches.
        spared_bytes: What the window of a candidate may do without, though smaller ones hold it.
        prior: A first guess of the answer. The first size is tried before it; where what that one
            read leaves room for more, the guess is too small, and is not tried. A wrong one costs a
            trial at most where phases are straight lines; where they bend, seldom two or three.
    """

    def __init__(
        self,
        candidates: Sequence[int],
        *,
        limit_bytes: int,
        slack_bytes: int = 0,
        confirm: Confirm = "extrapolated",
        undivided: int | None = None,
        spared_bytes: Callable[[int], int] = lambda _: 0,
        prior: int | None = None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self._candidates = candidates
        self._slack_bytes = slack_bytes
        self._confirm = confirm
        self._undivided = undivided
        self._spared_bytes = spared_bytes
        self._prior = prior
        self._budget = self._most_trials()
        self._outcomes: dict[int, Outcome] = {}  # By size; of one that was repeated, the last.
        self._good, self._bad = -1, len(candidates)  # Positions: seen to fit; to fail, or the end.

    @property
    def size(self) -> int:
        """The largest size that ran, or 0."""
        return self._candidates[self._good] if self._good >= 0 else 0

    @property
    def upper(self) -> Upper:
        """Why nothing larger is to be tried; for a search that has ended."""
        if self._good + 1 == len(self._candidates):
            return Upper(reason="ceiling")
        following = self._candidates[self._good + 1]
        if self._good + 1 == self._bad:
            return Upper(reason="ran out", size=following)
        return Upper(reason="extrapolated", size=following, bytes=self._least(following))

    def next(self) -> int | None:
        """Return the size to try now, or None if the answer is known."""
        if self._bad - self._good <= 1 or self._is_excluded():
            return None
        return self._candidates[self._guess()]

    def relimit(self, limit_bytes: int) -> None:
        """Go on under another limit: what it puts in doubt is forgotten, and may be tried again.

        A larger one puts failures in doubt, a smaller one what has used more.
        """
        rises, self.limit_bytes = limit_bytes > self.limit_bytes, limit_bytes
        self._budget = self._most_trials()
        self._outcomes = {
            size: outcome
            for size, outcome in self._outcomes.items()
            if (outcome.peak_bytes <= limit_bytes if outcome.fits else not rises)
        }
        self._find_bracket()

    def learn(self, size: int, outcome: Outcome) -> None:
        """Take note of a trial; of a candidate that was tried before, it is the last word."""
        position = bisect.bisect_left(self._candidates, size)
        # A leap that ran costs nothing, nor does a prior that failed: it came beside all others.
        if position != (self._farthest() if outcome.fits else self._presumed()):
            self._budget -= 1
        self._outcomes[size] = outcome
        self._find_bracket()

    def _most_trials(self) -> int:
        return math.ceil(math.log2(len(self._candidates) + 1)) + _SPARE

    def _find_bracket(self) -> None:
        candidates = self._candidates
        ran = [bisect.bisect_left(candidates, n) for n, o in self._outcomes.items() if o.fits]
        failed = [
            bisect.bisect_left(candidates, n) for n, o in self._outcomes.items() if not o.fits
        ]
        self._good = max(ran, default=-1)
        self._bad = min((n for n in failed if n > self._good), default=len(candidates))

    def _passed(self) -> list[tuple[int, tuple[Phase, ...]]]:
        """The sizes that ran and were read, ascending, with their phases."""
        return sorted((n, o.phases) for n, o in self._outcomes.items() if o.fits and o.phases)

    def _is_read(self) -> bool:
        """Whether readings are there, and explain all that has happened."""
        return bool(self._passed()) and all(
            outcome.fits or outcome.explained or self._is_foreseen(size)
            for size, outcome in self._outcomes.items()
        )

    def _is_foreseen(self, size: int) -> bool:
        """Whether the lines as read leave no room for ``size``."""
        return self._read_at(size) > self.limit_bytes

    def _is_excluded(self) -> bool:
        """Whether the next larger candidate cannot fit."""
        if self._confirm == "failed" or not self._is_read() or len(self._passed()) < 2:
            return False
        following = self._candidates[self._good + 1]
        return self._least(following) > self.limit_bytes and self._is_convex()

    def _is_convex(self) -> bool:
        """Whether no reading lies below the line through the two before it."""
        passed = self._passed()
        return all(
            phase.peak_bytes >= least
            for before, last, (size, phases) in zip(passed, passed[1:], passed[2:], strict=False)
            for phase, least in zip(phases, self._lines(before, last, size), strict=False)
        )

    def _least(self, size: int) -> int:
        """What ``size`` needs at least, beyond the two largest that ran."""
        before, last = self._passed()[-2:]
        lines = list(self._lines(before, last, size, self._slack_bytes))
        if size == self._undivided:
            lines[1:-1] = []
        return max(lines) - self._spared_bytes(size)

    def _lines(
        self,
        before: tuple[int, tuple[Phase, ...]],
        last: tuple[int, tuple[Phase, ...]],
        size: int,
        slack_bytes: int | None = None,
    ) -> Iterator[int]:
        """Of each phase, the line through two sizes at a third; as low as rounding allows."""
        slack = self._slack_bytes if slack_bytes is None else slack_bytes
        between, beyond = last[0] - before[0], size - last[0]
        for early, late in zip(before[1], last[1], strict=False):
            low = late.peak_bytes - slack
            yield low - max(low - early.peak_bytes, 0) * beyond // -between  # Rounded up: bytes.

    def _guess(self) -> int:
        """The next position to try, always inside the bracket."""
        bisects = self._budget <= math.ceil(math.log2(self._bad - self._good))
        wanted = (self._good + self._bad) // 2 if bisects else self._hint()
        wanted = max(wanted, self._presumed())
        position = min(max(min(wanted, self._farthest()), self._good + 1), self._bad - 1)
        # One example last: a model may refuse it for a reason of its own, as BatchNorm does.
        alone = self._candidates[position] == 1 and self._bad > 1
        return position + 1 if alone else position

    def _farthest(self) -> int:
        """The last position that what has run is a measure of."""
        return bisect.bisect_right(self._candidates, _STRETCH * (self.size or _FIRST)) - 1

    def _presumed(self) -> int:
        """The prior's position, or as far towards it as may be gone; -1 unless one size has run."""
        if self._prior is None or self._good < 0 or len(self._outcomes) > 1:
            return -1
        return min(bisect.bisect_right(self._candidates, self._prior) - 1, self._farthest())

    def _hint(self) -> int:
        candidates, untried = self._candidates, self._bad == len(self._candidates)
        middle = (self._good + self._bad) // 2
        if self._good < 0:
            return bisect.bisect_right(candidates, _FIRST) - 1 if untried else middle
        if self._is_read():
            inside = self._last_inside()
            trusted = untried or self._is_foreseen(candidates[self._bad])
            return inside if trusted else min(inside, middle)
        # Nothing to go by: double, then a third of the way. A size that is too large costs time,
        # host memory for its batch, and a failure.
        size, doubled = self.size, 2 * self.size
        if untried:
            return bisect.bisect_right(candidates, doubled) - 1
        third = size + max(1, (candidates[self._bad] - size) // 3)
        return bisect.bisect_left(candidates, min(doubled, third))

    def _last_inside(self) -> int:
        """The last position in the bracket that is inside the limit by the lines as read."""
        positions = range(self._good + 1, self._bad)
        outside = bisect.bisect_right(
            positions, self.limit_bytes, key=lambda place: self._read_at(self._candidates[place])
        )
        return self._good + outside

    def _read_at(self, size: int) -> int:
        """What the lines say of ``size``; with one reading they start at its floors: too steep."""
        passed = self._passed()
        if len(passed) > 1:
            return max(self._lines(passed[-2], passed[-1], size, 0))
        known, phases = passed[-1]
        return max(
            phase.peak_bytes
            + max(phase.peak_bytes - phase.floor_bytes, 0) * (size - known) // known
            for phase in phases
        )
