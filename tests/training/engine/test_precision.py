"""Autocast, a GradScaler and the gradient buffer equal a plain loop written by hand."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, assert_same_parameters, sgd, small_model, twin
from states import fingerprint
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch import Accumulator, StepInterruptedError, find_and_train, find_batch_size
from autobatch.devices.cpu import CpuDevice
from autobatch.events import TrainingStarted
from autobatch.training.engine.gradient_buffer import GradientBuffer
from autobatch.training.engine.optimizer_step import OptimizerStep
from autobatch.training.engine.precision import Precision, scaler_for

Pair = tuple[Tensor, Tensor]
SIZES = (4, 3, 3)


def samples(examples: int = 10, dtype: torch.dtype = torch.float32, seed: int = 1) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 3, (examples,), generator=generator)


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return small_model().to(dtype)


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# Autocast.


def by_hand(
    model: nn.Module, batch: Pair, sizes: Sequence[int], dtype: torch.dtype | None = torch.bfloat16
) -> float:
    """Sums under autocast, each in a context of its own; backward outside; one step of SGD."""
    optimizer, total, examples = sgd(model), 0.0, len(batch[1])
    optimizer.zero_grad()
    for x, y in zip(*(tensor.split(list(sizes)) for tensor in batch), strict=True):
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            summed = F.cross_entropy(model(x.clone()), y, reduction="sum")
        (summed / examples).backward()
        total += summed.item()
    optimizer.step()
    return total / examples


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", None)], ids=["bf16", "fp32"]
)
def test_two_steps_are_those_of_a_loop_by_hand(precision: str, dtype: torch.dtype | None) -> None:
    ours, theirs = small(), small()
    accumulator = Accumulator(ours, sgd(ours), micro_batch=4, precision=precision)  # type: ignore[arg-type]
    for seed in (1, 2):
        loss = accumulator.step(samples(seed=seed)).loss
        assert loss == pytest.approx(by_hand(theirs, samples(seed=seed), SIZES, dtype), rel=1e-6)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-7)


def test_a_loop_in_another_precision_is_seen() -> None:
    ours, theirs = small(), small()
    Accumulator(ours, sgd(ours), micro_batch=4, precision="bf16").step(samples())
    by_hand(theirs, samples(), SIZES, None)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)


class Casts(TorchDispatchMode):
    """Counts casts of one tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight, self.count = weight, 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].data_ptr() == self.weight.data_ptr()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kept", "casts"), [(True, 1), (False, 4)], ids=["kept", "the control"])
def test_autocast_casts_the_weights_once_a_window(
    kept: bool, casts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(Precision, "window", lambda _: nullcontext())
    model = small()
    accumulator = Accumulator(model, sgd(model), micro_batch=3, precision="bf16")
    for _ in range(2):
        with Casts(next(model.parameters())) as counting:
            assert len(accumulator.step(samples()).micro_batch_sizes) == 4
        assert counting.count == casts


@pytest.mark.usefixtures("unasked")
def test_a_window_that_is_run_again_casts_anew_and_steps_on_what_it_has() -> None:
    ours, theirs = small(), small()
    once = iter([out_of_memory()])

    def fail(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) < 4:
            for error in once:
                raise error

    ours[2].register_forward_pre_hook(fail)
    accumulator = Accumulator(ours, sgd(ours), micro_batch=4, precision="bf16")
    step = accumulator.step(samples())
    assert (step.replays, step.micro_batch_sizes) == (1, (3, 3, 2, 2))
    by_hand(theirs, samples(), (3, 3, 2, 2))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


class Records(torch.autograd.Function):
    """The identity; keeps whether autocast was on, forwards and backwards."""

    seen: list[tuple[str, bool]]

    @staticmethod
    def forward(ctx: object, x: Tensor, name: str) -> Tensor:
        ctx.name = name  # type: ignore[attr-defined]
        Records.seen.append((name, torch.is_autocast_enabled("cpu")))
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        name = f"backward of {ctx.name}"  # type: ignore[attr-defined]
        Records.seen.append((name, torch.is_autocast_enabled("cpu")))
        return gradients[0], None


def recorded(x: Tensor, name: str) -> Tensor:
    result = Records.apply(x, name)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


def test_forward_and_loss_run_under_autocast_and_backward_does_not() -> None:
    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, x: Tensor) -> Tensor:
            return recorded(self.inner(x), "forward")

    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        summed = F.cross_entropy(outputs, targets, reduction="sum")
        return recorded(summed, "loss"), len(targets)

    Records.seen = []
    model = Recorded()
    Accumulator(model, sgd(model), loss, precision="bf16").step(samples())
    on, off = ["forward", "loss"], ["backward of forward", "backward of loss"]
    assert set(Records.seen) == {(name, True) for name in on} | {(name, False) for name in off}


def test_under_the_caller_s_autocast_no_step_sees_weights_of_the_one_before() -> None:
    ours, theirs = small(), small()
    accumulator = Accumulator(ours, sgd(ours), micro_batch=4)
    for seed in (1, 2, 3):
        with torch.autocast("cpu", torch.bfloat16):
            first = accumulator.step(samples(seed=seed)).loss
            second = accumulator.step(samples(seed=seed)).loss
        expected = [by_hand(theirs, samples(seed=seed), SIZES) for _ in range(2)]
        assert [first, second] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp64", None, 16, "bfloat16"])
def test_an_unknown_precision_is_refused(precision: object) -> None:
    model = small()
    with pytest.raises(ValueError, match='precision must be "fp32", "bf16" or "fp16"'):
        Accumulator(model, sgd(model), precision=precision)  # type: ignore[arg-type]


# A GradScaler.


class Spy(GradScaler):
    """Keeps the order of calls."""

    def __init__(self, calls: list[str], init_scale: float = 2.0**10) -> None:
        super().__init__("cpu", init_scale=init_scale)
        self.calls = calls

    def scale(self, outputs: Tensor) -> Tensor:  # type: ignore[override]
        self.calls.append("scale")
        return super().scale(outputs)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("unscale")
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: object, **kwargs: object) -> None:
        self.calls.append("step")
        super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        self.calls.append("update")
        super().update(new_scale)


def infinite(gradients: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
    return tuple(gradient * math.inf for gradient in gradients)


def overflowing() -> tuple[nn.Sequential, torch.optim.Optimizer, Pair]:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).float()
    x, y = samples()
    return model, torch.optim.Adam(model.parameters(), lr=0.1), (x, y)


def test_the_gradient_is_unscaled_clipped_stepped_on_and_the_scale_updated_once_a_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    clip = nn.utils.clip_grads_with_norm_

    def spy(parameters: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
        calls.append("clip")
        clip(parameters, max_norm, norm)

    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", spy)
    model = small()
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("move"))
    accumulator = Accumulator(
        model, optimizer, micro_batch=4, scaler=Spy(calls), clip_grad_norm=1.0
    )
    for _ in range(2):
        calls.clear()
        accumulator.step(samples())
        assert calls == ["scale", "unscale", "clip", "step", "move", "update"]


@settings(max_examples=15)
@given(micro_batch=st.integers(1, 10), power=st.integers(0, 30), seed=st.integers(0, 2**16))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(
    dtype: torch.dtype, micro_batch: int, power: int, seed: int
) -> None:
    ours, plain = small(dtype), small(dtype)
    scaled = Accumulator(
        ours,
        sgd(ours),
        micro_batch=micro_batch,
        scaler=GradScaler("cpu", init_scale=2.0**power, growth_interval=1),
        clip_grad_norm=0.5,
    )
    unscaled = Accumulator(plain, sgd(plain), micro_batch=micro_batch, clip_grad_norm=0.5)
    for place in range(2):  # At the second step the scale has grown.
        batch = samples(10, dtype, seed + place)
        one, other = scaled.step(batch), unscaled.step(batch)
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_gradient_that_stays_scaled_is_seen() -> None:
    ours, plain = small(), small()
    for model, scale in ((ours, 4.0), (plain, 1.0)):
        (F.cross_entropy(model(samples()[0]), samples()[1]) * scale).backward()
        sgd(model).step()
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(ours, plain)


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("how", ["scale", "gradient"])
def test_an_overflow_is_skipped_lowers_the_scale_and_the_next_step_works(
    how: str, nonfinite: str
) -> None:
    model, optimizer, (x, y) = overflowing()
    scaler = GradScaler("cpu", init_scale=2.0**10)
    accumulator = Accumulator(
        model,
        optimizer,
        micro_batch=4,
        scaler=scaler,
        nonfinite=nonfinite,  # type: ignore[arg-type]
        scheduler=lambda it: torch.optim.lr_scheduler.ExponentialLR(it, 0.5),
    )
    assert not accumulator.step((x, y)).skipped
    before = fingerprint(list(model.parameters()), optimizer)
    if how == "scale":
        scaler.update(2.0**127)
        bad = (x * 1e3, y)
        model[1].eval()  # Or it would make all inputs of one size.
    else:
        bad = (x, y)
        hook = model[2].register_full_backward_hook(lambda *gradients: infinite(gradients[1]))
    scale = scaler.get_scale()
    step = accumulator.step(bad)
    assert (step.skipped, step.reason, accumulator.steps) == (True, "overflow", 1)
    assert math.isfinite(step.loss)
    assert fingerprint(list(model.parameters()), optimizer) == before
    assert scaler.get_scale() == scale / 2
    if how == "gradient":
        hook.remove()
        assert not accumulator.step((x, y)).skipped
        assert optimizer.param_groups[0]["lr"] == 0.1 / 4


def test_a_loss_that_is_nan_is_no_overflow() -> None:
    model, optimizer, (x, y) = overflowing()
    scaler = GradScaler("cpu", init_scale=4.0)
    accumulator = Accumulator(model, optimizer, scaler=scaler, nonfinite="skip")
    before = fingerprint(model, optimizer)
    assert accumulator.step((x * math.nan, y)).reason == "not finite"
    assert fingerprint(model, optimizer) == before
    assert scaler.get_scale() == 2
    assert not accumulator.step((x, y)).skipped


def test_a_batch_without_valid_terms_leaves_a_scaler_ready_for_the_next() -> None:
    def pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(outputs, targets, reduction="sum"), (targets != -100).sum()

    ours, plain = small(), small()
    scaler = GradScaler("cpu", init_scale=4.0)
    accumulator = Accumulator(ours, sgd(ours), pair, micro_batch=4, scaler=scaler)
    x, y = samples()
    before = fingerprint(ours)
    assert accumulator.step((x, torch.full_like(y, -100))).reason == "no valid term"
    assert fingerprint(ours) == before
    accumulator.step((x, y))
    Accumulator(plain, sgd(plain), pair, micro_batch=4).step((x, y))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_step_that_ran_out_of_memory_is_taken_again_under_a_scaler() -> None:
    ours, plain = small(), small()
    optimizer, calls = sgd(ours), [out_of_memory()]

    def fail(*_: object) -> None:
        while calls:
            raise calls.pop()

    optimizer.register_step_pre_hook(fail)
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=1)
    Accumulator(ours, optimizer, micro_batch=4, scaler=scaler).step(samples())
    Accumulator(plain, sgd(plain), micro_batch=4).step(samples())
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert scaler.get_scale() == 8


class Fails(TorchDispatchMode):
    """Runs out of memory at one operation, counted from 1."""

    def __init__(self, at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.operations = at, 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        self.operations += 1
        if self.operations == self.at:
            raise out_of_memory()
        return func(*args, **(kwargs or {}))


@settings(max_examples=20)
@given(point=st.integers(1, 150))
def test_running_out_at_any_operation_under_a_scaler_changes_nothing(point: int) -> None:
    ours, plain = small(torch.float64), small(torch.float64)
    calls: list[str] = []
    scaler = Spy(calls)
    accumulator = Accumulator(ours, sgd(ours), micro_batch=4, scaler=scaler, clip_grad_norm=0.5)
    batches = [samples(10, torch.float64, seed) for seed in (1, 2)]
    try:
        with Fails(point):
            step = accumulator.step(batches[0])
    except (torch.OutOfMemoryError, StepInterruptedError):  # Outside the window.
        return
    accumulator.step(batches[1])
    unscaled = Accumulator(plain, sgd(plain), micro_batch=4, clip_grad_norm=0.5)
    losses = [unscaled.step(batch).loss for batch in batches]
    assert_exact(step.loss, losses[0])
    assert_same_parameters(ours, plain)
    assert calls.count("update") == 2
    assert scaler.state_dict()["_growth_tracker"] == 2


def test_running_out_after_the_gradient_is_unscaled_lets_the_replay_unscale_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, plain = small(), small()
    calls: list[str] = []
    measure, once = nn.utils.get_total_norm, iter([out_of_memory()])

    def fail(gradients: Sequence[Tensor]) -> Tensor:
        for error in once:
            raise error
        return measure(gradients)

    monkeypatch.setattr(nn.utils, "get_total_norm", fail)
    accumulator = Accumulator(ours, sgd(ours), micro_batch=4, scaler=Spy(calls))
    step = accumulator.step(samples())
    Accumulator(plain, sgd(plain), micro_batch=3).step(samples())
    # The first two calls are forgotten with all else that the scaler had noted.
    assert calls == ["scale", "unscale", "step", "update"]
    assert step.micro_batch_sizes == (3, 3, 2, 2)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_search_leaves_the_scaler_as_it_was_and_steps_though_it_would_not() -> None:
    model = nn.Linear(5, 3)
    x, y = samples(32)
    scaler = GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steps: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    before = fingerprint(scaler, vars(scaler))
    found: list[dict[str, object]] = []
    in_trials: list[int] = []

    def observe(event: object) -> None:
        if isinstance(event, TrainingStarted):
            found.append(fingerprint(scaler, vars(scaler)))
            in_trials.append(len(steps))

    find_and_train(model, [(x * 1e6, y)], 32, optimizer=optimizer, scaler=scaler, progress=observe)
    assert [state["0:GradScaler"] for state in found] == [before["0:GradScaler"]]
    assert [state["1:dict"] for state in found] == [before["1:dict"]]
    assert in_trials[0] > 0
    assert scaler.get_scale() == 2.0**126, "the control: in training it overflows"


def test_a_search_in_fp16_needs_no_scaler_of_the_user_s() -> None:
    model = small()
    before = fingerprint(model)
    assert find_batch_size(model, samples(16), precision="fp16").size == 16
    assert fingerprint(model) == before


def test_fp16_makes_a_scaler_and_a_disabled_one_is_none() -> None:
    made = scaler_for("fp16", None, "cpu")
    assert isinstance(made, GradScaler)
    assert scaler_for("bf16", None, "cpu") is None
    assert scaler_for("fp16", made, "cpu") is made
    assert scaler_for("fp16", GradScaler("cpu", enabled=False), "cpu") is None


def test_what_is_no_scaler_is_refused() -> None:
    model = small()
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler or None"):
        Accumulator(model, sgd(model), scaler=True)  # type: ignore[arg-type]


def test_fp16_trains() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    accumulator = Accumulator(model, optimizer, micro_batch=4, precision="fp16")
    losses = [accumulator.step(samples()).loss for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_step_is_skipped_without_a_scaler_too() -> None:
    model = small()
    before = twin(model)
    OptimizerStep(optimizer=sgd(model), device=CpuDevice()).skip()
    assert same(model, before)


# Gradients of 16 bits, summed in more.


def tiny(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Pair]:
    """One large contribution, then 511 that are each rounded away when added to it."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(dtype)
    x, y = samples(512)
    x[1:] *= 1e-3
    return model, (x.to(dtype), y)


def summed_in_float32(
    model: nn.Module, batch: Pair, factor: float, rounded: Callable[[Tensor], Tensor]
) -> nn.Module:
    """Example by example, in float32; rounded to 16 bits once, by the order of ``rounded``."""
    model = twin(model)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for x, y in zip(batch[0].split(1), batch[1].split(1), strict=True):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        gradients = torch.autograd.grad(
            loss, list(model.parameters()), torch.full_like(loss, 1 / len(batch[1]))
        )
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    for parameter, total in zip(model.parameters(), sums, strict=True):
        parameter.grad = (rounded(total) * factor).to(parameter.dtype)
    sgd(model).step()
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def wide_step(
    model: nn.Module,
    batch: Pair,
    dtype: torch.dtype | None = torch.float32,
    loss: Callable[[Tensor, Tensor], object] | None = None,
) -> nn.Module:
    model = twin(model)
    Accumulator(model, sgd(model), loss, micro_batch=1, gradient_dtype=dtype).step(batch)
    return model


def test_512_tiny_gradients_of_16_bits_are_summed_in_32_and_rounded_once() -> None:
    model, batch = tiny()
    expected = summed_in_float32(model, batch, 1.0, lambda total: total)
    assert same(wide_step(model, batch), expected)
    assert not same(wide_step(model, batch, None), expected), "the control"


def test_terms_that_the_loss_counts_are_divided_by_before_rounding() -> None:
    def thirds(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return F.cross_entropy(outputs, targets, reduction="sum"), 3 * len(targets)

    model, batch = tiny()
    stepped = wide_step(model, batch, loss=thirds)
    assert same(stepped, summed_in_float32(model, batch, 1 / 3, lambda total: total))
    rounded_first = summed_in_float32(model, batch, 1 / 3, Tensor.bfloat16)
    assert not same(stepped, rounded_first), "the control"


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_frozen_and_wide_parameters_are_left_alone(wide: torch.dtype) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.frozen = nn.Linear(5, 5).bfloat16().requires_grad_(False)
            self.narrow = nn.Linear(5, 4).bfloat16()
            self.wide = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.wide(self.narrow(self.frozen(x)).float())
            return scores

    ours, expected = Mixed(), Mixed()
    x, y = samples(8)
    batch = (x.bfloat16(), y)
    Accumulator(ours, sgd(ours), micro_batch=1, gradient_dtype=wide).step(batch)
    stepped = summed_in_float32(expected.requires_grad_(True), batch, 1.0, lambda total: total)
    assert isinstance(stepped, Mixed)
    assert same(ours.narrow, stepped.narrow)
    assert same(ours.frozen, Mixed().frozen)
    torch.testing.assert_close(ours.wide.state_dict(), stepped.wide.state_dict())


def test_only_gradients_of_16_bits_cost_a_sum() -> None:
    narrow, wide = (nn.Parameter(torch.ones(2, dtype=t)) for t in (torch.float16, torch.float32))
    buffer = GradientBuffer([narrow, wide], torch.float32)
    narrow.grad, wide.grad = torch.ones_like(narrow), torch.ones_like(wide)
    buffer.add_gradients()
    assert [parameter.grad is None for parameter in (narrow, wide)] == [True, False]
    assert [total.dtype for total in buffer.sums] == [torch.float32]


def test_a_retry_begins_with_an_empty_gradient_buffer() -> None:
    model, batch = tiny()
    expected = summed_in_float32(model, batch, 1.0, lambda total: total)
    once = iter([out_of_memory()])
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 200:
            for error in once:
                raise error

    model.register_forward_pre_hook(fail)
    accumulator = Accumulator(model, sgd(model), micro_batch=1, gradient_dtype=torch.float32)
    assert accumulator.step(batch).replays == 1
    assert same(model, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, "float32"])
def test_a_dtype_that_is_not_wide_is_refused(dtype: object) -> None:
    model = small()
    with pytest.raises(ValueError, match=r"gradient_dtype must be torch\.float32"):
        Accumulator(model, sgd(model), gradient_dtype=dtype)  # type: ignore[arg-type]
