import math
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from autobatch import errors
from autobatch.errors import (
    AutobatchError,
    CheckpointError,
    DeviceLostError,
    DeviceUnavailableError,
    DoesNotFitError,
    InexactStepError,
    NonFiniteLossError,
    ProcessDiedError,
    ReplayLimitError,
    SearchTimeoutError,
    StepInterruptedError,
)
from autobatch.results.memory import Breakdown
from autobatch.results.plan import BatchPlan
from autobatch.results.remedies import what_would_help
from autobatch.results.search import LimitedBy, SearchResult, Trial, Upper, trial_row
from autobatch.results.training import StepResult, TrainingResult
from autobatch.results.verdict import Verdict

PASSED = Trial(size=86, fits=True, peak_bytes=240 * 2**20, seconds=1.26)
FAILED = Trial(
    size=128, fits=False, failure=Verdict.OUT_OF_MEMORY, seconds=0.5, message="CUDA out of memory"
)
SEARCH = SearchResult(
    size=86,
    trials=(FAILED, PASSED),
    ceiling=256,
    limit_bytes=256 * 2**20,
    limited_by="memory",
    upper=Upper(reason="ran out", size=128),
)
STEP = StepResult(loss=0.5, terms=256.0, examples=256, micro_batch_sizes=(86, 85, 85))
TRAINING = TrainingResult(
    plan=BatchPlan(desired=256, tolerable=86),
    search=SEARCH,
    losses=(2.0, 1.0, 0.5, 0.25),
    epochs=2,
    examples=1000,
    seconds=2.0,
    replays=1,
    notes=("the data holds fewer", "a window was run again"),
)
ERRORS = [
    AutobatchError("something"),
    DeviceUnavailableError("no such device"),
    DoesNotFitError(1, 2**30, Breakdown(parameter_bytes=2**31, missing_bytes=2**30), "too much"),
    DoesNotFitError(1, None),
    DeviceLostError(8, 16, "CUDA error: an illegal memory access was encountered"),
    ProcessDiedError("killed by signal 9", 8),
    SearchTimeoutError(8, 1.5),
    InexactStepError("splitting changes it"),
    StepInterruptedError("half done"),
    StepInterruptedError("half done", "runs/step-00000012.pt"),
    CheckpointError("torn"),
    NonFiniteLossError(7, math.inf, 32.0, 2, 4),
    NonFiniteLossError(7, 0.5, 32.0, None, 4),
    ReplayLimitError(
        "(float32[8, 3])",
        [{"micro_batch": 8, "allocated": 2**20, "reserved": 2**21, "free": 2**22}],
        "out of memory",
    ),
]


@pytest.mark.parametrize("value", [PASSED, SEARCH, SEARCH.upper, STEP, TRAINING], ids=repr)
def test_results_are_values(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    assert hash(value) == hash(pickle.loads(pickle.dumps(value)))
    first = type(value).__dataclass_fields__  # type: ignore[attr-defined]  # All are dataclasses.
    for name in first:
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)
    with pytest.raises((TypeError, AttributeError, FrozenInstanceError)):
        value.extra = 1  # type: ignore[attr-defined]  # Refusing it is the test.


def test_the_table_has_a_row_for_each_trial_with_its_share_of_the_limit() -> None:
    assert SEARCH.table().splitlines() == [
        "   size   verdict                peak   of limit   seconds",
        "    128   out of memory             -          -       0.5",
        "     86   fits              240.0 MiB      93.8%       1.3",
    ]


def test_a_trial_says_whether_it_fits() -> None:
    assert PASSED
    assert not FAILED
    assert str(PASSED) == "86: fits, peak 240.0 MiB, 1.3 s"
    assert str(FAILED) == "128: out of memory, 0.5 s"


@pytest.mark.parametrize("verdict", Verdict)
def test_a_failed_trial_prints_its_verdict(verdict: Verdict) -> None:
    assert verdict.value in str(replace(FAILED, failure=verdict))


def test_a_search_result_is_usable_as_an_integer() -> None:
    assert int(SEARCH) == 86
    assert list(range(100))[SEARCH] == 86
    assert len(range(0, 256, SEARCH)) == 3
    assert int(replace(SEARCH, size=5)) == 5


def test_a_search_result_reads_as_a_sentence() -> None:
    assert str(SEARCH) == (
        "tolerable batch 86 (limited by memory, 128 failed, peak 240.0 MiB of 256.0 MiB; "
        "2 trials, 1 failed)"
    )
    unmeasured = replace(SEARCH, trials=(replace(PASSED, peak_bytes=None),), limited_by="ceiling")
    assert str(replace(unmeasured, upper=Upper(reason="ceiling"))) == (
        "tolerable batch 86 (limited by ceiling, at the ceiling of 256.0 MiB; 1 trial, 0 failed)"
    )


@pytest.mark.parametrize("limited_by", ["kernel", "time"])
def test_a_limit_that_is_not_memorys_says_what_is_unused(limited_by: LimitedBy) -> None:
    """USERS 1.2.6."""
    breakdown = Breakdown(activation_bytes=2**30, free_bytes=9 * 2**30)
    limited = replace(SEARCH, limited_by=limited_by, breakdown=breakdown)
    words = f"limited by {limited_by} and not by memory: 9.0 GiB unused, 128 failed"
    assert words in str(limited)
    assert "unused" not in str(replace(limited, limited_by="memory"))
    assert "unused" not in str(replace(limited, breakdown=None))


def test_the_peak_of_a_search_is_that_of_the_last_trial_that_ran_at_its_size() -> None:
    assert SEARCH.peak_bytes == 240 * 2**20
    again = replace(PASSED, peak_bytes=7)
    smaller = replace(PASSED, size=85, peak_bytes=9)
    assert replace(SEARCH, trials=(PASSED, again, smaller)).peak_bytes == 7
    assert replace(SEARCH, trials=(replace(again, fits=False), smaller)).peak_bytes is None
    assert replace(SEARCH, trials=()).peak_bytes is None


def test_a_training_counts_its_steps_and_its_speed() -> None:
    assert TRAINING.steps == 4
    assert TRAINING.examples_per_second == 500.0
    assert replace(TRAINING, seconds=0.0).examples_per_second == 0.0
    assert replace(TRAINING, losses=()).steps == 0


def test_a_training_prints_its_plan_its_losses_and_its_notes() -> None:
    assert str(TRAINING).splitlines() == [
        "256 = 86 + 85 + 85: 3 accumulation steps, tolerable batch 86",
        "4 steps in 2 epochs, loss 2.0000 to 0.2500",
        "1000 examples in 2.0 s (500 per second), 1 replays",
        "note: the data holds fewer",
        "note: a window was run again",
    ]
    untrained = replace(TRAINING, losses=(), notes=())
    assert str(untrained).splitlines()[1:2] == ["0 steps in 2 epochs, no loss"]


def test_the_last_loss_printed_is_the_mean_of_the_last_tenth() -> None:
    losses = (9.0, *[3.0] * 17, 1.0, 2.0)
    assert "loss 9.0000 to 1.5000" in str(replace(TRAINING, losses=losses))


def test_a_step_is_whole_unless_it_says_otherwise() -> None:
    assert (STEP.replays, STEP.skipped) == (0, False)
    skipped = replace(STEP, loss=math.nan, skipped=True)
    assert skipped.skipped


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_the_way_to_another_process(error: AutobatchError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_error_has_one_root_and_stands_in_the_tree() -> None:
    own = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert all(issubclass(kind, AutobatchError) for kind in own.values())
    assert errors.__doc__ is not None
    assert [name for name in own if name not in errors.__doc__] == []
    assert {type(error) for error in ERRORS} == set(own.values())


def test_what_does_not_fit_is_told_with_the_numbers_and_the_ways_out() -> None:
    breakdown = Breakdown(
        parameter_bytes=3 * 2**29,
        gradient_bytes=3 * 2**29,
        optimizer_state_bytes=3 * 2**30,
        missing_bytes=4 * 2**30,
    )
    error = DoesNotFitError(1, 2**31, breakdown, "tried to allocate")
    assert str(error).splitlines() == [
        "a batch of 1 does not fit in 2.0 GiB: it needs at least 4.0 GiB more; the last failure "
        "said: tried to allocate",
        "  parameters             1.5 GiB",
        "  gradients              1.5 GiB",
        "  optimizer state        3.0 GiB",
        "  at least               6.0 GiB",
        "  available              2.0 GiB",
        "  missing, at least      4.0 GiB",
        "What would help:",
        "  freezing parameters before the optimizer is made: frees gradients and "
        "optimizer state, which take at least 4.5 GiB",
        "  SGD without momentum as the optimizer: frees at least 3.0 GiB of optimizer state",
        "  SGD with momentum as the optimizer: frees at least 1.5 GiB of optimizer state",
        "  a larger memory_limit or device: at least 6.0 GiB in all",
    ]
    assert (error.size, error.limit_bytes, error.breakdown) == (1, 2**31, breakdown)
    assert error.breakdown_bytes["optimizer state"] == 3 * 2**30
    assert error.remedies == what_would_help(breakdown)


def test_what_does_not_fit_for_unknown_reasons_still_names_ways_out() -> None:
    error = DoesNotFitError(3, None)
    assert str(error).startswith("a batch of 3 does not fit here; raise the limit")
    held = "a batch of 3 does not fit because the memory in use exceeds the limit by 97.0 MiB"
    assert str(DoesNotFitError(3, -97 * 2**20)).startswith(held)
    assert (error.breakdown_bytes, error.remedies) == ({}, ())


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        (13 << 20, "128 would need at least 13.0 MiB"),
        ((12 << 20) + 1300, "128 would need at least 1.3 KiB more than the limit"),
        (12 << 20, "128 would need at least 12.0 MiB"),
    ],
)
def test_what_rounding_would_hide_is_said_as_a_difference(needed: int, said: str) -> None:
    upper = Upper(reason="extrapolated", size=128, bytes=needed)
    assert upper.under(12 << 20) == said
    assert said in str(replace(SEARCH, upper=upper, limit_bytes=12 << 20))


def test_a_little_of_a_limit_is_not_nothing() -> None:
    shares = [trial_row(replace(PASSED, peak_bytes=n), 10**6).split()[4] for n in (0, 1, 600)]
    assert shares == ["0.0%", "<0.1%", "0.1%"]
