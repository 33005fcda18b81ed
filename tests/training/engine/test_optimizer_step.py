"""From the finished gradient to the step: clipped once, over the optimizer's parameters."""

import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Pair, assert_exact, assert_same_parameters, sgd, small_model, token_model
from states import fingerprint
from torch import Tensor, nn

from autobatch import Accumulator, StepInterruptedError, find_and_train
from autobatch.training.options import StepOptions

Clip = Callable[[Sequence[Tensor]], Tensor | None]


def samples(examples: int = 10, seed: int = 1) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def tokens(examples: int, seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 7, (examples, 6), generator=generator)
    y = torch.randint(0, 4, (examples, 6), generator=generator)
    lengths = torch.randint(1, 7, (examples,), generator=generator)
    return x, y.masked_fill(torch.arange(6) >= lengths[:, None], -100)


def by_norm(bound: float) -> Clip:
    return functools.partial(nn.utils.clip_grad_norm_, max_norm=bound)


def by_value(bound: float) -> Clip:
    return functools.partial(nn.utils.clip_grad_value_, clip_value=bound)


def clipped_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Pair, clip: Clip
) -> tuple[float, Tensor | None]:
    """The undivided batch: backward, clip, step."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    norm = clip([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    return loss.item(), norm


def pair_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(outputs, targets, reduction="sum"), (targets != -100).sum()


@settings(max_examples=40)
@given(
    desired=st.integers(1, 17),
    micro_batch=st.integers(1, 17),
    seed=st.integers(0, 2**16),
    bound=st.sampled_from([0.01, 0.3, 100.0, math.inf]),
    counted_by_loss=st.booleans(),
)
def test_any_split_is_clipped_as_the_undivided_gradient_is(
    desired: int, micro_batch: int, seed: int, bound: float, counted_by_loss: bool
) -> None:
    batch = tokens(desired, seed)
    ours, whole = token_model(seed), token_model(seed)
    loss = pair_loss if counted_by_loss else None
    accumulator = Accumulator(ours, sgd(ours), loss, micro_batch=micro_batch, clip_grad_norm=bound)
    step = accumulator.step(batch)
    expected, norm = clipped_step(whole, sgd(whole), batch, by_norm(bound))
    assert norm is not None
    assert_exact(step.grad_norm, norm.item())
    assert_exact(step.loss, expected)
    assert_same_parameters(ours, whole)


@settings(max_examples=20)
@given(micro_batch=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_any_split_is_clipped_by_value_as_the_undivided_gradient_is(
    micro_batch: int, seed: int
) -> None:
    batch = tokens(11, seed)
    ours, whole = token_model(seed), token_model(seed)
    accumulator = Accumulator(ours, sgd(ours), micro_batch=micro_batch, clip_grad_value=0.01)
    step = accumulator.step(batch)
    clipped_step(whole, sgd(whole), batch, by_value(0.01))
    assert_same_parameters(ours, whole)
    assert step.grad_norm is None


@pytest.mark.parametrize("clip", [by_norm(0.1), by_value(0.01)], ids=["norm", "value"])
def test_clipping_each_micro_batch_takes_another_step(clip: Clip) -> None:
    wrong, whole = small_model(), small_model()
    x, y = samples()
    total = [torch.zeros_like(p) for p in wrong.parameters()]
    for part, targets in zip(x.split(4), y.split(4), strict=True):
        wrong.zero_grad()
        (F.cross_entropy(wrong(part), targets, reduction="sum") / 10).backward()
        clip(list(wrong.parameters()))
        for held, parameter in zip(total, wrong.parameters(), strict=True):
            assert parameter.grad is not None
            held += parameter.grad
    with torch.no_grad():
        for held, parameter in zip(total, wrong.parameters(), strict=True):
            parameter.sub_(held)
    clipped_step(whole, sgd(whole), (x, y), clip)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(wrong, whole)


def test_only_the_optimizer_s_parameters_are_measured_and_clipped() -> None:
    ours, whole = small_model(), small_model()
    step = Accumulator(ours, sgd(ours[2]), micro_batch=4, clip_grad_norm=0.1).step(samples())
    _, norm = clipped_step(whole, sgd(whole[2]), samples(), by_norm(0.1))
    assert norm is not None
    assert_exact(step.grad_norm, norm.item())
    assert_same_parameters(ours, whole)
    loss = F.cross_entropy(whole(samples()[0]), samples()[1])
    everything = nn.utils.get_total_norm(torch.autograd.grad(loss, list(whole.parameters())))
    assert everything > 1.01 * norm, "the control: all parameters have another norm"


def test_two_optimizer_groups_are_clipped_together() -> None:
    ours, whole = small_model(), small_model()

    def grouped(model: nn.Sequential) -> torch.optim.Optimizer:
        groups = [{"params": model[place].parameters(), "lr": 1.0 + place} for place in (0, 2)]
        return torch.optim.SGD(groups)

    step = Accumulator(ours, grouped(ours), micro_batch=4, clip_grad_norm=0.1).step(samples())
    _, norm = clipped_step(whole, grouped(whole), samples(), by_norm(0.1))
    assert_exact(torch.tensor(step.grad_norm, dtype=torch.float64), norm)
    assert_same_parameters(ours, whole)


def test_the_norm_is_none_where_nothing_needs_it_and_known_where_steps_may_be_skipped() -> None:
    for nonfinite, known in (("raise", False), ("ignore", False), ("skip", True)):
        model, whole = small_model(), small_model()
        step = Accumulator(model, sgd(model), nonfinite=nonfinite).step(samples())  # type: ignore[arg-type]
        _, norm = clipped_step(whole, sgd(whole), samples(), by_norm(math.inf))
        assert norm is not None
        assert_exact(step.grad_norm, norm.item() if known else None)


@pytest.mark.parametrize("bound", [None, 0.01])
def test_sparse_gradients_have_a_norm_too(bound: float | None) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(24, 4)
        ).double()

    batch = tokens(8, 3)[0], torch.arange(8) % 4
    ours, whole = model(), model()
    F.cross_entropy(whole(batch[0]), batch[1]).backward()
    gradients = [p.grad.to_dense() for p in whole.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    accumulator = Accumulator(
        ours, sgd(ours), micro_batch=3, nonfinite="skip", clip_grad_norm=bound
    )
    assert_exact(accumulator.step(batch).grad_norm, norm)
    with torch.no_grad():
        for parameter, gradient in zip(whole.parameters(), gradients, strict=True):
            parameter.sub_(gradient, alpha=1.0 if bound is None else bound / (norm + 1e-6))
    assert_same_parameters(ours, whole)


@pytest.mark.parametrize("name", ["clip_grad_norm", "clip_grad_value"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, True, "1", torch.tensor(1.0)])
def test_a_bound_that_is_none_is_refused_by_name(name: str, value: object) -> None:
    model = small_model()
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        Accumulator(model, sgd(model), **{name: value})  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        find_and_train(model, samples(), **{name: value})  # type: ignore[arg-type]


def test_both_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="pass one of the two"):
        StepOptions(clip_grad_norm=1.0, clip_grad_value=1.0)


def test_find_and_train_clips_as_a_plain_loop_over_undivided_batches() -> None:
    ours, whole = small_model(), small_model()
    x, y = samples(40)
    batches = list(zip(x.split(10), y.split(10), strict=True))
    optimizer = functools.partial(torch.optim.SGD, lr=1.0)
    norms: list[float | None] = []
    find_and_train(
        ours,
        batches,
        10,
        optimizer=optimizer,
        clip_grad_norm=0.2,
        memory_limit="2500B",
        on_step=lambda step: norms.append(step.grad_norm),
        progress=False,
    )
    theirs = optimizer(whole.parameters())
    expected = [clipped_step(whole, theirs, batch, by_norm(0.2))[1] for batch in batches]
    assert_exact(norms, [norm.item() for norm in expected if norm is not None])
    assert_same_parameters(ours, whole)


# A step that memory ends half done.


class Breaking(torch.optim.Adam):
    """Runs out of memory when it has changed the first parameter and its state."""

    def __init__(self, parameters: Sequence[nn.Parameter], breaks: int) -> None:
        super().__init__(parameters, lr=0.1)
        self.breaks = breaks

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if not self.breaks:
            super().step(closure)
            return
        self.breaks -= 1
        everything, group = self.param_groups[0]["params"], self.param_groups[0]
        group["params"] = everything[:1]
        try:
            super().step(closure)
        finally:
            group["params"] = everything
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("at_step", [0, 1])
def test_a_snapshot_undoes_a_step_half_done_and_takes_it_again(at_step: int) -> None:
    ours, whole = small_model(), small_model()
    optimizer = Breaking(list(ours.parameters()), 0)
    plain = torch.optim.Adam(whole.parameters(), lr=0.1)
    accumulator = Accumulator(ours, optimizer, micro_batch=4, snapshot_steps=True)
    for place in range(3):
        optimizer.breaks = int(place == at_step)
        accumulator.step(samples(seed=place))
        clipped_step(whole, plain, samples(seed=place), by_norm(math.inf))
    assert_same_parameters(ours, whole)
    assert_exact(optimizer.state_dict()["state"], plain.state_dict()["state"])


def test_without_a_snapshot_a_step_half_done_is_an_error() -> None:
    model = small_model()
    accumulator = Accumulator(model, Breaking(list(model.parameters()), 1), micro_batch=4)
    with pytest.raises(StepInterruptedError, match="snapshot_steps=True"):
        accumulator.step(samples())


def test_a_snapshot_undoes_a_step_that_fails_twice() -> None:
    model = small_model()
    optimizer = Breaking(list(model.parameters()), 0)
    accumulator = Accumulator(model, optimizer, micro_batch=4, snapshot_steps=True)
    accumulator.step(samples())
    before = fingerprint(model, optimizer.state_dict())
    optimizer.breaks = 2
    with pytest.raises(StepInterruptedError, match="are as they were"):
        accumulator.step(samples())
    assert fingerprint(model, optimizer.state_dict()) == before


@pytest.mark.parametrize("half_done", [False, True])
def test_memory_that_runs_out_in_clipping_costs_a_retry_and_clips_once(
    half_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, whole = small_model(), small_model()
    clip, left = nn.utils.clip_grads_with_norm_, [half_done]

    def failing(parameters: Sequence[Tensor], bound: float, norm: Tensor) -> None:
        if left:
            clip(parameters[: len(parameters) // 2 * left.pop()], bound, norm)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        clip(parameters, bound, norm)

    accumulator = Accumulator(ours, sgd(ours), micro_batch=5, clip_grad_norm=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grads_with_norm_", failing)
        step = accumulator.step(samples())
    clipped_step(whole, sgd(whole), samples(), by_norm(0.1))
    assert step.replays == 1
    assert max(step.micro_batch_sizes) < 5
    assert_same_parameters(ours, whole)
