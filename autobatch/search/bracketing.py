"""Find the largest candidate that fits. Knows integers, not tensors."""

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from autobatch.results.search import Phase, Upper
from autobatch.search.prior import Prior
from autobatch.search.trial_bound import TrialBound

Confirm = Literal["extrapolated", "failed"]

_FIRST: Final = 4  # Large enough for a slope, small enough to fit nearly everywhere.
_NEAR: Final = 0.8  # So much of a bold guess is worth more than the guess: it will run.
_STRETCH: Final = 64  # How far beyond what has run to go at once: the host holds the batch too.


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


class BracketingSearch:
    """Chooses what to try next, and knows when nothing is left to try.

    Memory is read phase by phase: the peak of all of them bends where another phase takes over,
    but within one it is convex in the size, as each allocation is constant, or grows with the
    examples. So the line through the two largest sizes that ran is a lower bound on what any
    larger one needs. It says what to try next, and what need not be tried. A reading below the
    line shows that memory is not convex here, and ends its use as a proof; a failure that the
    readings do not explain ends their use altogether.

    What is returned ran. Under one limit no candidate is asked for twice by ``next``, none is more
    than 64 times what has run (where candidates lie that close), and there are at most four more
    trials than doubling and bisecting would take, whatever is read and guessed (``TrialBound``).

    Args:
        candidates: Ascending, without repeats.
        limit_bytes: What a step may allocate.
        slack_bytes: How far readings may be rounded.
        confirm: ``"extrapolated"``: what the bound excludes is not tried. ``"failed"``: the next
            larger candidate is always tried.
        undivided: The candidate that is the whole logical batch: it has no later micro-batches.
        spared_bytes: What the window of a candidate may do without, though smaller ones hold it.
        prior: A first guess of the answer. The first size is tried before it, and corrects it;
            where what it read leaves room for more, the guess is not tried. A wrong one costs a
            trial or two where phases are straight lines; where they bend, seldom more.
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
        prior: Prior | None = None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self._candidates = candidates
        self._slack_bytes = slack_bytes
        self._confirm = confirm
        self._undivided = undivided
        self._spared_bytes = spared_bytes
        self._prior = prior
        self._glimpse: tuple[int, tuple[Phase, ...]] | None = None
        self._outcomes: dict[int, Outcome] = {}  # By size; of one that was repeated, the last.
        self._begin()

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
        self._outcomes = {
            size: outcome
            for size, outcome in self._outcomes.items()
            if (outcome.peak_bytes <= limit_bytes if outcome.fits else not rises)
        }
        self._begin()

    def glimpse(self, size: int, phases: tuple[Phase, ...]) -> None:
        """Take note of a step that made the optimizer's state. It hints, and proves nothing.

        Only for readings to the byte: a first step also loads what later ones find.
        """
        self._glimpse = size, phases

    def learn(self, size: int, outcome: Outcome) -> None:
        """Take note of a trial; of a candidate that was tried before, it is the last word."""
        self._used += size not in self._outcomes
        self._outcomes[size] = outcome
        self._find_bracket()

    def _begin(self) -> None:
        """Promise anew, from what is known."""
        self._promise = TrialBound(self._candidates, stretch=_STRETCH, first=_FIRST)
        self._used = 0
        self._find_bracket()

    def _find_bracket(self) -> None:
        candidates = self._candidates
        ran = [bisect.bisect_left(candidates, n) for n, o in self._outcomes.items() if o.fits]
        failed = [
            bisect.bisect_left(candidates, n) for n, o in self._outcomes.items() if not o.fits
        ]
        self._good = max(ran, default=-1)
        # Positions: the last that ran; the first beyond it that failed, or the end.
        self._bad = min((n for n in failed if n > self._good), default=len(candidates))
        self._promise.renew(self._good, self._bad, self._used)

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
        wanted = max(self._hint(), self._presumed())
        return self._promise.nearest(wanted, self._good, self._bad, self._used)

    def _presumed(self) -> int:
        """The prior's position, corrected by the first size that ran; -1 where that has failed."""
        if self._prior is None or self._good < 0:
            return -1
        first = min(size for size, outcome in self._outcomes.items() if outcome.fits)
        peak_bytes = self._outcomes[first].peak_bytes
        guess = self._prior.corrected(first, peak_bytes, self.limit_bytes)
        place = bisect.bisect_right(self._candidates, guess) - 1
        return place if place < self._bad else -1

    def _hint(self) -> int:
        candidates, untried = self._candidates, self._bad == len(self._candidates)
        middle = (self._good + self._bad) // 2
        if self._good < 0:
            return bisect.bisect_right(candidates, _FIRST) - 1 if untried else middle
        if self._is_read():
            inside = self._last_inside(self._read_at)
            if untried:
                return self._boldly(inside)
            if self._is_foreseen(candidates[self._bad]):
                return inside
            # Memory bends between what ran and what failed. The steep line may still know better.
            steep = self._last_inside(self._steep_at)
            is_far = steep > middle or candidates[steep] >= 2 * self.size
            return steep if is_far and steep < self._bad - 1 else min(inside, middle)
        # Nothing to go by: double, then a third of the way. A size that is too large costs time,
        # host memory for its batch, and a failure.
        size, doubled = self.size, 2 * self.size
        if untried:
            return bisect.bisect_right(candidates, doubled) - 1
        third = size + max(1, (candidates[self._bad] - size) // 3)
        return bisect.bisect_left(candidates, min(doubled, third))

    def _boldly(self, cautious: int) -> int:
        """The position to try by the line through what was glimpsed, after one size has run.

        It lies high where memory still bends: so where the cautious one is nearly as far, that is.
        """
        glimpsed = self._glimpsed()
        if glimpsed is None or len(self._passed()) > 1:
            return cautious
        known = self._passed()[-1]
        bold = self._last_inside(lambda size: max(self._lines(glimpsed, known, size, 0)))
        near = self._candidates[cautious] >= _NEAR * self._candidates[bold]
        return cautious if near else self._in_steps(bold)

    def _in_steps(self, position: int) -> int:
        """Where to go first, if a position is too far for one leap: the leaps are alike."""
        size, wanted = self.size, self._candidates[position]
        leaps = math.ceil(math.log(max(wanted / size, 1), _STRETCH))
        if leaps < 2:
            return position
        return bisect.bisect_right(self._candidates, size * (wanted / size) ** (1 / leaps)) - 1

    def _last_inside(self, read_at: Callable[[int], int]) -> int:
        """The last position in the bracket that is inside the limit by the lines as read."""
        positions = range(self._good + 1, self._bad)
        outside = bisect.bisect_right(
            positions, self.limit_bytes, key=lambda place: read_at(self._candidates[place])
        )
        return self._good + outside

    def _read_at(self, size: int) -> int:
        """What the line through the last two readings says of ``size``, or the steep one."""
        passed = self._passed()
        if len(passed) > 1:
            return max(self._lines(passed[-2], passed[-1], size, 0))
        return self._steep_at(size)

    def _steep_at(self, size: int) -> int:
        """What ``size`` needs at most, beyond the last that ran: lines that start at its floors."""
        known, phases = self._passed()[-1]
        # What a phase leaves behind, such as gradients, has nothing to do with the size either.
        left = [*(phase.floor_bytes for phase in phases[1:]), 0]
        return max(
            phase.peak_bytes
            + max(phase.peak_bytes - max(phase.floor_bytes, end), 0) * (size - known) // known
            for phase, end in zip(phases, left, strict=True)
        )

    def _glimpsed(self) -> tuple[int, tuple[Phase, ...]] | None:
        """What was glimpsed, as it would read now that the optimizer has its state.

        That lies under every phase but the last, which made it: so much more is alive at its end.
        """
        known = self._passed()[0]
        if self._glimpse is None or self._glimpse[0] >= known[0]:
            return None
        size, phases = self._glimpse
        added = [
            now.floor_bytes - then.floor_bytes
            for now, then in zip(known[1][1:], phases[1:], strict=False)
        ]
        return size, tuple(
            replace(phase, peak_bytes=phase.peak_bytes + more)
            for phase, more in zip(phases, [*added, 0], strict=False)
        )
