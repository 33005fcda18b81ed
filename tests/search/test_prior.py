"""A prediction as the first guess of a search: what one small trial makes of it."""

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.results.search import Phase
from autobatch.search.bracketing import BracketingSearch, Outcome
from autobatch.search.options import SearchOptions
from autobatch.search.prior import Prior

MIB = 2**20
CANDIDATES = range(1, 10_001)
drawn = settings(deadline=None, max_examples=200, derandomize=True)


@dataclass(frozen=True)
class Step:
    """A forward and backward pass above an optimizer's step, whose memory does not grow."""

    constant: int
    slope: int
    update: int

    def phases(self, size: int, unseen: int = 0) -> tuple[Phase, ...]:
        passes = self.constant + self.slope * size + unseen
        return (
            Phase(floor_bytes=self.constant // 2, peak_bytes=passes),
            Phase(floor_bytes=self.constant // 2, peak_bytes=self.update + unseen),
        )

    def peak(self, size: int) -> int:
        return max(phase.peak_bytes for phase in self.phases(size))

    def prior(self, tolerable: int) -> Prior:
        """As a prediction that is bound by memory has it, powers of two and its own answer."""
        sizes = sorted({1 << n for n in range(tolerable.bit_length())} | {tolerable, 2 * tolerable})
        return Prior(
            tolerable=tolerable,
            limit_bytes=self.peak(tolerable),
            peaks=tuple((size, self.peak(size)) for size in sizes),
        )


steps = st.builds(
    Step,
    constant=st.integers(0, 10**8),
    slope=st.integers(10**4, 10**7),
    update=st.just(0),
)


def tried(step: Step, unseen: int, limit_bytes: int, prior: Prior | None) -> list[int]:
    search, sizes = BracketingSearch(CANDIDATES, limit_bytes=limit_bytes, prior=prior), []
    while (size := search.next()) is not None:
        phases = step.phases(size, unseen)
        fits = max(phase.peak_bytes for phase in phases) <= limit_bytes
        search.record(size, Outcome(fits=fits, phases=phases if fits else ()))
        sizes.append(size)
    assert search.size in sizes or search.size == 0
    return sizes


@drawn
@given(
    step=steps,
    tolerable=st.integers(5, 200),
    unseen=st.integers(0, 10**8),
    context=st.integers(-(10**8), 10**8),
)
def test_one_small_trial_corrects_what_could_not_be_seen(
    step: Step, tolerable: int, unseen: int, context: int
) -> None:
    """A workspace raises every peak, and the card has more or less room: yet two trials."""
    prior = step.prior(tolerable)
    limit_bytes = prior.limit_bytes + context
    most = (limit_bytes - unseen - step.constant) // step.slope
    if not 5 <= most <= 2 * tolerable:  # Beyond what was predicted it is the reading's turn.
        return
    assert tried(step, unseen, limit_bytes, prior) == [4, most]


def test_a_number_is_not_corrected_and_the_control_costs_a_failure() -> None:
    step = Step(constant=10 * MIB, slope=MIB, update=0)
    prior, unseen = step.prior(100), 15 * MIB
    assert tried(step, unseen, prior.limit_bytes, prior) == [4, 85]
    by_number = tried(step, unseen, prior.limit_bytes, Prior(tolerable=100))
    assert by_number[:2] == [4, 100], "100 does not fit"
    assert by_number[-1] == 85


def test_an_optimizer_s_step_hides_the_passes_at_a_small_size() -> None:
    """The small trial's peak was expected: the guess is the prediction's, and no worse for it."""
    step = Step(constant=10 * MIB, slope=MIB, update=60 * MIB)
    prior = step.prior(100)
    assert prior.corrected(4, 60 * MIB, prior.limit_bytes) == 100
    assert prior.corrected(4, 60 * MIB, prior.limit_bytes - 7 * MIB) == 93
    assert tried(step, 0, prior.limit_bytes, prior) == [4, 100]


def test_where_nothing_is_read_the_guess_stays() -> None:
    prior = Step(constant=0, slope=MIB, update=0).prior(100)
    assert prior.corrected(4, 0, 10**12) == 100
    assert Prior(tolerable=7).corrected(4, 10**9, 10**9) == 7


@drawn
@given(
    step=steps,
    wrong=steps,
    tolerable=st.integers(5, 200),
    unseen=st.integers(-(10**9), 10**9),
    largest=st.integers(5, 9000),
)
def test_however_wrong_a_prediction_is_the_answer_is_the_same(
    step: Step, wrong: Step, tolerable: int, unseen: int, largest: int
) -> None:
    limit_bytes = step.peak(largest)
    prior = wrong.prior(tolerable)
    prior = Prior(
        tolerable=prior.tolerable, limit_bytes=max(prior.limit_bytes + unseen, 1), peaks=prior.peaks
    )
    without = tried(step, 0, limit_bytes, None)
    found = tried(step, 0, limit_bytes, prior)
    assert max(n for n in found if n <= largest) == max(n for n in without if n <= largest)
    assert len(found) <= len(without) + 2


@drawn
@given(step=steps, tolerable=st.integers(1, 300), size=st.integers(1, 700))
def test_between_the_peaks_that_are_known_lie_straight_lines(
    step: Step, tolerable: int, size: int
) -> None:
    assert step.prior(tolerable)._peak(size) == step.peak(size)


@dataclass(frozen=True)
class Predicted:
    """As a prediction is: it holds what cannot be sent to another process."""

    tolerable: Any
    prior: Prior
    model: Any = open


def test_options_keep_the_numbers_of_a_prediction_and_not_its_model() -> None:
    prior = Step(constant=0, slope=MIB, update=0).prior(100)
    options = SearchOptions(prior=Predicted(100, prior))
    assert options.first_guess is prior
    assert pickle.loads(pickle.dumps(options)) == options
    assert SearchOptions(prior=90).prior == 90
    assert SearchOptions().first_guess is None


def test_what_says_no_size_is_refused() -> None:
    refused: Any
    for refused in ("90", True, 9.5):
        with pytest.raises(TypeError, match="prior must be an integer, a Prediction or None"):
            SearchOptions(prior=refused)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        SearchOptions(prior=-1)


def test_a_guess_that_is_far_is_reached_in_leaps() -> None:
    step = Step(constant=10 * MIB, slope=MIB, update=0)
    prior = step.prior(900)
    assert tried(step, 0, prior.limit_bytes, prior) == [4, 256, 900]


def test_a_failure_above_the_guess_leaves_it_standing_and_one_below_ends_it() -> None:
    step = Step(constant=10 * MIB, slope=MIB, update=0)
    prior = step.prior(100)
    for failed, following in ((10_000, 100), (90, None)):
        search = BracketingSearch(CANDIDATES, limit_bytes=prior.limit_bytes, prior=prior)
        search.record(failed, Outcome(fits=False))
        search.record(4, Outcome(fits=True, phases=step.phases(4)))
        found = search.next()
        assert found == following if following else found is not None and found < failed


def test_of_another_limit_tensors_get_the_share_that_was_predicted() -> None:
    """What the allocator splits up is no memory to spare, and shrinks with the card."""
    step = Step(constant=0, slope=MIB, update=0)
    prior = Prior(tolerable=90, limit_bytes=100 * MIB, peaks=((1, MIB), (200, 200 * MIB)))
    for limit, guess in ((100, 90), (50, 45), (10, 9), (200, 180)):
        assert prior.corrected(4, step.peak(4), limit * MIB) == guess


@pytest.mark.parametrize(
    "numbers",
    [
        {"tolerable": -1},
        {"tolerable": 2, "limit_bytes": 0},
        {"tolerable": 2, "peaks": ((2, 5), (2, 5))},
        {"tolerable": 2, "peaks": ((4, 5), (2, 5))},
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a prior must be at least 0"):
        Prior(**numbers)
