"""An out-of-memory error in the middle of training costs a retry, never an example."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, assert_same_parameters, small_model, twin, undivided_steps
from states import fingerprint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch import (
    Accumulator,
    DoesNotFitError,
    ReplayLimitError,
    StepInterruptedError,
    StepResult,
    find_and_train,
)
from autobatch.devices.cpu import CpuDevice
from autobatch.results.plan import BatchPlan
from autobatch.training.engine import oom_retry
from autobatch.training.engine.micro_batch_size import (
    LONGEST_PATIENCE,
    PATIENCE,
    MicroBatchSize,
    smaller_size,
)
from autobatch.training.engine.optimizer_step import OptimizerStep

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def windows(count: int = 3, examples: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * examples, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (count * examples,), generator=generator)
    return list(zip(x.split(examples), y.split(examples), strict=True))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


class Fails(TorchDispatchMode):
    """Runs out of memory at the given operations, counted from 1."""

    def __init__(self, *at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at = at
        self.operations = 0
        self.enabled = True

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self,
        func,
        types,
        args=(),
        kwargs=None,
    ):
        self.operations += self.enabled
        if self.enabled and self.operations in self.at:
            raise OUT_OF_MEMORY.with_traceback(None)
        return func(*args, **(kwargs or {}))


class Flaky(nn.Module):
    """Runs out of memory in chosen forward calls, or above a size, after BatchNorm and dropout."""

    def __init__(self, calls: tuple[int, ...] = (), above: int = 10**9) -> None:
        super().__init__()
        self.inner = small_model()
        self.calls = calls
        self.above = above

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        if CALLS[0] in self.calls or len(x) > self.above:
            raise OUT_OF_MEMORY.with_traceback(None)
        scores: Tensor = self.inner(x)
        return scores


CALLS = [0]


@pytest.fixture(autouse=True)
def _count_calls_anew() -> None:
    CALLS[0] = 0


def run(
    model: nn.Module, micro_batch: int | None, batches: list[tuple[Tensor, Tensor]]
) -> list[StepResult]:
    accumulator = Accumulator(model, adam(model), micro_batch=micro_batch)
    return [accumulator.step(batch) for batch in batches]


@pytest.mark.usefixtures("unasked")
def test_running_out_once_in_the_second_micro_batch_of_step_2_changes_nothing() -> None:
    ours, whole = Flaky(calls=(5,)), Flaky()  # Three micro-batches a window: 5 is the 2nd of 2.
    steps = run(ours, 4, windows())
    undivided_steps(whole, adam(whole), F.cross_entropy, windows())
    assert [step.replays for step in steps] == [0, 1, 0]
    assert [step.micro_batch_sizes for step in steps] == [(4, 3, 3), (3, 3, 2, 2), (3, 3, 2, 2)]
    assert_same_parameters(ours, whole)


def test_running_out_persistently_shrinks_until_it_fits_and_changes_nothing() -> None:
    ours, whole = Flaky(above=2), Flaky()
    steps = run(ours, None, windows())
    losses = undivided_steps(whole, adam(whole), F.cross_entropy, windows())
    assert len(steps) == 3
    assert steps[0].replays > 1
    assert max(steps[0].micro_batch_sizes) <= 2
    assert [step.replays for step in steps[1:]] == [0, 0]
    assert_same_parameters(ours, whole)
    assert_exact([step.loss for step in steps], losses)


def test_running_out_once_with_one_example_is_no_reason_to_stop() -> None:
    ours, whole = Flaky(calls=(5,)), Flaky()
    steps = run(ours, 1, windows())
    undivided_steps(whole, adam(whole), F.cross_entropy, windows())
    assert [step.replays for step in steps] == [1, 0, 0]
    assert_same_parameters(ours, whole)


class Moving(nn.Module):
    """Changes everything that a forward pass may change, then runs out of memory in one call."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).double()
        self.filled: Tensor | None
        self.register_buffer("filled", None)
        self.generator = torch.Generator().manual_seed(7)
        self.average = torch.zeros(5, dtype=torch.float64)
        self.history: list[float] = []
        self.calls = 0
        self.fails_at = fails_at

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        self.calls += 1
        self.average.mul_(0.5).add_(x.detach().mean(0))
        self.filled = x.detach().mean(0) if self.filled is None else self.filled + 1
        self.history.append(float(x.sum()))
        noise = torch.rand((), generator=self.generator, dtype=torch.float64)
        CALLS[0] += 1
        if CALLS[0] == self.fails_at:
            raise OUT_OF_MEMORY.with_traceback(None)
        moved = self.average + self.filled + noise + self.calls + len(self.history)
        scores: Tensor = self.inner(x + moved)
        return scores


@pytest.mark.usefixtures("unasked")
def test_a_replay_finds_everything_where_the_window_found_it() -> None:
    results = []
    for fails_at, micro_batch in ((2, 4), (0, 3)):  # 4 + 3 + 3 fails, and becomes 3 + 3 + 2 + 2.
        torch.manual_seed(0)
        CALLS[0] = 0
        model = Moving(fails_at)
        batch = windows()[0]
        step = run(model, micro_batch, [batch])[0]
        model.fails_at = 0
        results.append((step.loss, fingerprint(model), batch[0].tolist()))
        assert step.micro_batch_sizes == (3, 3, 2, 2)
    assert results[0] == results[1]


def test_a_failed_short_window_does_not_shrink_the_full_ones() -> None:
    model = Flaky(calls=(3,))
    batches = [*windows(2), (windows()[2][0][:3], windows()[2][1][:3]), *windows(1)]
    steps = run(model, None, batches)
    assert [step.micro_batch_sizes for step in steps] == [(10,), (10,), (2, 1), (10,)]


def test_an_error_that_may_be_memory_is_tried_in_smaller_pieces_down_to_one() -> None:
    class Suspect(Flaky):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.above:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED")
            scores: Tensor = self.inner(x)
            return scores

    ours, whole = Suspect(above=4), Flaky()
    assert run(ours, None, windows())[0].replays > 0
    undivided_steps(whole, adam(whole), F.cross_entropy, windows())
    assert_same_parameters(ours, whole)
    with pytest.raises(RuntimeError, match="NOT_INITIALIZED"):
        run(Suspect(above=0), None, windows())


def test_an_error_of_the_user_s_in_a_window_puts_its_beginning_back() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout()).double()

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.inner(x)
            if len(x) == 3:
                raise KeyError("mine")
            return scores

    model = Breaks()
    optimizer = adam(model)
    before = fingerprint(model, optimizer)
    with pytest.raises(KeyError, match="mine"):
        Accumulator(model, optimizer, micro_batch=4).step(windows()[0])
    assert fingerprint(model, optimizer) == before


def test_batch_norm_that_refuses_one_example_is_no_reason_to_crash_in_a_replay() -> None:
    model = nn.Sequential(Flaky(above=1), nn.BatchNorm1d(3).double())
    with pytest.raises(DoesNotFitError, match="more than 1 value per channel"):
        run(model, None, windows())


def test_running_out_forever_is_an_error_and_nothing_has_changed() -> None:
    model = nn.Sequential(Flaky(above=0), nn.BatchNorm1d(3).double())
    optimizer = adam(model)
    before = fingerprint(model, optimizer)
    with pytest.raises(DoesNotFitError, match=r"Tried to allocate 2.00 GiB"):
        Accumulator(model, optimizer).step(windows()[0])
    assert fingerprint(model, optimizer) == before


@pytest.mark.usefixtures("unasked")
def test_buffers_and_random_generators_are_rolled_back_before_a_replay() -> None:
    torch.manual_seed(0)
    flaky = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    flaky = flaky.double()
    steady = twin(flaky)
    batch = windows()[0]
    torch.manual_seed(5)
    run(steady, 3, [batch])
    expected = fingerprint(steady)
    torch.manual_seed(5)
    accumulator = Accumulator(flaky, adam(flaky), micro_batch=4)
    once = iter([OUT_OF_MEMORY])
    flaky[3].register_forward_pre_hook(lambda _, inputs: fail_once(once, inputs))
    step = accumulator.step(batch)
    assert (step.replays, step.micro_batch_sizes) == (1, (3, 3, 2, 2))
    assert_same_parameters(flaky, steady)
    assert fingerprint()["torch rng"] == expected["torch rng"]


def fail_once(errors: Iterator[BaseException], inputs: tuple[Tensor, ...]) -> None:
    if len(inputs[0]) < 4:  # In the second micro-batch, when buffers and masks have changed.
        for error in errors:
            raise error


@settings(deadline=None, max_examples=60)
@given(point=st.integers(1, 600), micro_batch=st.integers(1, 10))
def test_running_out_at_any_operation_changes_nothing(point: int, micro_batch: int) -> None:
    ours, whole = small_model(), small_model()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    accumulator = Accumulator(ours, optimizer, micro_batch=micro_batch)
    steps, before = [], fingerprint(ours)
    batches = windows()
    with Fails(point) as failing:
        for batch in batches:
            failing.enabled = False
            before = fingerprint(ours)
            failing.enabled = True
            try:
                steps.append(accumulator.step(batch))
            except torch.OutOfMemoryError:  # Around the window: while counting the terms, say.
                failing.enabled = False
                assert fingerprint(ours) == before
                steps.append(accumulator.step(batch))
            except StepInterruptedError:  # In the optimizer's step, and after something changed.
                return
    reference = torch.optim.SGD(whole.parameters(), lr=0.5)
    losses = undivided_steps(whole, reference, F.cross_entropy, batches)
    assert_exact([step.loss for step in steps], losses)
    assert_same_parameters(ours, whole)


def test_a_replay_that_forgot_to_drop_the_gradients_would_be_seen() -> None:
    ours, whole = small_model(), small_model()
    (batch,) = windows(1)
    F.cross_entropy(ours(batch[0][:3]), batch[1][:3]).backward()  # What a failed window leaves.
    F.cross_entropy(ours(batch[0]), batch[1]).backward()
    torch.optim.SGD(ours.parameters(), lr=0.5).step()
    undivided_steps(whole, torch.optim.SGD(whole.parameters(), lr=0.5), F.cross_entropy, [batch])
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(ours, whole)


def test_other_errors_in_a_window_pass_through() -> None:
    model = small_model()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Accumulator(model, adam(model)).step((torch.zeros(4, 9).double(), torch.zeros(4).long()))


def test_whoever_wants_no_replay_gets_the_error_and_nothing_has_moved() -> None:
    """USERS 1.1.11 and 1.1.12: half a window leaves nothing, and another size may be tried."""
    ours, whole = Flaky(), Flaky()
    optimizer = adam(ours)
    accumulator = Accumulator(ours, optimizer, micro_batch=4, replay=False)
    accumulator.step(windows()[0])
    accumulator.micro_batch, ours.calls = 5, (CALLS[0] + 2,)
    before = fingerprint(ours, optimizer)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        accumulator.step(windows()[1])
    assert fingerprint(ours, optimizer) == before
    assert all(parameter.grad is None for parameter in ours.parameters())
    assert (accumulator.steps, accumulator.micro_batch) == (1, 5)
    accumulator.micro_batch = 2
    steps = [accumulator.step(batch) for batch in windows()[1:]]
    undivided_steps(whole, adam(whole), F.cross_entropy, windows())
    assert [step.replays for step in steps] == [0, 0]
    assert_same_parameters(ours, whole)


def test_training_without_replays_ends_with_the_error() -> None:
    """USERS 1.1.11."""
    model = Flaky()

    def observe(event: object) -> None:
        if type(event).__name__ == "TrainingStarted":
            model.above = 3

    with pytest.raises(torch.OutOfMemoryError):
        find_and_train(model, windows(), 10, replay=False, progress=observe)
    for bad in (0, None, "no"):
        with pytest.raises(TypeError, match="replay must be True or False, got"):
            find_and_train(model, windows(), 10, replay=bad)  # type: ignore[arg-type]


def test_retries_are_counted_reported_and_noted() -> None:
    model = Flaky()

    events: list[object] = []

    def observe(event: object) -> None:
        events.append(event)
        if type(event).__name__ == "TrainingStarted":
            model.above = 3

    result = find_and_train(model, windows(), 10, progress=observe)
    kinds = [type(event).__name__ for event in events]
    assert result.replays == kinds.count("Replayed") > 0
    assert result.plan.micro_batch <= 3
    assert result.steps == 3
    assert any("memory ran out" in note for note in result.notes)


@settings(deadline=None)
@given(examples=st.integers(1, 5000), size=st.integers(1, 5000), failures=st.integers(1, 12))
def test_a_smaller_size_is_smaller_down_to_one(examples: int, size: int, failures: int) -> None:
    size = min(size, examples)
    smaller = smaller_size(examples, size, failures)
    assert smaller == 1 if size == 1 else 1 <= smaller < size


@pytest.mark.parametrize("examples", [1, 77, 256, 4096, 10**6])
def test_any_size_is_reached_in_few_replays(examples: int) -> None:
    size, replays = examples, 0
    while size > 1:
        replays += 1
        size = smaller_size(examples, size, replays)
    assert replays <= examples.bit_length() + 2


# The size from window to window. Memory is a number: the largest micro-batch that fits.

WISHED = st.none() | st.integers(1, 300)
WINDOWS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 300)), min_size=1, max_size=80)


def tried_sizes(size: MicroBatchSize, examples: int, room: int) -> list[int]:
    """The largest micro-batch of each attempt at one window; the last one fits."""
    tried = [largest_part(examples, size.for_window(examples))]
    while tried[-1] > room:
        smaller = size.failed(examples, tried[-1], len(tried))
        tried.append(largest_part(examples, smaller))
    size.succeeded()
    return tried


def largest_part(examples: int, tolerable: int) -> int:
    return max(BatchPlan(desired=examples, tolerable=tolerable).micro_batch_sizes)


@given(wished=WISHED, course=WINDOWS)
def test_no_size_is_larger_than_requested_and_every_failure_is_followed_by_a_smaller_one(
    wished: int | None, course: list[tuple[int, int]]
) -> None:
    size = MicroBatchSize(wished)
    for examples, room in course:
        tried = tried_sizes(size, examples, room)
        assert 1 <= min(tried) <= max(tried) <= min(wished or examples, examples)
        assert tried == sorted(set(tried), reverse=True)
        assert len(tried) <= examples.bit_length() + 2


@given(wished=WISHED, examples=st.integers(1, 200), room=st.integers(1, 200))
def test_what_memory_took_comes_back_one_micro_batch_fewer_at_a_time(
    wished: int | None, examples: int, room: int
) -> None:
    size = MicroBatchSize(wished)
    full = min(wished or examples, examples)
    now = tried_sizes(size, examples, room)[-1]
    quiet = 1  # The window in which memory ran out has run as well.
    while now < largest_part(examples, full):
        (then,) = tried_sizes(size, examples, room=1000)
        if quiet < PATIENCE:
            assert then == now, "nothing is tried before its time"
            quiet += 1
            continue
        fewer = BatchPlan(desired=examples, tolerable=now).accumulation_steps - 1
        assert then == min(-(-examples // fewer), largest_part(examples, full))
        now, quiet = then, 1
    assert tried_sizes(size, examples, room=1000) == [largest_part(examples, full)]


def test_an_attempt_that_fails_goes_back_to_the_size_before_and_waits_twice_as_long() -> None:
    size = MicroBatchSize(None)
    course = [tried_sizes(size, 100, room=30) for _ in range(6 * LONGEST_PATIENCE)]
    assert course[0] == [100, 50, 25]
    attempts = [place for place, tried in enumerate(course) if len(tried) > 1]
    assert [course[place] for place in attempts[1:]] == [[34, 25]] * (len(attempts) - 1)
    waits = [later - sooner for sooner, later in itertools.pairwise(attempts)]
    assert waits == [16, 32, 64, 128, 256, 512, *[1024] * 5]


@given(
    full=st.integers(2, 200),
    short=st.integers(1, 200),
    room=st.integers(1, 200),
    before=st.integers(0, PATIENCE - 1),  # No attempt at a larger size is under way.
)
def test_a_failed_short_window_does_not_shrink_larger_ones(
    full: int, short: int, room: int, before: int
) -> None:
    size, control = MicroBatchSize(None), MicroBatchSize(None)
    for each in (size, control):
        tried_sizes(each, full, room)
        for _ in range(before):
            tried_sizes(each, full, room=1000)
    short = min(short, (size.size or full) - 1)
    if short:
        tried_sizes(size, short, room=min(room, control.size or full))
    assert size.size == control.size


def test_a_wish_larger_than_any_window_is_given_up_once_and_not_in_every_window() -> None:
    size = MicroBatchSize(300)
    assert [tried_sizes(size, 256, room=200) for _ in range(3)] == [[256, 128], [128], [128]]


def test_an_attempt_is_remembered_through_a_failed_short_window() -> None:
    size = MicroBatchSize(None)
    tried_sizes(size, 10, room=4)
    for _ in range(PATIENCE):
        (grown,) = tried_sizes(size, 10, room=1000)
    assert (grown, size.size) == (4, 4)  # It was 3.
    assert tried_sizes(size, 3, room=2) == [3, 2]
    assert tried_sizes(size, 10, room=3) == [4, 3]


def test_a_short_window_too_large_for_memory_ends_an_attempt_at_a_larger_one() -> None:
    size = MicroBatchSize(None)
    tried_sizes(size, 10, room=5)
    for _ in range(PATIENCE):
        (grown,) = tried_sizes(size, 10, room=1000)
    assert (grown, size.size) == (10, 10)
    assert tried_sizes(size, 8, room=5) == [8, 4]  # 8 by 5.
    assert size.size == 5


def test_a_failure_in_between_starts_the_wait_anew() -> None:
    size = MicroBatchSize(None)
    tried_sizes(size, 12, room=6)
    for _ in range(PATIENCE - 2):
        assert tried_sizes(size, 12, room=1000) == [6]
    assert tried_sizes(size, 12, room=5) == [6, 4]
    assert [tried_sizes(size, 12, room=1000) for _ in range(PATIENCE)] == [
        *[[4]] * (PATIENCE - 1),
        [6],
    ]


@given(
    wished=WISHED,
    examples=st.integers(1, 60),
    course=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=12),
    place=st.integers(0, 240),
)
def test_a_size_goes_on_from_its_state_as_if_nothing_had_been(
    wished: int | None, examples: int, course: list[tuple[int, int]], place: int
) -> None:
    rooms = [room for room, windows in course for _ in range(windows)]
    one, other = MicroBatchSize(wished), MicroBatchSize(None)
    for room in rooms[:place]:
        tried_sizes(one, examples, room)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for room in [*rooms[place:], *[60] * 100]:
        assert tried_sizes(one, examples, room) == tried_sizes(other, examples, room)


def test_memory_that_was_short_for_a_while_costs_replays_and_no_step() -> None:
    ours, whole = Flaky(above=2), Flaky()
    accumulator = Accumulator(ours, adam(ours))
    steps = []
    for place, batch in enumerate(windows(90)):
        if place == 3:
            ours.above = 10**9
        steps.append(accumulator.step(batch))
    counts = [len(step.micro_batch_sizes) for step in steps]
    assert [step.replays for step in steps] == [3, *[0] * 89]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[15], counts[16], counts[-1]) == (5, 5, 4, 1)
    assert (accumulator.micro_batch, accumulator.steps) == (10, 90)
    losses = undivided_steps(whole, adam(whole), F.cross_entropy, windows(90))
    assert_exact([step.loss for step in steps], losses)
    assert_same_parameters(ours, whole)


# Giving up.


def test_a_window_that_runs_out_again_and_again_says_what_it_was_and_what_memory_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(oom_retry, "MOST_RETRIES", 2)
    model = nn.Sequential(nn.BatchNorm1d(5).double(), nn.Dropout(), Flaky(above=0))
    optimizer = adam(model)
    accumulator = Accumulator(model, optimizer)
    before = fingerprint(model, optimizer)
    with pytest.raises(ReplayLimitError) as caught:
        accumulator.step(windows()[0])
    assert fingerprint(model, optimizer) == before
    error = caught.value
    assert error.batch == "(float64[10, 5], int64[10])"
    assert [failure["micro_batch"] for failure in error.failures] == [10, 5, 3]
    assert all(failure["free"] > 0 for failure in error.failures)
    lines = str(error).splitlines()
    assert lines[0].startswith(
        "memory ran out 3 times in one logical batch of (float64[10, 5], int64[10]"
    )
    assert "Tried to allocate 2.00 GiB" in lines[0]
    assert [line.split()[1] for line in lines[2:5]] == ["10", "5", "3"]
    assert all("allocated" in line and "free" in line for line in lines[2:5])
    assert lines[5].startswith("No step was taken, and nothing changed.")


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.usefixtures("unasked")
def test_only_one_example_that_fails_twice_does_not_fit(again: int) -> None:
    ours, whole = Flaky(calls=tuple(range(1, again + 1))), Flaky()
    optimizer = adam(ours)
    accumulator = Accumulator(ours, optimizer, micro_batch=1)
    before = fingerprint(ours, optimizer)
    if again == 2:
        with pytest.raises(DoesNotFitError, match="a batch of 1 does not fit here") as caught:
            accumulator.step(windows()[0])
        assert (caught.value.size, caught.value.limit_bytes) == (1, None)
        assert fingerprint(ours, optimizer) == before
    steps = [accumulator.step(batch) for batch in windows()]
    assert [step.replays for step in steps] == [again % 2, 0, 0]
    undivided_steps(whole, adam(whole), F.cross_entropy, windows())
    assert_same_parameters(ours, whole)


# The optimizer's step.


@dataclass
class Step:
    """An optimizer step that runs out of memory before, during or after its changes."""

    model: nn.Module
    fails: list[str] = field(default_factory=list)

    def optimizer(self) -> torch.optim.Optimizer:
        step = self

        class Breaking(torch.optim.SGD):
            def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
                first = self.param_groups[0]["params"][0]
                how = step.fails.pop(0) if step.fails else ""
                if how == "state first":
                    self.state[first]["half"] = torch.zeros(3)
                if how == "moved":
                    with torch.no_grad():
                        first.add_(1)
                if how:
                    raise OUT_OF_MEMORY.with_traceback(None)
                super().step(closure)

        return Breaking(self.model.parameters(), lr=0.5)


@pytest.mark.parametrize("how", ["at once", "state first"])
def test_a_step_that_failed_before_anything_changed_is_taken_again(how: str) -> None:
    ours, whole = small_model(), small_model()
    optimizer = Step(ours, [how]).optimizer()
    Accumulator(ours, optimizer, micro_batch=4).step(windows()[0])
    reference = torch.optim.SGD(whole.parameters(), lr=0.5)
    undivided_steps(whole, reference, F.cross_entropy, windows()[:1])
    assert_same_parameters(ours, whole)
    assert not optimizer.state


def test_a_step_that_failed_half_way_is_an_error_and_not_repeated() -> None:
    model = small_model()
    optimizer = Step(model, ["moved"]).optimizer()
    with pytest.raises(StepInterruptedError, match="half done"):
        Accumulator(model, optimizer).step(windows()[0])


def test_a_step_that_runs_out_twice_is_an_error() -> None:
    model = small_model()
    optimizer = Step(model, ["at once", "at once"]).optimizer()
    with pytest.raises(StepInterruptedError, match="twice"):
        OptimizerStep(optimizer=optimizer, device=CpuDevice()).take()


def test_another_error_in_the_step_passes_through() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("mine")))
    with pytest.raises(KeyError, match="mine"):
        OptimizerStep(optimizer=optimizer, device=CpuDevice()).take()


# Out of memory at every operation of the optimizer's step.

OPTIMIZERS: dict[str, Callable[[list[dict[str, object]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False),
    "sgd foreach": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True, foreach=False),
    "adam foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=True),
    "adam fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "adagrad fused": lambda groups: torch.optim.Adagrad(groups, lr=0.1, fused=True),
    "own": lambda groups: OwnOptimizer(groups),
}


class OwnOptimizer(torch.optim.Optimizer):
    """Counts in plain numbers, replaces the tensors of its state, and keeps lists of them."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {"lr": 0.1, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            group["calls"] += 1
            for parameter in group["params"]:
                entry = self.state[parameter]
                entry["step"] = entry.get("step", 0) + 1
                entry["average"] = 0.9 * entry.get("average", 0) + parameter.grad
                for kept in entry.setdefault("kept", [torch.zeros_like(parameter)]):
                    kept.add_(entry["average"])
                parameter.sub_(kept / entry["step"], alpha=group["lr"] / group["calls"])


class FailsInStep(Fails):
    """Runs out of memory once in each of the first attempts at an optimizer's step."""

    def __init__(self, optimizer: torch.optim.Optimizer, at: int, attempts: int) -> None:
        super().__init__(at)
        self.enabled = False
        self.attempts: int = attempts
        optimizer.register_step_pre_hook(lambda *_: self.begin())

    def begin(self) -> None:
        self.attempts -= 1
        self.enabled, self.operations = self.attempts >= 0, 0


@dataclass
class Prepared:
    """A model with a gradient, an optimizer of two groups, and their optimizer step."""

    kind: str
    steps_before: int
    snapshot: bool = False

    def __post_init__(self) -> None:
        self.model = small_model()
        weights, biases = ([p for p in self.model.parameters() if p.dim() == d] for d in (2, 1))
        groups: list[dict[str, object]] = [
            {"params": weights, "weight_decay": 0.1},
            {"params": biases, "weight_decay": 0.0},
        ]
        self.optimizer = OPTIMIZERS[self.kind](groups)
        device = CpuDevice(self.model.parameters)
        device.read()  # It knows of all there is, and need not collect garbage.
        self.optimizer_step = OptimizerStep(
            optimizer=self.optimizer, device=device, snapshot=self.snapshot
        )
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter).cumsum(0)
        for _ in range(self.steps_before):
            self.optimizer_step.take()

    def taken(self, *, fails_at: int = 0, attempts: int = 1) -> bool:
        """Take one more step; return whether the operation at which to fail was reached."""
        with FailsInStep(self.optimizer, fails_at, attempts) as failing:
            self.optimizer_step.take()
        return bool(failing.attempts < 0)

    def values(self) -> dict[str, object]:
        return fingerprint(
            self.model, [*self.optimizer.param_groups], *self.optimizer.state.values()
        )


def operations_of(kind: str, steps_before: int) -> Iterator[int]:
    """Each operation of the optimizer's step, counted from 1."""
    for operation in itertools.count(1):
        if not Prepared(kind, steps_before, snapshot=True).taken(fails_at=operation):
            return
        yield operation


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_with_a_copy_a_step_that_failed_anywhere_is_undone_and_taken_once(
    kind: str, steps_before: int
) -> None:
    plain = Prepared(kind, steps_before)
    before = plain.values()
    plain.optimizer.step()
    for operation in operations_of(kind, steps_before):
        once = Prepared(kind, steps_before, snapshot=True)
        once.taken(fails_at=operation)
        assert once.values() == plain.values(), operation
        twice = Prepared(kind, steps_before, snapshot=True)
        with pytest.raises(StepInterruptedError, match="as they were before"):
            twice.taken(fails_at=operation, attempts=2)
        assert twice.values() == before, operation
    assert operation > 2


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_a_copy_a_step_that_failed_anywhere_is_taken_once_or_is_an_error(
    kind: str, steps_before: int
) -> None:
    plain = Prepared(kind, steps_before)
    plain.optimizer.step()
    outcomes = set()
    for operation in operations_of(kind, steps_before):
        broken = Prepared(kind, steps_before)
        try:
            broken.taken(fails_at=operation)
        except StepInterruptedError as error:
            assert "half done" in str(error)  # noqa: PT017  # One or the other.
            outcomes.add("error")
        else:
            assert broken.values() == plain.values(), operation
            outcomes.add("taken")
    # Foreach kernels may not count writes, or the step counts change first.
    assert outcomes == ({"error", "taken"} if kind in ("sgd", "adam") else {"error"})


def test_a_copy_is_part_of_what_a_trial_measures() -> None:
    peaks = []
    for snapshot in (False, True):
        model = nn.Linear(100, 100)
        device = CpuDevice(model.parameters)
        update = OptimizerStep(
            optimizer=torch.optim.SGD(model.parameters()), device=device, snapshot=snapshot
        )
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with device.limited_to(10**9):
            device.reset_peak()
            update.take_in_trial()
        peaks.append(device.read().peak_bytes)
    assert peaks[1] - peaks[0] == 4 * (100 * 100 + 100)


def test_running_out_half_way_through_a_step_of_training_is_undone_too() -> None:
    ours, whole = small_model(), small_model()
    optimizer = Step(ours, ["moved", "", "moved"]).optimizer()
    accumulator = Accumulator(ours, optimizer, micro_batch=4, snapshot_steps=True)
    steps = [accumulator.step(batch) for batch in windows()]
    losses = undivided_steps(
        whole, torch.optim.SGD(whole.parameters(), lr=0.5), F.cross_entropy, windows()
    )
    assert_exact([step.loss for step in steps], losses)
    assert_same_parameters(ours, whole)
    assert accumulator.steps == 3


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")])
def test_a_step_undone_twice_leaves_a_window_that_can_be_run_again(
    scaler: torch.amp.GradScaler | None,
) -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), small_model(), nn.Dropout()).double()
    optimizer = Step(model, ["moved", "moved"]).optimizer()
    accumulator = Accumulator(model, optimizer, micro_batch=4, snapshot_steps=True, scaler=scaler)
    before = fingerprint(model, optimizer)
    with pytest.raises(StepInterruptedError, match="twice"):
        accumulator.step(windows()[0])
    assert fingerprint(model, optimizer) == before
    accumulator.step(windows()[0])
    assert accumulator.steps == 1
    assert int(model[0].num_batches_tracked) == 1  # type: ignore[arg-type]
