"""A search on devices that are made up: flaky, shared, slow, spilling, lost."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.devices.base import MemoryDevice, MemoryReading
from autobatch.errors import DeviceLostError, DoesNotFitError, SearchTimeoutError
from autobatch.events import Event, SearchEnded, SearchStarted, TrialEnded, TrialStarted
from autobatch.results.memory import Breakdown
from autobatch.results.search import OtherProcess, SearchResult, Trial, Upper
from autobatch.results.verdict import Verdict
from autobatch.search.finder import BatchSizeFinder
from autobatch.search.options import SearchOptions

MIB = 2**20
LIMIT = 1000 * MIB
AN_EXAMPLE = 10 * MIB  # So 90 fit beside what is resident.
RESIDENT = 100 * MIB
FATAL = "CUDA error: an illegal memory access was encountered"


@dataclass
class Machine(MemoryDevice):
    """A device and a step on it: memory is a straight line, and ``happens`` may interfere.

    Attributes:
        is_exact: As a meter is, and no GPU.
        happens: Called with the sizes of each window that runs, and how many have run before.
    """

    is_exact: bool = False
    happens: Callable[[int, int], None] = lambda _size, _place: None
    limit_bytes: int = LIMIT
    outside_bytes: int = 0
    retries: int = 0
    seconds: float = 0.0  # What the clock shows.
    ran: list[int] = field(default_factory=list)
    peak_bytes: int = RESIDENT
    released: int = 0

    name = "a machine"
    counts_host = False
    torch_device = torch.device("cpu")

    def read(self) -> MemoryReading:
        return MemoryReading(
            total_bytes=2 * LIMIT,
            free_bytes=LIMIT,
            allocated_bytes=RESIDENT,
            reserved_bytes=RESIDENT,
            peak_bytes=self.peak_bytes,
            peak_reserved_bytes=self.peak_bytes,
            outside_bytes=self.outside_bytes,
            retries=self.retries,
        )

    @contextmanager
    def limited_to(self, limit_bytes: int) -> Iterator[None]:
        self.limit_bytes = limit_bytes
        yield

    def reset_peak(self) -> None:
        self.peak_bytes = RESIDENT

    def release_cached(self) -> None:
        self.released += 1

    def synchronize(self) -> None: ...

    def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:
        def window() -> None:
            self.ran.append(sizes[0])
            self.seconds += 0.01 * sizes[0]
            self.happens(sizes[0], len(self.ran) - 1)
            needed = RESIDENT + AN_EXAMPLE * sizes[0]
            self.peak_bytes = min(needed, self.limit_bytes)
            if needed > self.limit_bytes:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.00 MiB.")
            mark()
            self.peak_bytes = needed
            mark()

        return window

    def others(self) -> tuple[OtherProcess, ...]:
        return ()

    def verify(self, size: int, peak_bytes: int) -> str:  # noqa: ARG002  # The protocol's.
        return ""

    def clear(self) -> None: ...

    def finder(
        self,
        limit_bytes: Callable[[], int] = lambda: LIMIT,
        observer: Callable[[Event], None] = lambda _: None,
        **options: Any,
    ) -> BatchSizeFinder:
        return BatchSizeFinder(
            program=self,
            device=self,
            limit_bytes=limit_bytes,
            breakdown=lambda *_: Breakdown(parameter_bytes=RESIDENT),
            observer=observer,
            options=SearchOptions(**options),
        )

    def largest(self, ceiling: int = 1000, **options: Any) -> SearchResult:
        return search(self.finder(**options), ceiling)


def search(finder: BatchSizeFinder, ceiling: int = 1000) -> SearchResult:
    return finder.largest(
        range(1, ceiling + 1), windows=lambda size: (size, size), reason="ceiling"
    )


@pytest.fixture(name="machine")
def _machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose clock is the one that trials read."""
    made = Machine()
    monkeypatch.setattr(time, "perf_counter", lambda: made.seconds)
    monkeypatch.setattr(time, "monotonic", lambda: made.seconds)
    return made


def test_three_trials_and_no_failure_where_memory_is_a_straight_line() -> None:
    machine = Machine(is_exact=True)
    found = machine.largest()
    assert [trial.size for trial in found.trials] == [4, 90]
    assert all(trial.fits for trial in found.trials)
    assert (found.size, found.limited_by) == (90, "memory")
    assert found.upper == Upper(reason="extrapolated", size=91, bytes=RESIDENT + 91 * AN_EXAMPLE)
    assert machine.ran == [2, 4, 90]


def test_a_proof_by_failure_is_followed_by_the_size_once_more() -> None:
    found = Machine(is_exact=True).largest(confirm="failed")
    assert [(trial.size, trial.fits, trial.repeated) for trial in found.trials] == [
        (4, True, False),
        (90, True, False),
        (91, False, False),
        (90, True, True),
    ]


@dataclass(frozen=True)
class Guess:
    """As a prediction says it; the number need not be an ``int``."""

    tolerable: Any


@pytest.mark.parametrize(
    ("prior", "sizes"),
    [
        (90, [4, 90]),
        (torch.tensor(90), [4, 90]),
        (Guess(90), [4, 90]),
        (Guess(0), [4, 90]),
        (5, [4, 90]),
        (100, [4, 100, 90]),
        (10**6, [4, 256, 90]),
    ],
)
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_prior_is_tried_after_a_small_size(prior: Any, sizes: list[int], is_exact: bool) -> None:
    machine = Machine(is_exact=is_exact)
    found = machine.largest(prior=prior)
    assert [trial.size for trial in found.trials] == sizes
    assert (found.size, found.upper.reason) == (90, "extrapolated")
    assert machine.ran == [2, *sizes]


def test_on_a_real_device_the_last_failure_is_repeated_once() -> None:
    found = Machine().largest(confirm="failed")
    assert [(trial.size, trial.fits, trial.repeated) for trial in found.trials][2:] == [
        (91, False, False),
        (91, False, True),
        (90, True, True),
    ]
    assert found.upper == Upper(reason="ran out", size=91)
    assert "; 3 trials, 1 failed, 2 repeated)" in str(found)
    assert [line.endswith("again") for line in found.table().splitlines()[1:]] == [
        *(False, False, False),
        *(True, True),
    ]


def test_a_failure_that_was_another_s_does_not_end_the_search() -> None:
    """The first failure is above the limit by chance: at 60, once."""

    def fails_once(size: int, _: int) -> None:
        if size >= 60 and machine.ran.count(size) == 1 and not flaked:
            flaked.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.00 MiB.")

    flaked: list[int] = []
    machine = Machine(happens=fails_once)
    found = machine.largest()
    assert flaked, "nothing failed by chance"
    assert found.size == 90
    assert found.upper.size == 91


@settings(deadline=None, max_examples=200)
@given(
    chance=st.sampled_from([0.05, 0.3, 0.7]),
    seed=st.integers(0, 10**6),
    holes=st.frozensets(st.integers(1, 95), max_size=30),
    ceiling=st.integers(1, 200),
)
def test_whatever_fails_by_chance_what_is_returned_ran_when_last_tried(
    chance: float, seed: int, holes: frozenset[int], ceiling: int
) -> None:
    """USERS 1.1.9, 1.3.8, 1.3.13 and 7.3: flaky failures, and sizes that always fail in between."""
    dice = random.Random(seed)

    def fails(size: int, _: int) -> None:
        if size in holes or dice.random() < chance:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.00 MiB.")

    machine = Machine(happens=fails)
    try:
        found = machine.largest(ceiling)
    except DoesNotFitError:
        return
    # By place: two trials of a size that took equally long are equal.
    last = {trial.size: place for place, trial in enumerate(found.trials)}
    after = found.trials[last[found.size] :]
    assert all(trial.fits for trial in after), "it did not run once more after a failure"
    assert found.size <= min(ceiling, 90)
    assert found.size not in holes
    if found.upper.reason == "ran out":
        assert found.upper.size is not None
        assert not found.trials[last[found.upper.size]].fits


def test_a_size_that_runs_no_more_is_not_returned() -> None:
    """90 ran, then 91 did not, twice; and since then nothing above 80 does."""

    def fragmented(size: int, _: int) -> None:
        if 91 in machine.ran[:-1] and size > 80:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.00 MiB.")

    machine = Machine(happens=fragmented)
    found = machine.largest(confirm="failed")
    assert found.size == 80
    assert found.trials[-1].size == 80
    assert found.trials[-1].fits


def test_when_another_process_comes_the_limit_is_read_again() -> None:
    def comes(_size: int, place: int) -> None:
        if place == 2:
            machine.outside_bytes = 300 * MIB

    machine = Machine(happens=comes)
    found = search(machine.finder(limit_bytes=lambda: LIMIT - machine.outside_bytes))
    assert found.limit_bytes == LIMIT - 300 * MIB
    assert found.size == 60
    assert found.trials[-1].fits
    assert found.trials[-1].size == 60


def test_when_another_process_goes_more_is_found() -> None:
    def goes(_size: int, place: int) -> None:
        if place == 2:
            machine.outside_bytes = 0

    machine = Machine(happens=goes, outside_bytes=300 * MIB)
    found = search(machine.finder(limit_bytes=lambda: LIMIT - machine.outside_bytes))
    assert (found.size, found.limit_bytes) == (90, LIMIT)


def test_a_search_beside_restless_others_ends() -> None:
    def restless(_size: int, place: int) -> None:
        machine.outside_bytes = (place % 2) * 300 * MIB

    machine = Machine(happens=restless)
    found = search(machine.finder(limit_bytes=lambda: LIMIT - machine.outside_bytes))
    assert found.size in (60, 90)


def test_what_ran_because_the_cache_was_given_back_is_not_tolerable() -> None:
    def retries(size: int, _: int) -> None:
        machine.retries += size > 70

    machine = Machine(happens=retries)
    found = machine.largest()
    assert found.size == 70
    failed = [trial for trial in found.trials if not trial.fits]
    assert all(trial.failure is Verdict.OUT_OF_MEMORY for trial in failed)
    assert "released its cache 1 times" in failed[0].message
    assert found.limited_by == "memory"


def test_blocks_that_a_trial_leaves_are_in_nobody_s_way() -> None:
    """A size that makes room only because others ran before it would not do so in training."""

    class Caches(Machine):
        cached = 7  # Of whatever ran before the search.

        def release_cached(self) -> None:
            self.cached = 0

    def runs(size: int, _: int) -> None:
        machine.retries += machine.cached > 0
        machine.cached = size

    machine = Caches(happens=runs)
    found = machine.largest(confirm="failed")
    assert found.size == 90
    assert [trial.size for trial in found.trials if not trial.fits] == [91, 91]
    assert machine.cached == 0, "the search leaves blocks to nobody"
    assert machine.finder().try_window((8, 8)).fits
    assert machine.cached == 0


def test_a_size_at_which_speed_collapses_is_not_tolerable(machine: Machine) -> None:
    """Windows lends host memory to a GPU that is full: everything runs, a hundred times slower."""

    def spills(size: int, _: int) -> None:
        machine.seconds += size * (size > 50)

    machine.happens = spills
    found = machine.largest()
    assert (found.size, found.limited_by) == (50, "memory")
    assert any("keep some of the memory on the host" in trial.message for trial in found.trials)


def test_a_size_that_was_slow_once_is_tolerable(machine: Machine) -> None:
    def stutters(size: int, _: int) -> None:
        machine.seconds += 100 * (size == 90 and machine.ran.count(90) == 1)

    machine.happens = stutters
    found = machine.largest()
    assert found.size == 90
    assert machine.ran.count(90) == 2


def test_what_a_step_takes_whatever_its_size_is_no_collapse(machine: Machine) -> None:
    """90 ran before another process came; now 20 fit, and a step's constant 9 s weigh more."""

    def happens(size: int, _: int) -> None:
        machine.seconds += 9
        if size == 90:
            machine.outside_bytes = 700 * MIB

    machine.happens = happens
    found = search(machine.finder(lambda: LIMIT - machine.outside_bytes))
    assert found.size == 20
    assert not any("driver" in trial.message for trial in found.trials)


def test_a_meter_is_not_suspected_of_spilling(machine: Machine) -> None:
    machine.is_exact = True
    machine.happens = lambda size, _: setattr(machine, "seconds", machine.seconds + size * size)
    assert machine.largest().size == 90


def test_a_trial_that_takes_longer_than_its_timeout_is_not_tolerable(machine: Machine) -> None:
    found = machine.largest(timeout_seconds=0.5)
    assert (found.size, found.limited_by) == (50, "time")
    failed = [trial for trial in found.trials if not trial.fits]
    assert all(trial.failure is Verdict.TOO_SLOW for trial in failed)
    assert "timeout_seconds=0.5" in failed[0].message
    assert found.upper.reason == "ran out"
    assert not any(trial.repeated for trial in failed), "it will not be faster"


def test_what_happens_once_is_not_held_against_the_first_size(machine: Machine) -> None:
    """USERS 1.3.11: the first step of all loads kernels and compiles, whatever its size."""

    def warms_up(_: int, place: int) -> None:
        machine.seconds += 60 * (place == 0)

    machine.happens = warms_up
    found = machine.largest(timeout_seconds=5)
    assert found.size == 90
    assert all(trial.fits for trial in found.trials)


def test_a_search_whose_time_is_over_says_what_has_run(machine: Machine) -> None:
    machine.happens = lambda _size, _: setattr(machine, "seconds", machine.seconds + 1)
    with pytest.raises(
        SearchTimeoutError, match="budget_seconds=2: the largest size that ran is 4"
    ) as caught:
        machine.largest(budget_seconds=2)
    assert caught.value.size == 4


def test_what_earlier_processes_took_is_off_the_budget(machine: Machine) -> None:
    ran = Trial(size=4, fits=True, seconds=1.5)
    finder = replace(machine.finder(budget_seconds=1), history=(ran,))
    with pytest.raises(SearchTimeoutError, match="size that ran is 4"):
        search(finder)


def test_a_lost_device_ends_the_search_with_what_had_run() -> None:
    def dies(size: int, _: int) -> None:
        if size > 50:
            raise RuntimeError(FATAL)

    with pytest.raises(DeviceLostError, match="restart the process") as caught:
        Machine(happens=dies).largest()
    assert (caught.value.size, caught.value.tried) == (4, 90)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_failure_at_one_example_that_is_no_memory_is_no_ceiling() -> None:
    """USERS 1.2.11: BatchNorm refuses one example in training mode, and larger sizes run."""

    def normalises(size: int, _: int) -> None:
        if size == 1:
            raise ValueError("Expected more than 1 value per channel when training")

    machine = Machine(happens=normalises)
    assert machine.largest().size == 90
    assert 1 not in machine.ran


def test_the_text_of_what_may_be_memory_is_kept() -> None:
    """USERS 1.2.4 and 1.2.13: the original text, and no error object."""
    text = "CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate"

    def refuses(size: int, _: int) -> None:
        if size > 50:
            raise RuntimeError(text)

    found = Machine(happens=refuses).largest()
    assert found.size == 50
    assert {trial.message for trial in found.trials if not trial.fits} == {text}


def test_a_device_that_is_lost_in_the_first_step_is_said_to_be_lost() -> None:
    def dies(_size: int, _: int) -> None:
        raise RuntimeError(FATAL)

    with pytest.raises(DeviceLostError, match="restart the process") as caught:
        Machine(happens=dies).largest()
    assert (caught.value.size, caught.value.tried) == (0, 2)


def test_the_users_own_error_passes_through() -> None:
    def raises(size: int, _: int) -> None:
        if size > 50:
            raise IndexError("out of memory slots")

    with pytest.raises(IndexError, match="slots"):
        Machine(happens=raises).largest()


@pytest.mark.parametrize("fit", [0, 1])
def test_what_does_not_fit_alone_is_not_tried_with_another(fit: int) -> None:
    machine = Machine(is_exact=True)
    finder = machine.finder(limit_bytes=lambda: RESIDENT + fit * AN_EXAMPLE)
    if fit:
        found = search(finder)
        assert [(trial.size, trial.fits) for trial in found.trials] == [(2, False), (1, True)]
        assert found.upper == Upper(reason="ran out", size=2)
        return
    with pytest.raises(DoesNotFitError, match=r"a batch of 1 does not fit"):
        search(finder)
    assert machine.ran == [2, 1]


def test_the_observer_is_told_of_everything_in_order() -> None:
    events: list[Event] = []
    found = search(Machine().finder(observer=events.append))
    assert isinstance(events[0], SearchStarted)
    assert events[-1] == SearchEnded(search=found)
    for begun, ended in pairwise(events[1:-1]):
        if isinstance(begun, TrialStarted):
            assert isinstance(ended, TrialEnded)
            assert ended.trial.size == begun.size
    assert [event.trial for event in events if isinstance(event, TrialEnded)] == list(found.trials)


@pytest.mark.parametrize("multiple_of", [1, 8, 64])
def test_only_multiples_are_candidates(multiple_of: int) -> None:
    options = SearchOptions(multiple_of=multiple_of)
    candidates = options.candidates(100)
    assert list(candidates) == [size for size in range(1, 101) if size % multiple_of == 0]
    with pytest.raises(ValueError, match="no multiple of 128 is at most 100"):
        SearchOptions(multiple_of=128).candidates(100)


@pytest.mark.parametrize(
    ("option", "value", "kind", "words"),
    [
        ("confirm", "perhaps", ValueError, "confirm must be one of .*, got 'perhaps'"),
        ("multiple_of", 0, ValueError, "multiple_of must be at least 1, got 0"),
        ("multiple_of", 1.5, TypeError, "multiple_of must be an integer"),
        ("timeout_seconds", 0, ValueError, "timeout_seconds must be above 0, got 0"),
        ("timeout_seconds", float("nan"), ValueError, "timeout_seconds must be above 0, got nan"),
        ("budget_seconds", "1 min", TypeError, "budget_seconds must be a number .* '1 min'"),
        ("budget_seconds", True, TypeError, "budget_seconds must be a number"),
        ("prior", -1, ValueError, "prior must be at least 0, got -1"),
        ("prior", True, TypeError, "prior must be an integer, a Prediction or None, got True"),
        ("prior", "90", TypeError, "prior must be an integer, .* got '90'"),
        ("prior", 1.5, TypeError, "prior must be an integer, .* got 1.5"),
        ("prior", Guess(None), TypeError, r"prior must be .*, got Guess\(tolerable=None\)"),
        ("prior", Guess(-3), ValueError, "prior must be at least 0, got -3"),
    ],
)
def test_bad_options_are_refused(
    option: str, value: object, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        SearchOptions(**{option: value})  # type: ignore[arg-type]  # That is the test.


def test_on_an_exact_device_the_first_step_and_one_trial_make_a_line() -> None:
    """Of 400 MiB and 5 an example; a device that rounds also loads libraries in its first step."""

    class Large(Machine):
        def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:
            def window() -> None:
                self.ran.append(sizes[0])
                self.peak_bytes = RESIDENT + (400 + 5 * sizes[0]) * MIB
                if self.peak_bytes > self.limit_bytes:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                mark()
                mark()

            return window

    exact, rounded = Large(is_exact=True), Large(is_exact=False)
    largest = (LIMIT - RESIDENT) // MIB // 5 - 80
    assert exact.largest().size == rounded.largest().size == largest
    assert exact.ran == [2, 4, largest]
    assert rounded.ran[:2] == [2, 4]
    assert len(rounded.ran) > 3


@pytest.mark.parametrize("verdict", [Verdict.FATAL, Verdict.TOO_LARGE, Verdict.TOO_SLOW])
def test_what_kept_a_size_out_is_said_to_be_what_it_was(verdict: Verdict) -> None:
    """A process that has died is no proof that memory is short."""
    died = Trial(size=5, fits=False, failure=verdict, explained=False, seconds=1.0)
    ran = Trial(size=4, fits=True, seconds=1.0)
    finder = replace(Machine().finder(), history=(ran, died))
    found = search(finder, 5)
    expected = {Verdict.FATAL: "crash", Verdict.TOO_LARGE: "kernel", Verdict.TOO_SLOW: "time"}
    assert (found.size, found.limited_by) == (4, expected[verdict])
    assert f"limited by {expected[verdict]}" in str(found)


def test_an_error_of_the_model_says_where_it_was_seen() -> None:
    def fails(size: int, _: int) -> None:
        raise IndexError(f"Target {size} is out of bounds.")

    with pytest.raises(IndexError, match="out of bounds") as caught:
        Machine(happens=fails).largest()
    where = "raised in the first step of the search, on 2 examples of the data"
    assert caught.value.__notes__ == [where]
