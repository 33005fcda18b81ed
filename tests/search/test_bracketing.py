"""The search alone: integers, and readings that may say anything."""

import bisect
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.results.plan import useful_sizes
from autobatch.results.search import Phase, Upper
from autobatch.search.bracketing import BracketingSearch, Outcome
from autobatch.search.prior import as_prior

Attempt = Callable[[int], Outcome]
Hunt = Callable[..., tuple[int, Upper]]

AT_THE_CEILING = Upper(reason="ceiling")
FEW = 4  # Trials that readings may cost beyond plain bisection.
FAR = 64  # How many times what has run may be tried at once.
drawn = settings(deadline=None, max_examples=150, derandomize=True)


@dataclass
class Machine:
    """Runs sizes up to ``largest``, and says of its memory whatever ``phases`` makes up.

    Fails the test where a search tries anything that it must not.
    """

    candidates: Sequence[int]
    largest: int
    phases: Callable[[int], tuple[Phase, ...]] = lambda _: ()
    explained: bool = True
    tried: list[int] = field(default_factory=list)

    def attempt(self, size: int) -> Outcome:
        assert size in self.candidates, "no candidate"
        assert size not in self.tried, f"{size} was tried twice"
        assert size <= self.farthest(), f"{size} is too far beyond {self.tried}"
        self.tried.append(size)
        if size > self.largest:
            return Outcome(fits=False, explained=self.explained)
        return Outcome(fits=True, phases=self.phases(size))

    def farthest(self) -> int:
        """The last size that what has run is a measure of: at least the next candidate."""
        ran = max((size for size in self.tried if size <= self.largest), default=0)
        ran = max(ran, 1)  # One example is tried last, so the one after it may be first.
        following = bisect.bisect_right(self.candidates, ran)
        return max(FAR * ran, *self.candidates[following : following + 1], FEW)

    def failures(self) -> int:
        return sum(size > self.largest for size in self.tried)


def hunt(candidates: Sequence[int], attempt: Attempt, **options: Any) -> tuple[int, Upper]:
    """Try whatever the search asks for."""
    search = BracketingSearch(candidates, **options | {"prior": as_prior(options.get("prior"))})
    while (size := search.next()) is not None:
        search.record(size, attempt(size))
    return search.size, search.upper


def test_one_example_is_tried_only_when_all_others_have_failed() -> None:
    for candidates in (range(1, 40), useful_sizes(256), [1, 5]):
        machine = Machine(candidates, largest=0, explained=False)
        assert hunt(candidates, machine.attempt, limit_bytes=100)[0] == 0
        assert machine.tried.index(1) == len(machine.tried) - 1
        above = Machine(candidates, largest=candidates[1], explained=False)
        assert hunt(candidates, above.attempt, limit_bytes=100)[0] == candidates[1]
        assert 1 not in above.tried


def expected(machine: Machine) -> int:
    """The last candidate that runs, seen from above."""
    following = bisect.bisect_right(machine.candidates, machine.largest)
    return machine.candidates[following - 1] if following else 0


def check(machine: Machine, limit_bytes: int, search: Hunt = hunt, **options: Any) -> Upper:
    """Check the guarantees of a search."""
    candidates = machine.candidates
    found, upper = search(candidates, machine.attempt, limit_bytes=limit_bytes, **options)
    assert found == 0 or found in machine.tried, "what is returned did not run"
    assert found <= machine.largest, "what is returned failed"
    following = bisect.bisect_right(candidates, found)
    beyond = candidates[following : following + 1]
    if upper.reason == "extrapolated":
        assert upper.size == beyond[0]
        assert upper.bytes is not None, "nothing says what is too much"
        assert upper.bytes > limit_bytes
    else:
        assert found == expected(machine)
        assert upper == (Upper(reason="ran out", size=beyond[0]) if beyond else AT_THE_CEILING)
        assert set(beyond) <= set(machine.tried), "more was not tried"
    assert len(machine.tried) <= by_hand(candidates, expected(machine)) + FEW
    if isinstance(candidates, range):
        assert len(machine.tried) <= math.ceil(math.log2(len(candidates) + 1)) + 2 * FEW
    return upper


def by_hand(candidates: Sequence[int], largest: int) -> int:
    """Count the trials that doubling from the first candidate, and then bisecting, takes."""
    good, bad, place, trials = -1, len(candidates), 0, 0
    while bad - good > 1:
        trials += 1
        if candidates[place] <= largest:
            good = place
            twice = bisect.bisect_right(candidates, 2 * candidates[place]) - 1
            doubled = min(max(twice, place + 1), len(candidates) - 1)
        else:
            bad = place
        place = doubled if bad == len(candidates) else (good + bad) // 2
    return trials


@pytest.mark.parametrize(
    ("candidates", "largest", "trials"),
    [
        (range(1, 101), 0, 1),  # 1
        (range(1, 101), 1, 2),  # 1, 2
        (range(1, 101), 5, 6),  # 1, 2, 4, 8; 6, 5
        (range(1, 101), 99, 8 + 6),  # 1, 2, 4, 8, 16, 32, 64, 100; 82, 91, 95, 97, 98, 99
        (range(1, 101), 100, 8),
        (range(8, 101, 8), 24, 4),  # 8, 16, 32; 24
        ([1, 50, 1000], 50, 3),
    ],
)
def test_by_hand_is_counted_right(candidates: Sequence[int], largest: int, trials: int) -> None:
    assert by_hand(candidates, largest) == trials


def phase(peak_bytes: int, floor_bytes: int = 1000) -> tuple[Phase, ...]:
    return (Phase(floor_bytes=floor_bytes, peak_bytes=peak_bytes),)


def scrambled(size: int, salt: int, below: int) -> int:
    """A number that looks random and is always the same."""
    return (size * 2_654_435_761 + salt * 40_503) % 4_294_967_291 % below


READINGS: dict[str, Callable[[int, int], int]] = {
    "affine": lambda size, slope: 1000 + slope * size,
    "convex": lambda size, slope: 1000 + slope * size + size**2 // 7,
    "concave": lambda size, slope: 1000 + slope * math.isqrt(size),
    "stepped": lambda size, slope: -(-(1000 + slope * size) // 20_000) * 20_000,
    "noisy": lambda size, slope: (
        1000 + slope * size + scrambled(size, slope, 5 + slope * size // 9)
    ),
    "constant": lambda _, slope: slope,
    "falling": lambda size, slope: 10**9 - slope * size,
    "misleading": lambda size, slope: scrambled(size, slope, 10**9) - 5 * 10**8,
}

any_candidates = st.one_of(
    st.integers(1, 300).map(lambda last: range(1, last + 1)),
    st.integers(1, 10**6).map(lambda last: range(1, last + 1)),
    st.integers(1, 10**6).map(useful_sizes),
    st.tuples(st.integers(2, 64), st.integers(64, 10**6)).map(
        lambda pair: range(pair[0], pair[1] + 1, pair[0])
    ),
    st.tuples(st.integers(2, 64), st.integers(64, 10**6)).map(
        lambda pair: useful_sizes(pair[1], pair[0])
    ),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=40, unique=True).map(sorted),
)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    candidates = draw(any_candidates)
    # As likely a small size as a large one; 0 is none, and the last is all of them.
    top = candidates[-1]
    exact = st.integers(0, top)
    logarithmic = st.floats(0, 1).map(lambda part: int((top + 1) ** part) - 1)
    return Machine(candidates, largest=draw(st.one_of(exact, logarithmic)))


@drawn
@given(machine=machines(), explained=st.booleans(), limit_bytes=st.integers(-1, 10**12))
def test_without_readings_the_search_is_right(
    machine: Machine, explained: bool, limit_bytes: int
) -> None:
    machine.explained = explained
    check(machine, limit_bytes)


@drawn
@given(
    last=st.integers(1, 300),
    holes=st.frozensets(st.integers(1, 300), max_size=200),
    largest=st.integers(0, 300),
)
def test_where_sizes_fail_in_between_what_is_found_ran_and_the_next_one_failed(
    last: int, holes: frozenset[int], largest: int
) -> None:
    """USERS 1.3.8 and 7.3: cuDNN may need more at 3 examples than at 4."""
    tried: dict[int, bool] = {}

    def attempt(size: int) -> Outcome:
        tried[size] = size <= largest and size not in holes
        return Outcome(fits=tried[size])

    found, upper = hunt(range(1, last + 1), attempt, limit_bytes=100)
    assert found == 0 or tried[found]
    if found < last:
        assert (upper.reason, upper.size) == ("ran out", found + 1)
        assert not tried[found + 1]


@pytest.mark.parametrize("kind", READINGS)
@drawn
@given(
    machine=machines(),
    slope=st.integers(1, 10**6),
    explained=st.booleans(),
    above=st.one_of(st.just(0), st.integers(-(10**9), 10**9)),
)
def test_whatever_is_read_the_search_is_right(
    kind: str, machine: Machine, slope: int, explained: bool, above: int
) -> None:
    """The limit is what the largest size reads, or as far ``above`` it as readings may mislead."""

    def read(size: int) -> int:
        return READINGS[kind](size, slope)

    machine.phases = lambda size: phase(read(size))
    machine.explained = explained
    again = Machine(machine.candidates, machine.largest, machine.phases, explained)
    check(machine, read(machine.largest) + above)
    upper = check(again, read(machine.largest) + above, confirm="failed")
    assert upper.reason != "extrapolated"


@pytest.mark.parametrize("kind", READINGS)
@drawn
@given(
    machine=machines(),
    slope=st.integers(1, 10**6),
    preliminary=st.tuples(
        st.integers(1, 4), st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9)
    ),
)
def test_a_preliminary_reading_never_makes_the_search_wrong(
    kind: str, machine: Machine, slope: int, preliminary: tuple[int, int, int]
) -> None:
    """The first step of all may have read anything: it is believed nowhere."""

    def search(candidates: Sequence[int], attempt: Attempt, **options: Any) -> tuple[int, Upper]:
        one = BracketingSearch(candidates, **options)
        size, peak_bytes, floor_bytes = preliminary
        one.record_preliminary(size, phase(peak_bytes, floor_bytes))
        while (chosen := one.next()) is not None:
            one.record(chosen, attempt(chosen))
        return one.size, one.upper

    machine.phases = lambda size: phase(READINGS[kind](size, slope))
    check(machine, READINGS[kind](machine.largest, slope), search)


PRELIMINARY = (
    Phase(floor_bytes=100, peak_bytes=1100),  # 100 and 500 an example
    Phase(floor_bytes=300, peak_bytes=1300),
    Phase(floor_bytes=300, peak_bytes=900),  # Among them the state: 400.
)


def steady(size: int) -> tuple[Phase, ...]:
    """What is read once the state of ``PRELIMINARY``, at 2 examples, is there."""
    return (
        Phase(floor_bytes=500, peak_bytes=1100 + 200 * size),
        Phase(floor_bytes=700, peak_bytes=1300 + 200 * size),
        Phase(floor_bytes=700, peak_bytes=900),
    )


def test_a_first_step_and_one_trial_make_a_line() -> None:
    """Its state had yet to be made: at 2 examples 400 bytes less were read than there will be."""
    search = BracketingSearch(range(1, 10_001), limit_bytes=11_400)
    search.record_preliminary(2, PRELIMINARY)
    assert search.next() == 4
    search.record(4, Outcome(fits=True, phases=steady(4)))
    assert search.next() == 50
    search.record(50, Outcome(fits=True, phases=steady(50)))
    assert search.next() is None
    assert search.upper == Upper(reason="extrapolated", size=51, bytes=11_500)


def test_without_the_first_step_the_line_begins_at_what_the_phase_leaves_behind() -> None:
    """Gradients, 200 bytes here: at 4 examples 1400 of 2100 bytes seem to grow with them."""
    search = BracketingSearch(range(1, 10_001), limit_bytes=11_400)
    search.record(4, Outcome(fits=True, phases=steady(4)))
    assert search.next() == 4 + (11_400 - 2100) * 4 // 1400


def test_a_line_that_memory_did_not_follow_is_left() -> None:
    search = BracketingSearch(range(1, 10_001), limit_bytes=11_400)
    search.record_preliminary(2, PRELIMINARY)
    search.record(4, Outcome(fits=True, phases=steady(4)))
    search.record(50, Outcome(fits=False))
    assert search.next() == 30, "by the baselines, as if there were no preliminary reading"


def test_where_the_cautious_guess_is_nearly_as_far_it_is_taken() -> None:
    """Nothing but examples: the line through what still bends at 2 would go on to 65."""
    search = BracketingSearch(range(1, 10_001), limit_bytes=6000)
    search.record_preliminary(2, phase(260, floor_bytes=0))
    search.record(4, Outcome(fits=True, phases=phase(440, floor_bytes=40)))
    assert search.next() == 59


def test_where_memory_bends_far_out_what_cannot_fail_shows_where() -> None:
    """As of an MLP with Adam, whose gradients hide its activations: the middle was tried thrice."""

    def bent(size: int) -> tuple[Phase, ...]:
        return phase(max(20_000 + size, 10 * size), floor_bytes=0)

    machine = Machine(range(1, 20_001), 9000, bent)
    check(machine, limit_bytes=90_000)
    assert machine.tried == [4, 17, 1088, 20_000, 4643, 10_755, 9000]


def test_leaps_that_must_be_two_are_alike() -> None:
    """From 4 to 1024 it is 256 times: not 64 and then 4, for the first of them is no answer."""
    search = BracketingSearch(range(1, 10_001), limit_bytes=11_240)
    search.record_preliminary(2, phase(1020, floor_bytes=0))
    search.record(4, Outcome(fits=True, phases=phase(1040, floor_bytes=0)))
    assert search.next() == 4 * 16


@drawn
@given(largest=st.integers(4, 10**6), slope=st.integers(1, 10**6), spare=st.floats(0, 0.99))
def test_where_memory_is_a_straight_line_a_handful_of_trials_is_enough(
    largest: int, slope: int, spare: float
) -> None:
    machine = Machine(range(1, 2**20 + 1), largest, lambda size: phase(1000 + slope * size))
    check(machine, 1000 + slope * largest + int(spare * slope))
    assert len(machine.tried) <= 6
    assert machine.failures() == (largest == FEW)  # One size that ran makes no line.


def test_a_known_search_of_few_trials() -> None:
    """From 4 by the line to its floor, then by the line through two peaks: 97 would be too much."""
    machine = Machine(range(1, 10_001), 96, lambda size: phase(5000 + 100 * size, floor_bytes=500))
    upper = check(machine, 14_600)
    assert machine.tried == [4, 11, 96]
    assert upper == Upper(reason="extrapolated", size=97, bytes=14_700)


def test_a_proof_by_failure_tries_the_next_size_too() -> None:
    machine = Machine(range(1, 10_001), 96, lambda size: phase(5000 + 100 * size, floor_bytes=500))
    upper = check(machine, 14_600, confirm="failed")
    assert machine.tried == [4, 11, 96, 97]
    assert upper == Upper(reason="ran out", size=97)


def test_what_rounding_may_have_added_proves_nothing() -> None:
    """97 would be 14,700 bytes as read: 80 more than it may be, but rounding may be 100."""
    machine = Machine(range(1, 10_001), 96, lambda size: phase(5000 + 100 * size, floor_bytes=500))
    upper = check(machine, 14_620, slack_bytes=100)
    assert machine.tried[-1] == 97
    assert upper.reason == "ran out"


def test_the_undivided_batch_has_no_later_micro_batches() -> None:
    """Their phase leaves no room for 256, but 256 is one micro-batch, and is tried."""

    def phases(size: int) -> tuple[Phase, ...]:
        later = () if size == 256 else phase(2000 + 100 * size)
        return (*phase(1000 + 100 * size), *later, *phase(3000))

    candidates = useful_sizes(256)
    whole = Machine(candidates, 256, phases)
    assert check(whole, 26_700, undivided=256) == AT_THE_CEILING
    divided = Machine(candidates, 128, phases)
    assert check(divided, 26_700).reason == "extrapolated"


def test_saved_bytes_lower_the_bound() -> None:
    """Behind one of two micro-batches none is sent ahead; behind those of 3 and more there is."""

    def phases(size: int) -> tuple[Phase, ...]:
        ahead = 0 if 2 * size >= 256 else 50 * size
        return (*phase(1000 + 100 * size), *phase(2000 + 100 * size + ahead), *phase(3000))

    machine = Machine(useful_sizes(256), 128, phases)
    check(machine, 15_000, saved_bytes=lambda size: 50 * size if size >= 128 else 0)
    assert 128 in machine.tried
    blind = Machine(useful_sizes(256), 128, phases)
    check(blind, 15_000)
    assert 128 not in blind.tried, "no bytes were saved"


def test_a_reading_below_the_line_ends_its_use_as_a_proof() -> None:
    """Checkpointing in chunks of 64: a chunk more at once, and then nothing for a while."""

    def chunked(size: int) -> tuple[Phase, ...]:
        return phase(1000 + 10 * size + 5000 * -(-size // 64))

    machine = Machine(range(1, 10_001), 512, chunked)
    check(machine, chunked(512)[0].peak_bytes)
    assert 513 in machine.tried


@pytest.mark.parametrize("seed", range(3))
def test_curves_of_several_phases_take_four_trials_or_fewer(seed: int) -> None:
    """As those of real steps: each phase is constant, or grows with the size, or bends upwards."""
    numbers = random.Random(seed)
    trials, failures = [], []
    for _ in range(300):
        curves = [
            (numbers.randrange(10**9), numbers.randrange(10**5, 10**8), numbers.choice([0, 0, 7]))
            for _ in range(3)
        ]
        largest = int(2 ** numbers.uniform(0, 12))

        def phases(size: int, curves: list[tuple[int, int, int]] = curves) -> tuple[Phase, ...]:
            return tuple(
                Phase(floor_bytes=c // 2, peak_bytes=c + slope * size + bend * size**2)
                for c, slope, bend in curves
            )

        limit_bytes = max(one.peak_bytes for one in phases(largest))
        machine = Machine(range(1, 10_001), largest, phases)
        check(machine, limit_bytes)
        assert largest in machine.tried, "less was found than there is"
        trials.append(len(machine.tried))
        failures.append(machine.failures())
    assert statistics.median(trials) <= 4
    assert statistics.median(failures) == 0
    assert statistics.fmean(failures) <= 0.5


@drawn
@given(
    machine=machines(),
    lines=st.lists(
        st.tuples(st.integers(0, 10**9), st.integers(10**5, 10**8)), min_size=1, max_size=3
    ),
    prior=st.integers(0, 2 * 10**6) | st.integers(0, 400) | st.integers(0, 1),
    error=st.none() | st.floats(0.8, 1.2) | st.sampled_from([0.001, 0.1, 0.5, 2.0, 10.0, 1000.0]),
    confirm=st.sampled_from(["extrapolated", "failed"]),
    slack_bytes=st.sampled_from([0, 2**21]),
    explained=st.booleans(),
)
def test_a_prior_right_or_wrong_costs_at_most_two_trials(
    machine: Machine,
    lines: list[tuple[int, int]],
    prior: int,
    error: float | None,
    confirm: str,
    slack_bytes: int,
    explained: bool,
) -> None:
    """Drawn from anywhere, or near the answer. The largest of some lines is a convex curve."""

    def phases(size: int) -> tuple[Phase, ...]:
        return tuple(Phase(floor_bytes=c // 2, peak_bytes=c + slope * size) for c, slope in lines)

    machine.phases, machine.explained = phases, explained
    limit_bytes = max(one.peak_bytes for one in phases(machine.largest))
    if error is not None:
        prior = int(error * machine.largest)
    guided = Machine(machine.candidates, machine.largest, phases, explained)
    options: dict[str, Any] = {"confirm": confirm, "slack_bytes": slack_bytes}
    without = hunt(machine.candidates, machine.attempt, limit_bytes=limit_bytes, **options)
    found = hunt(guided.candidates, guided.attempt, limit_bytes=limit_bytes, prior=prior, **options)
    assert found[0] == without[0] == expected(machine)
    assert len(guided.tried) <= len(machine.tried) + 2


@pytest.mark.parametrize("kind", READINGS)
@drawn
@given(machine=machines(), slope=st.integers(1, 10**6), prior=st.integers(0, 2 * 10**6))
def test_whatever_is_read_a_search_with_a_prior_is_right(
    kind: str, machine: Machine, slope: int, prior: int
) -> None:
    machine.phases = lambda size: phase(READINGS[kind](size, slope))
    check(machine, READINGS[kind](machine.largest, slope), prior=prior)
    again = Machine(machine.candidates, machine.largest, machine.phases)
    check(again, READINGS[kind](machine.largest, slope), prior=prior, confirm="failed")


@pytest.mark.parametrize(
    ("prior", "tried"),
    [
        (None, [4, 11, 96]),
        (96, [4, 96]),
        (80, [4, 80, 96]),
        (120, [4, 120, 11, 96]),
        (97, [4, 97, 11, 96]),
        (5, [4, 11, 96]),  # What 4 read leaves room for 11.
        (0, [4, 11, 96]),
        (10**9, [4, 256, 11, 96]),
    ],
)
def test_a_known_search_with_a_prior(prior: int | None, tried: list[int]) -> None:
    """The first is what there is without one."""
    machine = Machine(range(1, 10_001), 96, lambda size: phase(5000 + 100 * size, floor_bytes=500))
    upper = check(machine, 14_600, prior=prior)
    assert machine.tried == tried
    following = Upper(reason="extrapolated", size=97, bytes=14_700)
    assert upper == (Upper(reason="ran out", size=97) if prior == 97 else following)


def test_a_prior_above_the_ceiling_is_the_ceiling() -> None:
    machine = Machine(range(1, 65), 64, lambda size: phase(5000 + 100 * size, floor_bytes=500))
    assert check(machine, 14_600, prior=1000) == AT_THE_CEILING
    assert machine.tried == [4, 64]


def test_where_nothing_is_read_a_prior_is_tried_before_the_sizes_double() -> None:
    machine = Machine(range(1, 1025), 20)
    check(machine, limit_bytes=10**9, prior=20)
    assert machine.tried == [4, 20, 40, 26, 22, 21]


def test_a_size_that_is_tried_again_has_its_last_word() -> None:
    search = BracketingSearch(range(1, 101), limit_bytes=100)
    for size, fits in ((4, True), (8, False), (6, True), (7, False)):
        search.record(size, Outcome(fits=fits))
    assert (search.size, search.next()) == (6, None)
    search.record(7, Outcome(fits=True))
    assert (search.size, search.next()) == (7, None)
    search.record(8, Outcome(fits=True))
    assert search.size == 8
    assert search.next() is not None
    search.record(8, Outcome(fits=False))
    search.record(7, Outcome(fits=False))
    assert (search.size, search.next(), search.upper.size) == (6, None, 7)


def test_a_limit_that_moves_reopens_what_was_excluded() -> None:
    search = BracketingSearch(range(1, 1001), limit_bytes=1000)
    for size in (4, 90, 100):
        search.record(size, Outcome(fits=True, phases=phase(10 * size, floor_bytes=0)))
    assert search.next() is None
    search.change_limit(2000)
    assert search.next() == 200


@pytest.mark.parametrize("limit_bytes", [1_500, 4_000, 9_990, 20_000])
def test_under_another_limit_the_answer_is_as_near_as_under_the_first(limit_bytes: int) -> None:
    """A bisection leaves trials on all sides: walking through them would take dozens more."""

    def run(search: BracketingSearch, limit_bytes: int) -> list[int]:
        tried: list[int] = []
        while (size := search.next()) is not None:
            tried.append(size)
            fits = 10 * size <= limit_bytes
            reading = phase(10 * size, floor_bytes=0) if fits else ()
            search.record(size, Outcome(fits=fits, phases=reading, explained=False))
        return tried

    search = BracketingSearch(range(1, 5001), limit_bytes=10_000)
    run(search, 10_000)
    search.change_limit(limit_bytes)
    tried = run(search, limit_bytes)
    assert search.size == limit_bytes // 10
    assert len(tried) == len(set(tried)) <= 13 + FEW


def test_without_readings_the_sizes_double_at_first() -> None:
    machine = Machine(range(1, 1025), 20)
    check(machine, limit_bytes=10**9)
    assert machine.tried[:4] == [4, 8, 16, 32]


def test_a_failure_that_the_readings_do_not_explain_ends_the_trust_in_them() -> None:
    """Doubted, a third of the way is tried, until they say themselves that 800 is too much."""

    def bent(size: int) -> tuple[Phase, ...]:
        return phase(1000 + size + max(size - 256, 0))

    trusted = Machine(range(1, 1025), 600, bent)
    check(trusted, limit_bytes=1800)
    assert trusted.tried == [4, 256, 800, (256 + 800) // 2]
    doubted = Machine(range(1, 1025), 600, bent, explained=False)
    check(doubted, limit_bytes=1800)
    assert doubted.tried[:5] == [4, 256, 800, 256 + (800 - 256) // 3, 528]
    walled = Machine(range(1, 1025), 600, lambda size: phase(1000 + size), explained=False)
    check(walled, limit_bytes=10**9)
    assert walled.tried[:5] == [4, 256, 1024, 256 + (1024 - 256) // 3, 512 + (1024 - 512) // 3]


def test_host_memory_is_not_asked_for_a_million_examples_after_a_hundred_ran() -> None:
    """Readings that creep up use the spare trials, and what is left would be plain bisection."""
    machine = Machine(range(1, 2**20 + 1), 300, lambda size: phase(1000 + size // 13 * 13))
    check(machine, limit_bytes=1000 + 301)
    assert max(machine.tried) <= FAR * 300
    assert machine.failures() > 0


@pytest.mark.parametrize(
    "candidates", [range(1, 2), range(1, 1001), (8, 16, 24), useful_sizes(256)]
)
@pytest.mark.parametrize("phases", [lambda _: (), lambda size: phase(size)])
def test_nothing_that_fits_is_zero_and_all_that_fits_is_the_last(
    candidates: Sequence[int], phases: Callable[[int], tuple[Phase, ...]]
) -> None:
    none = Machine(candidates, largest=0, phases=phases)
    check(none, limit_bytes=100)
    assert expected(none) == 0
    everything = Machine(candidates, largest=candidates[-1], phases=phases)
    check(everything, limit_bytes=10**9)
    assert expected(everything) == candidates[-1]


def test_errors_of_an_attempt_pass_through() -> None:
    def attempt(_: int) -> Outcome:
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="own"):
        hunt(range(1, 9), attempt, limit_bytes=1)


# Searches that are wrong, each in its own way: the check must see it.


def believing(
    candidates: Sequence[int], attempt: Attempt, *, limit_bytes: int
) -> tuple[int, Upper]:
    """Returns what the line predicts, untried."""
    peak_bytes = attempt(4).phases[0].peak_bytes
    found = candidates[bisect.bisect_right(candidates, 4 * limit_bytes // peak_bytes) - 1]
    return found, Upper(reason="ran out", size=found + 1)


def doubling(
    candidates: Sequence[int],  # noqa: ARG001
    attempt: Attempt,
    *,
    limit_bytes: int,  # noqa: ARG001
) -> tuple[int, Upper]:
    """Returns a size that ran, but others do too."""
    size = 1
    while attempt(2 * size).fits:
        size *= 2
    return size, AT_THE_CEILING


def counting(
    candidates: Sequence[int],
    attempt: Attempt,
    *,
    limit_bytes: int,  # noqa: ARG001
) -> tuple[int, Upper]:
    """Is right in the end."""
    found = max(size for size in candidates if attempt(size).fits)
    return found, Upper(reason="ran out", size=found + 1)


def halving(
    candidates: Sequence[int],
    attempt: Attempt,
    *,
    limit_bytes: int,  # noqa: ARG001
) -> tuple[int, Upper]:
    """Begins in the middle."""
    attempt(candidates[len(candidates) // 2])
    return 0, AT_THE_CEILING


def forgetful(
    candidates: Sequence[int],  # noqa: ARG001
    attempt: Attempt,
    *,
    limit_bytes: int,  # noqa: ARG001
) -> tuple[int, Upper]:
    return max(size for size in (4, 4) if attempt(size).fits), AT_THE_CEILING


def presuming(
    candidates: Sequence[int], attempt: Attempt, *, limit_bytes: int
) -> tuple[int, Upper]:
    """Says that the next size is too large, and is not."""
    attempt(4)
    return 4, Upper(reason="extrapolated", size=candidates[4], bytes=limit_bytes)


@pytest.mark.parametrize(
    ("search", "complaint"),
    [
        (believing, "did not run"),
        (doubling, "assert 64 == 100"),
        (counting, "assert 1000 <= "),
        (halving, "too far beyond"),
        (forgetful, "tried twice"),
        (presuming, "assert 1000 > 1000"),
    ],
)
def test_the_check_can_fail(search: Hunt, complaint: str) -> None:
    machine = Machine(range(1, 1001), 100, lambda size: phase(10 * size))
    with pytest.raises(AssertionError, match=complaint):
        check(machine, limit_bytes=1000, search=search)
    check(Machine(range(1, 1001), 100, machine.phases), limit_bytes=1000)
