"""The search alone: integers, and readings that may say anything."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.plan import useful_sizes
from autobatch.probing.search import Outcome, Phase, largest_fitting

Attempt = Callable[[int], Outcome]
Search = Callable[..., int]

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


def test_one_example_is_tried_only_when_all_others_have_failed() -> None:
    for candidates in (range(1, 40), useful_sizes(256), [1, 5]):
        machine = Machine(candidates, largest=0, explained=False)
        assert largest_fitting(candidates, machine.attempt, limit_bytes=100) == 0
        assert machine.tried.index(1) == len(machine.tried) - 1
        above = Machine(candidates, largest=candidates[1], explained=False)
        assert largest_fitting(candidates, above.attempt, limit_bytes=100) == candidates[1]
        assert 1 not in above.tried


def expected(machine: Machine) -> int:
    """The last candidate that runs, seen from above."""
    following = bisect.bisect_right(machine.candidates, machine.largest)
    return machine.candidates[following - 1] if following else 0


def check(machine: Machine, limit_bytes: int, search: Search = largest_fitting) -> None:
    """Hold a search to what it promises."""
    candidates = machine.candidates
    found = search(candidates, machine.attempt, limit_bytes=limit_bytes)
    assert found == expected(machine)
    assert found == 0 or found in machine.tried, "what is returned did not run"
    following = bisect.bisect_right(candidates, found)
    assert set(candidates[following : following + 1]) <= set(machine.tried), "more was not tried"
    bisection = math.ceil(math.log2(len(candidates) + 1))
    assert len(machine.tried) <= bisection + FEW + leaps(candidates)


def leaps(candidates: Sequence[int]) -> int:
    """How often a leap of 64 can run between the first size and the last."""
    if isinstance(candidates, range):
        return math.floor(math.log2(max(candidates[-1] / FEW, 1)) / math.log2(FAR))
    # A leap to a candidate falls short of 64, but the next one makes up for it.
    return math.ceil(2 * math.log2(candidates[-1] / candidates[0]) / math.log2(FAR))


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
    check(machine, read(machine.largest) + above)


@drawn
@given(largest=st.integers(4, 10**6), slope=st.integers(1, 10**6), spare=st.floats(0, 0.99))
def test_where_memory_is_a_straight_line_a_handful_of_trials_is_enough(
    largest: int, slope: int, spare: float
) -> None:
    machine = Machine(range(1, 2**20 + 1), largest, lambda size: phase(1000 + slope * size))
    check(machine, 1000 + slope * largest + int(spare * slope))
    assert len(machine.tried) <= 7
    assert machine.failures() <= 1


def test_a_known_search_of_few_trials() -> None:
    """From 4 by the line to its floor, then by the line through two peaks, then the next one."""
    machine = Machine(range(1, 10_001), 96, lambda size: phase(5000 + 100 * size, floor_bytes=500))
    assert largest_fitting(machine.candidates, machine.attempt, limit_bytes=14_600) == 96
    assert machine.tried == [4, 11, 96, 97]


def test_several_phases_are_read_by_their_lowest_floor_and_their_highest_peak() -> None:
    def phases(size: int) -> tuple[Phase, ...]:
        return (*phase(900 + size, floor_bytes=800), *phase(5000 + 100 * size, floor_bytes=500))

    machine = Machine(range(1, 10_001), 96, phases)
    assert largest_fitting(machine.candidates, machine.attempt, limit_bytes=14_600) == 96
    assert machine.tried == [4, 11, 96, 97]


def test_without_readings_the_sizes_double_at_first() -> None:
    machine = Machine(range(1, 1025), 20)
    check(machine, limit_bytes=10**9)
    assert machine.tried[:4] == [4, 8, 16, 32]


def test_a_failure_that_the_readings_do_not_explain_ends_the_trust_in_them() -> None:
    """From the bend on they say that 528 is the last. Doubted, the geometric mean is tried."""

    def bent(size: int) -> tuple[Phase, ...]:
        return phase(1000 + size + max(size - 256, 0))

    trusted = Machine(range(1, 1025), 600, bent)
    check(trusted, limit_bytes=1800)
    assert trusted.tried[:5] == [4, 256, 800, (256 + 800) // 2, 529]
    doubted = Machine(range(1, 1025), 600, bent, explained=False)
    check(doubted, limit_bytes=1800)
    assert doubted.tried[:5] == [4, 256, 800, math.isqrt(256 * 800), math.isqrt(452 * 800)]


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
        largest_fitting(range(1, 9), attempt, limit_bytes=1)


def test_an_outcome_has_the_peak_of_its_highest_phase() -> None:
    assert Outcome(fits=True).peak_bytes is None
    assert Outcome(fits=True, phases=(*phase(7), *phase(9), *phase(8))).peak_bytes == 9


# Searches that are wrong, each in its own way: the check must see it.


def believing(candidates: Sequence[int], attempt: Attempt, *, limit_bytes: int) -> int:
    """Returns what the line promises, untried."""
    peak_bytes = attempt(4).peak_bytes or 0
    return candidates[bisect.bisect_right(candidates, 4 * limit_bytes // peak_bytes) - 1]


def doubling(candidates: Sequence[int], attempt: Attempt, *, limit_bytes: int) -> int:  # noqa: ARG001
    """Returns a size that ran, but others do too."""
    size = 1
    while attempt(2 * size).fits:
        size *= 2
    return size


def counting(candidates: Sequence[int], attempt: Attempt, *, limit_bytes: int) -> int:  # noqa: ARG001
    """Is right in the end."""
    return max(size for size in candidates if attempt(size).fits)


def halving(candidates: Sequence[int], attempt: Attempt, *, limit_bytes: int) -> int:  # noqa: ARG001
    """Begins in the middle."""
    attempt(candidates[len(candidates) // 2])
    return 0


def forgetful(candidates: Sequence[int], attempt: Attempt, *, limit_bytes: int) -> int:  # noqa: ARG001
    return max(size for size in (4, 4) if attempt(size).fits)


@pytest.mark.parametrize(
    ("search", "complaint"),
    [
        (believing, "did not run"),
        (doubling, "assert 64 == 100"),
        (counting, "assert 1000 <= "),
        (halving, "too far beyond"),
        (forgetful, "tried twice"),
    ],
)
def test_the_check_can_fail(search: Search, complaint: str) -> None:
    machine = Machine(range(1, 1001), 100, lambda size: phase(10 * size))
    with pytest.raises(AssertionError, match=complaint):
        check(machine, limit_bytes=1000, search=search)
    check(Machine(range(1, 1001), 100, machine.phases), limit_bytes=1000)
