"""The promise of a search: at most four trials more than by hand, whatever is read."""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

_SPARE: Final = 4  # Trials that readings may cost beyond bisection.


def doubled(candidates: Sequence[int]) -> Iterator[int]:
    """Yield the positions that doubling tries: the first, and each the last within twice."""
    position, last = 0, len(candidates) - 1
    while position < last:
        yield position
        following = bisect.bisect_right(candidates, 2 * candidates[position]) - 1
        position = max(following, position + 1)
    yield last


class TrialBound:
    """How many trials each answer may take, and which trials leave all answers in reach.

    By hand one doubles from the first candidate, and bisects behind the first failure. Whatever the
    answer turns out to be, a search that keeps the promise has tried at most four sizes more. Nor
    has it tried more than eight above ``ceil(log2(len(candidates) + 1))``, which is less where the
    answer is large, and leaves room for four leaps on the way there (unless candidates lie so far
    apart that there must be more).

    Trials that leave every answer its share exist as long as the shares pack: as the leaves of a
    tree, each at its depth and all in their order (Kraft's inequality, and its alphabetic form).

    Args:
        candidates: Ascending.
        stretch: How many times what has run may be tried at once.
        first: What may be tried while nothing has run.
    """

    def __init__(self, candidates: Sequence[int], *, stretch: int, first: int) -> None:
        self._candidates = candidates
        self._stretch = stretch
        self._first = first
        self._runs = tuple(self._by_hand())
        self._most = math.ceil(math.log2(len(candidates) + 1)) + 2 * _SPARE
        self._more = 0

    def renew(self, good: int, bad: int, used: int) -> None:
        """Allow what the bracket needs, where trials that were not asked for have used too much."""
        while not self._keeps(good, bad, used):
            self._more += 1

    def farthest(self, good: int) -> int:
        """Return the last position that what has run is a measure of: at least the next one."""
        size = self._stretch * self._candidates[good] if good >= 0 else self._first
        following = 1 if good < 0 and self._begins_with_one else good + 1
        return max(bisect.bisect_right(self._candidates, size) - 1, following)

    def nearest(self, wanted: int, good: int, bad: int, used: int) -> int:
        """Return the position next to ``wanted`` after which the promise can still be kept.

        Args:
            wanted: Where one would like to try.
            good: The last position that ran, or -1.
            bad: The first beyond it that failed, or their number.
            used: Trials so far.
        """
        # One example last: a model may refuse it for a reason of its own, as BatchNorm does.
        lowest = 1 if good < 0 and bad > 1 and self._begins_with_one else good + 1
        highest = min(self.farthest(good), bad - 1)
        most = max(self._affordable(good, highest, used + 1), lowest)
        place = min(max(wanted, lowest), most)
        if self._keeps(place, bad, used + 1):
            return place
        # Higher, so that a pass leaves less to be done.
        inside = range(place, most)
        return place + bisect.bisect_left(inside, 1, key=lambda p: self._keeps(p, bad, used + 1))

    @property
    def _begins_with_one(self) -> bool:
        return self._candidates[0] == 1 and len(self._candidates) > 1

    def _by_hand(self) -> Iterator[tuple[range, int]]:
        """Yield the answers, as ranges of positions, with the least trials by hand of any there."""
        tried = list(doubled(self._candidates))
        yield range(-1, 0), 1
        for steps, (position, following) in enumerate(itertools.pairwise(tried), 2):
            bisections = (following - position).bit_length() - 1
            yield range(position, following), steps + bisections
        yield range(tried[-1], len(self._candidates)), len(tried)

    def _keeps(self, good: int, bad: int, used: int) -> bool:
        """Whether every answer in the bracket can still be reached in time, by leaps if need be."""
        while (farthest := self.farthest(good)) < bad - 1:
            used += 1
            leap = self._affordable(good, farthest, used)
            if leap <= good:
                return False
            good = leap
        return self._packs(good, bad, used)

    def _affordable(self, good: int, highest: int, used: int) -> int:
        """Return the highest position that may fail as one of ``used`` trials; or ``good``."""
        if self._packs(good, highest, used):
            return highest
        inside = range(good + 1, highest)
        return good + bisect.bisect_left(inside, 1, key=lambda p: not self._packs(good, p, used))

    def _packs(self, good: int, bad: int, used: int) -> bool:
        """Whether bisection of some kind reaches every answer in the bracket in time."""
        taken, whole = 0, 1 << self._most + self._more
        for count, allowed in self._shares(good, bad):
            left = min(allowed, self._most) + self._more - used
            if left < 0:
                return False
            share = whole >> left
            taken = (-(-taken // share) + count) * share
        return taken <= whole

    def _shares(self, good: int, bad: int) -> Iterator[tuple[int, int]]:
        """Of the answers in the bracket, in order: how many may take how many trials."""
        if good < 0 and bad > 1 and self._begins_with_one:  # None and one: told apart at the end.
            yield 1, self._runs[0][1] + _SPARE - 1
            good = 1
        for answers, trials in self._runs:
            count = min(answers.stop, bad) - max(answers.start, good)
            if count > 0:
                yield count, trials + _SPARE
