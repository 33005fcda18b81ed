"""The gradient of a logical batch needs no optimizer, is exact, and leaves no trace on an error."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Pair, assert_exact, small_model, token_model
from states import fingerprint
from test_oom_retry import OUT_OF_MEMORY, Fails
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch import DoesNotFitError, InexactStepError, ReplayLimitError, WholeBatch
from autobatch.devices.cpu import CpuDevice
from autobatch.events import Replayed
from autobatch.training.engine import oom_retry
from autobatch.training.engine.batch_gradient import BatchGradient
from autobatch.training.engine.micro_batch_size import MicroBatchSize
from autobatch.training.options import StepOptions

Change = Callable[["Mutable"], None]


def gradient_of(
    model: nn.Module,
    micro_batch: int | None,
    options: StepOptions | None = None,
    **fields: Any,
) -> BatchGradient:
    """What computes the gradient of cross-entropy, or of the loss in the options."""
    options = StepOptions(loss=nn.CrossEntropyLoss()) if options is None else options
    return BatchGradient(
        gradient_pass=options.gradient_pass(model, CpuDevice()),
        micro_batch_size=MicroBatchSize(micro_batch),
        **fields,
    )


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def undivided(model: nn.Module, batch: Pair) -> tuple[float, list[Tensor | None]]:
    """Loss and gradient of the undivided batch."""
    model.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss.item(), gradients(model)


def ragged_text(examples: int, seed: int) -> Pair:
    """Text whose examples differ in their number of valid targets; each has at least one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 7, (examples, 4), generator=generator)
    y = torch.randint(0, 4, (examples, 4), generator=generator)
    lengths = torch.randint(1, 5, (examples, 1), generator=generator)
    return x, y.masked_fill(torch.arange(4) >= lengths, -100)


@pytest.fixture
def _no_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an optimizer was made")

    monkeypatch.setattr(Optimizer, "__init__", refuse)


@settings(deadline=None, max_examples=60)
@given(
    examples=st.integers(1, 17),
    micro_batch=st.none() | st.integers(1, 17),
    failure=st.integers(0, 150),
    seed=st.integers(0, 99),
)
def test_any_cut_and_any_failure_give_the_gradient_of_the_undivided_batch(
    examples: int, micro_batch: int | None, failure: int, seed: int
) -> None:
    batch = ragged_text(examples, seed)
    ours, whole = token_model(seed), token_model(seed)
    gradient = gradient_of(ours, micro_batch)
    fails = Fails(failure)
    with fails:
        try:
            computed = gradient.compute(batch)
        except torch.OutOfMemoryError:  # In the search for terms, which nothing can make smaller.
            assert gradients(ours) == [None] * len(gradients(ours))
            computed = gradient.compute(batch)
    assert computed is not None
    loss, expected = undivided(whole, batch)
    assert_exact(gradients(ours), expected)
    assert_exact(computed.losses.read().loss_sum / computed.read_terms(), loss)
    assert sum(computed.micro_batch_sizes) == examples


@pytest.mark.usefixtures("_no_optimizer")
def test_memory_running_out_in_the_middle_costs_a_retry_and_no_optimizer_is_needed() -> None:
    batch = ragged_text(10, 1)
    ours, whole = token_model(), token_model()
    calls = iter([None, OUT_OF_MEMORY])
    events: list[object] = []
    steps: list[int] = []

    def fail_in_the_second_micro_batch(module: nn.Module, _: object) -> None:
        error = next(calls, None) if module.training else None
        if error is not None:
            raise error.with_traceback(None)

    ours.register_forward_pre_hook(fail_in_the_second_micro_batch)
    gradient = gradient_of(ours, 4, observer=events.append, on_oom=steps.append)
    computed = gradient.compute(batch, step=7)
    assert computed is not None
    assert computed.retries == 1
    assert computed.micro_batch_sizes == (3, 3, 2, 2)
    assert events == [Replayed(failed=4, micro_batch=3)]
    assert steps == [7]
    loss, expected = undivided(whole, batch)
    assert_exact(gradients(ours), expected)
    assert_exact(computed.losses.read().loss_sum / computed.read_terms(), loss)


def test_the_mean_of_the_micro_batches_means_is_another_gradient() -> None:
    batch = ragged_text(10, 1)
    wrong, whole = token_model(), token_model()
    for x, y in zip(batch[0].split(4), batch[1].split(4), strict=True):
        (F.cross_entropy(wrong(x), y) / 3).backward()
    _, expected = undivided(whole, batch)
    with pytest.raises(AssertionError, match="not close"):
        assert_exact(gradients(wrong), expected)


def test_gradients_that_were_there_are_replaced_and_a_loss_of_all_outputs_is_exact_too() -> None:
    batch = ragged_text(10, 2)
    ours, whole = token_model(), token_model()
    for parameter in ours.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradient_of(ours, 4, StepOptions(loss=WholeBatch(nn.CrossEntropyLoss()))).compute(batch)
    assert_exact(gradients(ours), undivided(whole, batch)[1])


def test_a_batch_without_a_valid_term_has_no_gradient() -> None:
    model = token_model()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    x, y = ragged_text(6, 1)
    assert gradient_of(model, 2).compute((x, torch.full_like(y, -100))) is None
    assert gradients(model) == [None] * len(gradients(model))


def test_what_finishes_the_gradient_sees_it_whole_and_may_run_out_of_memory() -> None:
    batch = ragged_text(10, 1)
    ours, whole = token_model(), token_model()
    _, expected = undivided(whole, batch)
    calls = 0

    def finish() -> Tensor:
        nonlocal calls
        calls += 1
        assert_exact(gradients(ours), expected)
        if calls == 1:
            raise OUT_OF_MEMORY.with_traceback(None)
        return torch.tensor(3.0)

    computed = gradient_of(ours, 4).compute(batch, finish=finish)
    assert computed is not None
    assert (calls, computed.retries, computed.losses.read().norm) == (2, 1, 3.0)
    assert_exact(gradients(ours), expected)


# On every error the model and the generators are as before, and no gradient is left.


class Mutable(nn.Module):
    """Changes BatchNorm's buffers, a counter and the random generators in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5).double()
        self.inner = small_model()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scores: Tensor = self.inner(F.dropout(self.norm(x), 0.1))
        return scores


def rows(examples: int = 10) -> Pair:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def forward_passes(*errors: BaseException | None, then: BaseException | None = None) -> Change:
    """Makes the n-th forward pass raise the n-th error, and all others ``then``."""

    def change(model: Mutable) -> None:
        following = itertools.chain(errors, itertools.repeat(then))

        def fail(module: nn.Module, *_: object) -> None:
            error = next(following) if module.training else None  # Not in a check before it.
            if error is not None:
                raise error.with_traceback(None)

        model.register_forward_hook(fail)

    return change


def a_gradient_hook(model: Mutable) -> None:
    next(model.inner.parameters()).register_hook(lambda gradient: gradient)


def unchanged(_: Mutable) -> None:
    pass


def not_additive(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return outputs.sum().square(), len(targets)


def fail(*_: object) -> None:
    raise RuntimeError("seen")


CROSS_ENTROPY = StepOptions(loss=nn.CrossEntropyLoss())
REFUSED = StepOptions(loss=nn.CrossEntropyLoss(), batch_norm="refuse")
NOT_ADDITIVE = StepOptions(loss=not_additive, batch_norm="frozen")
ONCE, ALWAYS = forward_passes(None, OUT_OF_MEMORY), forward_passes(then=OUT_OF_MEMORY)
RETRIED = forward_passes(None, OUT_OF_MEMORY, None, KeyboardInterrupt())

CASES: dict[str, tuple[Change, StepOptions, dict[str, Any], type[BaseException]]] = {
    "no retry": (ONCE, CROSS_ENTROPY, {"retry": False}, torch.OutOfMemoryError),
    "one example does not fit": (ALWAYS, CROSS_ENTROPY, {}, DoesNotFitError),
    "too many retries": (ALWAYS, CROSS_ENTROPY, {}, ReplayLimitError),
    "error": (forward_passes(None, RuntimeError("seen")), CROSS_ENTROPY, {}, RuntimeError),
    "Ctrl-C": (forward_passes(None, KeyboardInterrupt()), CROSS_ENTROPY, {}, KeyboardInterrupt),
    "Ctrl-C after a retry": (RETRIED, CROSS_ENTROPY, {}, KeyboardInterrupt),
    "error in finish": (unchanged, CROSS_ENTROPY, {"finish": fail}, RuntimeError),
    "error in observer": (ONCE, CROSS_ENTROPY, {"observer": fail}, RuntimeError),
    "error in on_oom": (ONCE, CROSS_ENTROPY, {"on_oom": fail}, RuntimeError),
    "BatchNorm refused": (unchanged, REFUSED, {}, InexactStepError),
    "gradient hook": (a_gradient_hook, CROSS_ENTROPY, {}, InexactStepError),
    "loss not additive": (unchanged, NOT_ADDITIVE, {}, InexactStepError),
    "no example": (unchanged, CROSS_ENTROPY, {"examples": 0}, ValueError),
}


@pytest.mark.parametrize("case", CASES)
def test_after_any_error_the_model_and_the_generators_are_as_before_without_a_gradient(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, options, fields, error = CASES[case]
    if case == "too many retries":
        monkeypatch.setattr(oom_retry, "MOST_RETRIES", 1)
    model = Mutable()
    change(model)
    finish, examples = fields.get("finish", lambda: None), fields.get("examples", 10)
    others = {name: fields[name] for name in fields if name not in ("finish", "examples")}
    gradient = gradient_of(model, 4, options, **others)
    before = fingerprint(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(error):
        gradient.compute(rows(examples), finish=finish)
    assert fingerprint(model) == before


def test_without_an_error_forward_passes_change_the_model_until_the_snapshot_restores_it() -> None:
    model = Mutable()
    before = fingerprint(model)
    computed = gradient_of(model, 4).compute(rows())
    assert computed is not None
    after = fingerprint(model)
    changed = {name.split(".")[-1] for name in before if before[name] != after[name]}
    assert {"torch rng", "running_mean", "num_batches_tracked", "weight"} <= changed
    assert model.calls == len(computed.micro_batch_sizes)
    computed.snapshot.restore()
    model.zero_grad()
    assert fingerprint(model) == before


def test_buffers_and_counters_are_named_where_a_batch_is_cut() -> None:
    whole, cut = gradient_of(Mutable(), None), gradient_of(Mutable(), 4)
    whole.compute(rows())
    cut.compute(rows())
    assert (whole.mutated, whole.cut_batches) == (set(), 0)
    assert (cut.mutated, cut.cut_batches) == ({"calls"}, 1)
