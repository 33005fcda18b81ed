"""Memory running out in the middle of training costs a replay, never an example."""

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
    StepInterruptedError,
    StepResult,
    find_and_train,
)
from autobatch.devices.metered import MeteredDevice
from autobatch.training.replay import smaller_size
from autobatch.training.update import Update

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
    """Moves everything that a forward pass may move, and then runs out of memory in one call."""

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


def test_a_short_window_that_ran_out_says_nothing_of_the_full_ones() -> None:
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


def test_running_out_forever_is_an_error_and_nothing_has_moved() -> None:
    model = nn.Sequential(Flaky(above=0), nn.BatchNorm1d(3).double())
    optimizer = adam(model)
    before = fingerprint(model, optimizer)
    with pytest.raises(DoesNotFitError, match=r"Tried to allocate 2.00 GiB"):
        Accumulator(model, optimizer).step(windows()[0])
    assert fingerprint(model, optimizer) == before


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
    if len(inputs[0]) < 4:  # In the second micro-batch, when buffers and masks have moved.
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
            except StepInterruptedError:  # In the optimizer's step, and after something moved.
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


def test_replays_are_counted_told_and_noted() -> None:
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


# The optimizer's step.


@dataclass
class Step:
    """An optimizer's step that runs out of memory before, in the middle of, or after moving."""

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
def test_a_step_that_ran_out_before_anything_moved_is_taken_again(how: str) -> None:
    ours, whole = small_model(), small_model()
    optimizer = Step(ours, [how]).optimizer()
    Accumulator(ours, optimizer, micro_batch=4).step(windows()[0])
    reference = torch.optim.SGD(whole.parameters(), lr=0.5)
    undivided_steps(whole, reference, F.cross_entropy, windows()[:1])
    assert_same_parameters(ours, whole)
    assert not optimizer.state


def test_a_step_that_ran_out_half_way_is_an_error_and_not_repeated() -> None:
    model = small_model()
    optimizer = Step(model, ["moved"]).optimizer()
    with pytest.raises(StepInterruptedError, match="half done"):
        Accumulator(model, optimizer).step(windows()[0])


def test_a_step_that_runs_out_twice_is_an_error() -> None:
    model = small_model()
    optimizer = Step(model, ["at once", "at once"]).optimizer()
    with pytest.raises(StepInterruptedError, match="twice"):
        Update(optimizer=optimizer, device=MeteredDevice()).take()


def test_another_error_in_the_step_passes_through() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("mine")))
    with pytest.raises(KeyError, match="mine"):
        Update(optimizer=optimizer, device=MeteredDevice()).take()
