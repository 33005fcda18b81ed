"""Bracketing search: find the largest candidate size that fits into memory.

The search keeps a bracket: the largest size that ran, and the smallest larger size that failed.
The caller runs each proposed size and reports the outcome, which narrows the bracket. The bracket
starts open at the top. The search ends when no candidate is left inside, or when a lower bound
shows that the next larger candidate cannot fit.

Known instances:

* Doubling and bisection (exponential search): double until a size fails, then bisect.
  Lightning's ``BatchSizeFinder`` does this with ``mode="binsearch"``.
* Backtracking: start high, and shrink after each failure. ``find_executable_batch_size`` of
  accelerate does this.
* Secant method (interpolation search): a model of memory over size, here a line through two
  readings, proposes the next size.

This module combines them: it interpolates where memory was read, starts from a prior where there
is one, and otherwise doubles and bisects. It handles integers only; it runs nothing.
"""

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from autobatch.results.search import Phase, Upper
from autobatch.search.prior import Prior
from autobatch.search.trial_bound import TrialBound

Confirm = Literal["extrapolated", "failed"]

_FIRST: Final = 4  # Large enough to estimate a slope, small enough to fit nearly everywhere.
_NEAR: Final = 0.8  # A cautious estimate of this share of a bold one is preferred: it will run.
_STRETCH: Final = 64  # The most that one trial may grow the size: the host holds the batch too.


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a trial.

    Attributes:
        fits: Whether the size ran.
        phases: Memory by phase, the same phases at every size: the first micro-batch, the later
            micro-batches, the optimizer step. Empty for a failure, or if memory was not read.
        explained: For a failure, whether memory was near the limit when the failure came. If not,
            something other than the memory that is read makes sizes fail.
    """

    fits: bool
    phases: tuple[Phase, ...] = ()
    explained: bool = True

    @property
    def peak_bytes(self) -> int:
        """The highest peak of all phases; 0 if memory was not read."""
        return max((phase.peak_bytes for phase in self.phases), default=0)


class BracketingSearch:
    """Proposes the next size to try, and ends when the answer is known.

    The memory model: within one phase of a step, peak memory is convex in the size, because each
    allocation is constant or grows with the examples. (The peak over all phases has a kink where
    another phase takes over, so each phase is modelled by itself.) The line through the two largest
    sizes that ran is therefore a lower bound on the memory of every larger size. The search uses
    the line to propose sizes, and to exclude sizes without a trial. A reading below the line shows
    that memory is not convex, so the search stops excluding by the line. A failure that the
    readings do not explain makes the search ignore all readings.

    Guarantees, whatever is read and guessed: the answer ran. Under one limit, ``next`` proposes no
    candidate twice. No proposal is more than 64 times the largest size that ran, if candidates lie
    that close. The search takes at most four more trials than doubling and bisection
    (``TrialBound``).

    Args:
        candidates: Sizes, ascending, without repeats.
        limit_bytes: The bytes that a step may allocate.
        slack_bytes: The largest rounding error of a reading, in bytes.
        confirm: ``"extrapolated"`` excludes sizes by the lower bound. ``"failed"`` always tries the
            next larger candidate.
        undivided: The candidate that is the whole logical batch, which has no later micro-batches.
        saved_bytes: Function of a candidate: the bytes by which its window may use less than the
            windows of smaller candidates, such as the prefetch of a micro-batch that does not come.
        prior: A first guess of the answer. One small size is tried before the guess and corrects
            it. The guess is not tried if the reading of that small size leaves room for more. A
            wrong guess costs one or two trials where memory is linear, and seldom more elsewhere.
    """

    def __init__(
        self,
        candidates: Sequence[int],
        *,
        limit_bytes: int,
        slack_bytes: int = 0,
        confirm: Confirm = "extrapolated",
        undivided: int | None = None,
        saved_bytes: Callable[[int], int] = lambda _: 0,
        prior: Prior | None = None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self._candidates = candidates
        self._slack_bytes = slack_bytes
        self._confirm = confirm
        self._undivided = undivided
        self._saved_bytes = saved_bytes
        self._prior = prior
        self._preliminary: tuple[int, tuple[Phase, ...]] | None = None
        self._outcomes: dict[int, Outcome] = {}  # By size; the last outcome of a repeated size.
        self._restart()

    @property
    def size(self) -> int:
        """The largest size that ran, or 0."""
        return self._candidates[self._good] if self._good >= 0 else 0

    @property
    def upper(self) -> Upper:
        """Why no larger size is tried; only for a search that has ended."""
        if self._good + 1 == len(self._candidates):
            return Upper(reason="ceiling")
        following = self._candidates[self._good + 1]
        if self._good + 1 == self._bad:
            return Upper(reason="ran out", size=following)
        return Upper(reason="extrapolated", size=following, bytes=self._lower_bound(following))

    def next(self) -> int | None:
        """Return the size to try now, or None if the answer is known."""
        if self._bad - self._good <= 1 or self._is_excluded():
            return None
        return self._candidates[self._next_position()]

    def change_limit(self, limit_bytes: int) -> None:
        """Continue under another limit, and forget the outcomes that it invalidates.

        A higher limit invalidates failures; a lower limit invalidates sizes whose peak is above it.
        Both may be proposed again.
        """
        rises, self.limit_bytes = limit_bytes > self.limit_bytes, limit_bytes
        self._outcomes = {
            size: outcome
            for size, outcome in self._outcomes.items()
            if (outcome.peak_bytes <= limit_bytes if outcome.fits else not rises)
        }
        self._restart()

    def record_preliminary(self, size: int, phases: tuple[Phase, ...]) -> None:
        """Record the reading of a step that created the optimizer's state.

        The reading helps to propose sizes, but excludes none. Use it only on devices with exact
        readings: on a GPU, a first step also loads kernels and libraries.
        """
        self._preliminary = size, phases

    def record(self, size: int, outcome: Outcome) -> None:
        """Record the outcome of a trial; it replaces an earlier outcome of the same size."""
        self._trials_used += size not in self._outcomes
        self._outcomes[size] = outcome
        self._find_bracket()

    def _restart(self) -> None:
        """Restart the bound on the number of trials from the outcomes that are known."""
        self._bound = TrialBound(self._candidates, stretch=_STRETCH, first=_FIRST)
        self._trials_used = 0
        self._find_bracket()

    def _find_bracket(self) -> None:
        candidates = self._candidates
        ran = [bisect.bisect_left(candidates, n) for n, o in self._outcomes.items() if o.fits]
        failed = [
            bisect.bisect_left(candidates, n) for n, o in self._outcomes.items() if not o.fits
        ]
        self._good = max(ran, default=-1)
        # Positions of the last size that ran, and of the first larger size that failed or the end.
        self._bad = min((n for n in failed if n > self._good), default=len(candidates))
        self._bound.extend(self._good, self._bad, self._trials_used)

    def _measured(self) -> list[tuple[int, tuple[Phase, ...]]]:
        """The sizes that ran and whose memory was read, ascending, with their phases."""
        return sorted((n, o.phases) for n, o in self._outcomes.items() if o.fits and o.phases)

    def _is_reliable(self) -> bool:
        """Return whether there are readings, and they explain all failures."""
        return bool(self._measured()) and all(
            outcome.fits or outcome.explained or self._exceeds_limit(size)
            for size, outcome in self._outcomes.items()
        )

    def _exceeds_limit(self, size: int) -> bool:
        """Return whether the estimate for ``size`` is above the limit."""
        return self._estimate(size) > self.limit_bytes

    def _is_excluded(self) -> bool:
        """Return whether the lower bound excludes the next larger candidate."""
        if self._confirm == "failed" or not self._is_reliable() or len(self._measured()) < 2:
            return False
        following = self._candidates[self._good + 1]
        return self._lower_bound(following) > self.limit_bytes and self._is_convex()

    def _is_convex(self) -> bool:
        """Return whether no reading lies below the line through the two readings before it."""
        measured = self._measured()
        return all(
            phase.peak_bytes >= least
            for before, last, (size, phases) in zip(
                measured, measured[1:], measured[2:], strict=False
            )
            for phase, least in zip(phases, self._extrapolated(before, last, size), strict=False)
        )

    def _lower_bound(self, size: int) -> int:
        """The fewest bytes that ``size`` can need; it is above the two largest sizes that ran."""
        before, last = self._measured()[-2:]
        lines = list(self._extrapolated(before, last, size, self._slack_bytes))
        if size == self._undivided:
            lines[1:-1] = []
        return max(lines) - self._saved_bytes(size)

    def _extrapolated(
        self,
        before: tuple[int, tuple[Phase, ...]],
        last: tuple[int, tuple[Phase, ...]],
        size: int,
        slack_bytes: int | None = None,
    ) -> Iterator[int]:
        """The line of each phase through two sizes, at a third size, less the rounding error."""
        slack = self._slack_bytes if slack_bytes is None else slack_bytes
        between, beyond = last[0] - before[0], size - last[0]
        for early, late in zip(before[1], last[1], strict=False):
            low = late.peak_bytes - slack
            yield low - max(low - early.peak_bytes, 0) * beyond // -between  # Rounded up.

    def _next_position(self) -> int:
        """The position of the next candidate to try, inside the bracket."""
        wanted = max(self._position_by_memory(), self._position_by_prior())
        return self._bound.nearest(wanted, self._good, self._bad, self._trials_used)

    def _position_by_prior(self) -> int:
        """The position of the prior, corrected by the first size that ran; -1 if it has failed."""
        if self._prior is None or self._good < 0:
            return -1
        first = min(size for size, outcome in self._outcomes.items() if outcome.fits)
        peak_bytes = self._outcomes[first].peak_bytes
        guess = self._prior.corrected(first, peak_bytes, self.limit_bytes)
        place = bisect.bisect_right(self._candidates, guess) - 1
        return place if place < self._bad else -1

    def _position_by_memory(self) -> int:
        """The position that the readings suggest; without readings, by doubling and bisection."""
        candidates, untried = self._candidates, self._bad == len(self._candidates)
        middle = (self._good + self._bad) // 2
        if self._good < 0:
            return bisect.bisect_right(candidates, _FIRST) - 1 if untried else middle
        if self._is_reliable():
            inside = self._last_within_limit(self._estimate)
            if untried:
                return self._position_by_preliminary(inside)
            if self._exceeds_limit(candidates[self._bad]):
                return inside
            # Memory has a kink between what ran and what failed: the upper estimate may be closer.
            steep = self._last_within_limit(self._upper_estimate)
            is_far = steep > middle or candidates[steep] >= 2 * self.size
            return steep if is_far and steep < self._bad - 1 else min(inside, middle)
        # Without readings: double, then go a third of the way, because a failure costs more than a
        # success (time, and host memory for the batch).
        size, doubled = self.size, 2 * self.size
        if untried:
            return bisect.bisect_right(candidates, doubled) - 1
        third = size + max(1, (candidates[self._bad] - size) // 3)
        return bisect.bisect_left(candidates, min(doubled, third))

    def _position_by_preliminary(self, cautious: int) -> int:
        """The position by the line through the preliminary reading and the first size that ran.

        The line is too optimistic where memory has a kink, so ``cautious`` is preferred if it is
        nearly as far. ``cautious`` is also the answer once two sizes have run.
        """
        preliminary = self._corrected_preliminary()
        if preliminary is None or len(self._measured()) > 1:
            return cautious
        known = self._measured()[-1]
        bold = self._last_within_limit(
            lambda size: max(self._extrapolated(preliminary, known, size, 0))
        )
        near = self._candidates[cautious] >= _NEAR * self._candidates[bold]
        return cautious if near else self._first_leap(bold)

    def _first_leap(self, position: int) -> int:
        """The first of several equal leaps to a position that is too far for one leap."""
        size, wanted = self.size, self._candidates[position]
        leaps = math.ceil(math.log(max(wanted / size, 1), _STRETCH))
        if leaps < 2:
            return position
        return bisect.bisect_right(self._candidates, size * (wanted / size) ** (1 / leaps)) - 1

    def _last_within_limit(self, estimate: Callable[[int], int]) -> int:
        """The last position in the bracket whose estimate is within the limit."""
        positions = range(self._good + 1, self._bad)
        outside = bisect.bisect_right(
            positions, self.limit_bytes, key=lambda place: estimate(self._candidates[place])
        )
        return self._good + outside

    def _estimate(self, size: int) -> int:
        """The bytes of ``size`` by the line through two readings, or else the upper estimate."""
        measured = self._measured()
        if len(measured) > 1:
            return max(self._extrapolated(measured[-2], measured[-1], size, 0))
        return self._upper_estimate(size)

    def _upper_estimate(self, size: int) -> int:
        """The most bytes that ``size`` needs: lines from the baseline of each phase at size 0."""
        known, phases = self._measured()[-1]
        # What a phase leaves behind, such as gradients, does not grow with the size either.
        left = [*(phase.floor_bytes for phase in phases[1:]), 0]
        return max(
            phase.peak_bytes
            + max(phase.peak_bytes - max(phase.floor_bytes, end), 0) * (size - known) // known
            for phase, end in zip(phases, left, strict=True)
        )

    def _corrected_preliminary(self) -> tuple[int, tuple[Phase, ...]] | None:
        """The preliminary reading, corrected for the optimizer state that exists since then.

        The optimizer state adds to the baseline of every phase but the last, which created it.
        """
        known = self._measured()[0]
        if self._preliminary is None or self._preliminary[0] >= known[0]:
            return None
        size, phases = self._preliminary
        added = [
            now.floor_bytes - then.floor_bytes
            for now, then in zip(known[1][1:], phases[1:], strict=False)
        ]
        return size, tuple(
            replace(phase, peak_bytes=phase.peak_bytes + more)
            for phase, more in zip(phases, [*added, 0], strict=False)
        )
