"""Whatever positions are preferred, four trials more than by hand are enough."""

import bisect
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bracketing import FAR, FEW, any_candidates, by_hand

from autobatch.results.plan import useful_sizes
from autobatch.search.trial_bound import TrialBound, doubled

drawn = settings(deadline=None, max_examples=300, derandomize=True)


def answered(candidates: Sequence[int], answer: int, wishes: Sequence[float]) -> list[int]:
    """Try whatever is wished for, as shares of all; return the positions that were tried.

    Args:
        candidates: Ascending.
        answer: The position of the largest that runs, or -1.
        wishes: Then the last of them, for ever.
    """
    bound = TrialBound(candidates, stretch=FAR, first=FEW)
    good, bad, tried = -1, len(candidates), list[int]()
    bound.extend(good, bad, 0)
    while bad - good > 1:
        wish = wishes[min(len(tried), len(wishes) - 1)]
        place = bound.nearest(int(wish * len(candidates)), good, bad, len(tried))
        assert good < place < bad
        assert place <= bound.farthest(good)
        good, bad = (place, bad) if place <= answer else (good, place)
        tried.append(place)
    return tried


@drawn
@given(
    candidates=any_candidates,
    share=st.floats(0, 1),
    is_small=st.booleans(),
    wishes=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]) | st.floats(0, 1), min_size=1),
)
def test_whatever_is_wished_for_no_answer_takes_more_than_four_trials_more_than_by_hand(
    candidates: Sequence[int], share: float, is_small: bool, wishes: list[float]
) -> None:
    count = len(candidates)
    answer = int((count + 1) ** share if is_small else count * share) - 1
    answer = min(max(answer, -1), count - 1)
    largest = candidates[answer] if answer >= 0 else 0
    tried = answered(candidates, answer, wishes)
    assert len(tried) <= by_hand(candidates, largest) + FEW
    if candidates[0] == 1 < count:
        assert 0 not in tried[:-1], "one example comes last"


@pytest.mark.parametrize("wish", [-1.0, 2.0])
@pytest.mark.parametrize("candidates", [range(1, 300), useful_sizes(300), range(16, 300, 16)])
def test_every_answer_of_a_small_search_is_reached_in_time(
    candidates: Sequence[int], wish: float
) -> None:
    for answer in range(-1, len(candidates)):
        tried = answered(candidates, answer, [wish])
        assert len(tried) <= by_hand(candidates, candidates[answer] if answer >= 0 else 0) + FEW
        assert len(tried) <= len(candidates).bit_length() + 2 * FEW


def test_a_wish_that_can_be_afforded_is_granted() -> None:
    bound = TrialBound(range(1, 10_001), stretch=FAR, first=FEW)
    for wish in (4, 20, 255):
        assert bound.nearest(wish, good=3, bad=10_000, used=1) == wish
    assert bound.nearest(9_000, good=3, bad=10_000, used=1) == 4 * FAR - 1


def test_walking_is_ended_where_bisection_is_due() -> None:
    """65 answers, 64 leaves: each step up costs a trial, and so the steps get longer."""
    bound = TrialBound(range(1, 66), stretch=FAR, first=FEW)
    good, steps = 3, []
    for used in range(1, 9):
        good = bound.nearest(good + 1, good, 65, used)
        steps.append(good)
    assert steps[:3] == [4, 5, 6]
    assert steps[-1] > 8, "one by one it would take 60 more"


def test_trials_that_nobody_asked_for_are_allowed_for() -> None:
    bound = TrialBound(range(1, 1001), stretch=FAR, first=FEW)
    bound.extend(good=3, bad=1000, used=40)
    assert bound.nearest(3, good=3, bad=1000, used=40) > 3


@drawn
@given(candidates=any_candidates)
def test_doubling_goes_from_the_first_to_the_last_and_never_beyond_twice(
    candidates: Sequence[int],
) -> None:
    places = list(doubled(candidates))
    assert (places[0], places[-1]) == (0, len(candidates) - 1)
    for one, other in itertools.pairwise(places):
        twice = bisect.bisect_right(candidates, 2 * candidates[one]) - 1
        assert one < other <= max(twice, one + 1)
