"""Bound the trials of a search: at most four more than doubling and bisection take."""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

_SPARE: Final = 4  # Trials that wrong readings may cost beyond bisection.


def doubled(candidates: Sequence[int]) -> Iterator[int]:
    """Yield the positions that doubling tries: each size is at most twice the one before."""
    position, last = 0, len(candidates) - 1
    while position < last:
        yield position
        following = bisect.bisect_right(candidates, 2 * candidates[position]) - 1
        position = max(following, position + 1)
    yield last


class TrialBound:
    """Limits each trial to sizes after which every answer can still be found in few trials.

    The reference is a search by hand: double from the first candidate, then bisect after the first
    failure. For every possible answer, a search under this bound takes at most four trials more
    than the reference. It also takes at most ``ceil(log2(len(candidates) + 1)) + 8`` trials, which
    is less if the answer is large. (Both bounds grow if candidates lie so far apart that the search
    needs more leaps.)

    The check: a decision tree in which each answer is a leaf at its allowed depth, all in order,
    exists if and only if the depths satisfy Kraft's inequality in its alphabetic form.

    Args:
        candidates: Sizes, ascending.
        stretch: The most by which one trial may multiply the largest size that ran.
        first: The largest size that may be tried before any size has run.
    """

    def __init__(self, candidates: Sequence[int], *, stretch: int, first: int) -> None:
        self._candidates = candidates
        self._stretch = stretch
        self._first = first
        self._trials_by_hand = tuple(self._by_hand())
        self._usual_trials = math.ceil(math.log2(len(candidates) + 1)) + 2 * _SPARE
        self._extra_trials = 0

    def extend(self, good: int, bad: int, used: int) -> None:
        """Allow more trials if the trials so far leave too few for the answers in the bracket."""
        while not self._is_sufficient(good, bad, used):
            self._extra_trials += 1

    def farthest(self, good: int) -> int:
        """Return the last position within ``stretch`` of what ran; at least the next position."""
        size = self._stretch * self._candidates[good] if good >= 0 else self._first
        following = 1 if good < 0 and self._begins_with_one else good + 1
        return max(bisect.bisect_right(self._candidates, size) - 1, following)

    def nearest(self, wish: int, good: int, bad: int, used: int) -> int:
        """Return the position nearest to ``wish`` that keeps the bound on the trials.

        Args:
            wish: The preferred position.
            good: The last position that ran, or -1.
            bad: The first position above ``good`` that failed, or the number of candidates.
            used: Trials so far.
        """
        # Size 1 comes last: BatchNorm refuses a single example for a reason other than memory.
        lowest = 1 if good < 0 and bad > 1 and self._begins_with_one else good + 1
        highest = min(self.farthest(good), bad - 1)
        most = max(self._affordable(good, highest, used + 1), lowest)
        place = min(max(wish, lowest), most)
        if self._is_sufficient(place, bad, used + 1):
            return place
        # A higher position leaves fewer candidates above it if it runs.
        inside = range(place, most)
        return place + bisect.bisect_left(
            inside, 1, key=lambda p: self._is_sufficient(p, bad, used + 1)
        )

    @property
    def _begins_with_one(self) -> bool:
        return self._candidates[0] == 1 and len(self._candidates) > 1

    def _by_hand(self) -> Iterator[tuple[range, int]]:
        """Yield ranges of answers with the fewest trials that the reference takes in each range."""
        tried = list(doubled(self._candidates))
        yield range(-1, 0), 1
        for steps, (position, following) in enumerate(itertools.pairwise(tried), 2):
            bisections = (following - position).bit_length() - 1
            yield range(position, following), steps + bisections
        yield range(tried[-1], len(self._candidates)), len(tried)

    def _is_sufficient(self, good: int, bad: int, used: int) -> bool:
        """Return whether leaps and bisection can still find every answer in the bracket in time."""
        while (farthest := self.farthest(good)) < bad - 1:
            used += 1
            leap = self._affordable(good, farthest, used)
            if leap <= good:
                return False
            good = leap
        return self._can_bisect(good, bad, used)

    def _affordable(self, good: int, highest: int, used: int) -> int:
        """Return the highest position that may fail as trial ``used``; ``good`` if none may."""
        if self._can_bisect(good, highest, used):
            return highest
        inside = range(good + 1, highest)
        return good + bisect.bisect_left(
            inside, 1, key=lambda p: not self._can_bisect(good, p, used)
        )

    def _can_bisect(self, good: int, bad: int, used: int) -> bool:
        """Return whether a bisection finds every answer in the bracket in time (by Kraft)."""
        taken, total = 0, 1 << self._usual_trials + self._extra_trials
        for count, allowed in self._allowances(good, bad):
            left = min(allowed, self._usual_trials) + self._extra_trials - used
            if left < 0:
                return False
            width = total >> left
            taken = (-(-taken // width) + count) * width
        return taken <= total

    def _allowances(self, good: int, bad: int) -> Iterator[tuple[int, int]]:
        """Yield how many answers of the bracket, in order, may take how many trials."""
        if good < 0 and bad > 1 and self._begins_with_one:  # Size 1 is tried last.
            yield 1, self._trials_by_hand[0][1] + _SPARE - 1
            good = 1
        for answers, trials in self._trials_by_hand:
            count = min(answers.stop, bad) - max(answers.start, good)
            if count > 0:
                yield count, trials + _SPARE
