"""The numbers of a step cost at most one wait for the device, and are those of the CPU."""

import itertools
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_exact, assert_same_parameters, sgd, small_model, undivided_steps
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch import Accumulator, NonFiniteLossError, StepResult
from autobatch.devices.base import MemoryDevice
from autobatch.devices.cpu import CpuDevice
from autobatch.training.engine import gradient_pass
from autobatch.training.engine.loss_record import LossRecord, StepNumbers

CPU = CpuDevice()
NonFinite = Literal["raise", "skip", "ignore"]


class Waiting(CpuDevice):
    """A device from which numbers are read by waiting for it."""

    reads_at_once = False


class DeviceLossRecord(LossRecord):
    """Goes the way of a device other than the CPU, with tensors that are on the CPU."""

    def __init__(self, micro_batches: int, _: MemoryDevice) -> None:
        super().__init__(micro_batches, Waiting())
        assert self._on_device is not None


class Waits:
    """Counts what would make the host wait: a number read from a tensor, or a shape from values."""

    def __init__(self) -> None:
        self.count = 0
        self._modes = (_Reads(self), _Lists(self))

    def __enter__(self) -> "Waits":
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Reads(TorchDispatchMode):
    """Sees .item(), float(), bool(), == in an if, torch.equal, nonzero and boolean indices."""

    waiting = (
        *("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"),
        *("_unique2", "unique_dim", "repeat_interleave"),
    )

    def __init__(self, waits: Waits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits = waits

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        self.waits.count += by_mask or func.overloadpacket.__name__ in self.waiting
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Sees .tolist(), .cpu() and .numpy(), which on the CPU read memory without an operation."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        self.waits.count += func in (Tensor.tolist, Tensor.cpu, Tensor.numpy)
        return func(*args, **(kwargs or {}))


def regression(examples: int = 10, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(examples, 3, generator=generator, dtype=torch.float64)


def sum_and_terms(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return (outputs - targets).square().sum(), (targets > 0).sum()


def seen(step: Callable[[], StepResult]) -> tuple[StepResult, int, int]:
    """The step, how often it waited, and how often the first reading of its loss did."""
    with Waits() as waits:
        result = step()
        in_step = waits.count
        _ = result.loss, result.grad_norm, result.loss
    return result, in_step, waits.count - in_step


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_pass, "LossRecord", DeviceLossRecord)


@pytest.mark.parametrize("micro_batch", [1, 4, 10])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(
    ("nonfinite", "in_step", "afterwards"), [("raise", 1, 0), ("skip", 1, 0), ("ignore", 0, 1)]
)
@pytest.mark.usefixtures("device")
@pytest.mark.usefixtures("unasked")
def test_a_step_waits_once_or_when_its_loss_is_read(
    micro_batch: int, clip: float | None, nonfinite: NonFinite, in_step: int, afterwards: int
) -> None:
    ours, whole = small_model(), small_model()
    accumulator = Accumulator(
        ours,
        sgd(ours),
        nn.MSELoss(),
        micro_batch=micro_batch,
        nonfinite=nonfinite,
        clip_grad_norm=clip,
    )
    for _ in range(3):
        result, waited, later = seen(lambda: accumulator.step(regression()))
        assert (waited, later) == (in_step, afterwards)
    if clip is None:
        losses = undivided_steps(whole, sgd(whole), F.mse_loss, [regression()] * 3)
        assert_exact(result.loss, losses[-1])
        assert_same_parameters(ours, whole)
    assert (result.grad_norm is None) == (clip is None and nonfinite != "skip")


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.usefixtures("device")
def test_terms_that_only_the_loss_knows_cost_no_second_wait(nonfinite: NonFinite) -> None:
    def per_term(outputs: Tensor, targets: Tensor) -> Tensor:
        summed, terms = sum_and_terms(outputs, targets)
        return summed / terms

    def batch_loss(model: nn.Module, batch: object) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        return sum_and_terms(model(batch[0]), batch[1])

    ours, whole = small_model(), small_model()
    accumulator = Accumulator(
        ours, sgd(ours), batch_loss=batch_loss, micro_batch=4, nonfinite=nonfinite
    )
    for _ in range(2):  # In which what the function says is checked.
        accumulator.step(regression())
    result, waited, later = seen(lambda: accumulator.step(regression()))
    assert (waited, later) == (1, 0), "whether there is any term has to be known before the step"
    losses = undivided_steps(whole, sgd(whole), per_term, [regression()] * 3)
    assert_exact(result.loss, losses[-1])
    assert_same_parameters(ours, whole)
    assert result.terms == float((regression()[1] > 0).sum())


@pytest.mark.usefixtures("device")
def test_a_batch_that_counts_no_term_is_skipped_on_a_device_too() -> None:
    model, before = small_model(), small_model()

    def nothing(model: nn.Module, batch: object) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        return model(batch[0]).sum() * 0, torch.zeros(())

    step = Accumulator(model, sgd(model), batch_loss=nothing, micro_batch=4).step(regression())
    assert step.reason == "no valid term"
    assert_same_parameters(model, before)


@pytest.mark.usefixtures("device")
def test_the_error_names_the_micro_batch_on_a_device_too() -> None:
    model = small_model()
    x, y = regression()
    x[5, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="micro-batch 2 of 3"):
        Accumulator(model, sgd(model), nn.MSELoss(), micro_batch=4).step((x, y))


@pytest.mark.usefixtures("device")
def test_a_late_loss_is_that_of_its_own_step_and_may_be_sent_elsewhere() -> None:
    ours, whole = small_model(), small_model()
    accumulator = Accumulator(
        ours, sgd(ours), nn.MSELoss(), micro_batch=4, nonfinite="ignore", clip_grad_norm=1e9
    )
    batches = [regression(seed=seed) for seed in (1, 2, 3)]
    steps = [accumulator.step(batch) for batch in batches]
    losses = undivided_steps(whole, sgd(whole), F.mse_loss, batches)
    sent: list[StepResult] = pickle.loads(pickle.dumps(steps))
    assert_exact([step.loss for step in sent], losses)
    assert_exact([step.loss for step in steps], losses)
    assert [step.grad_norm for step in sent] == [step.grad_norm for step in steps]


def test_the_counter_of_waits_sees_them() -> None:
    values = torch.arange(3.0)
    reads: list[Callable[[], object]] = [
        *(values.sum().item, values.tolist, values.cpu, values.numpy, values.nonzero),
        *(
            lambda: bool(values.sum()),
            lambda: float(values[0]),
            lambda: torch.equal(values, values),
        ),
        lambda: values[values > 1],
    ]
    for read in reads:
        with Waits() as waits:
            read()
        assert waits.count > 0, read
    with Waits() as waits:
        values.sum().add(1).clamp(max=2)
    assert waits.count == 0


# The record by itself.

finite = st.floats(-1e6, 1e6)


def filled(
    kind: type[LossRecord],
    losses: Sequence[float],
    terms: Sequence[float] | None,
    norm: float | None,
) -> LossRecord:
    record = kind(len(losses), CPU)
    for loss, count in itertools.zip_longest(losses, terms or ()):
        record.add(torch.tensor(loss, dtype=torch.float64), count)
    if norm is not None:
        record.add_norm(torch.tensor(norm))
    return record


@given(
    rows=st.lists(st.tuples(finite, finite), min_size=1, max_size=70),
    counted=st.booleans(),
    norm=st.none() | st.just(0.5),
)
def test_both_ways_read_the_same(
    rows: list[tuple[float, float]], counted: bool, norm: float | None
) -> None:
    losses, terms = [loss for loss, _ in rows], [count for _, count in rows] if counted else None
    one, other = (filled(kind, losses, terms, norm) for kind in (LossRecord, DeviceLossRecord))
    assert one.read().losses == other.read().losses == losses
    assert one.read().norm == other.read().norm == norm
    assert one.read().loss_sum == other.read().loss_sum
    assert (one.terms is None) == (other.terms is None) == (terms is None)
    if terms is not None:
        assert one.read().terms == pytest.approx(sum(terms), abs=1e-6)
        assert other.read().terms == pytest.approx(sum(terms), abs=1e-6)
        assert float(other.terms or 0.0) == pytest.approx(float(one.terms or 0.0), abs=1e-6)


def test_terms_of_some_micro_batches_only_are_the_terms_of_all() -> None:
    for kind, terms in itertools.product((LossRecord, DeviceLossRecord), ([None, 3], [3, None])):
        record = kind(2, CPU)
        for loss, count in zip((1.0, 2.0), terms, strict=True):
            record.add(torch.tensor(loss), count)
        assert record.read() == StepNumbers(losses=[1.0, 2.0], terms=3.0, norm=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_small_losses_of_few_bits_are_not_lost(dtype: torch.dtype) -> None:
    losses = [torch.tensor(1.0, dtype=dtype)] * 2500
    for kind in (LossRecord, DeviceLossRecord):
        record = kind(len(losses), CPU)
        for loss in losses:
            record.add(loss, loss)
        assert record.read().loss_sum == 2500
        assert float(record.terms or 0) == record.read().terms == 2500
    if dtype is not torch.float32:
        assert float(sum(losses[1:], losses[0])) < 2500, "the control: one by one they are lost"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_sum_that_is_not_finite_is_read_as_such(bad: float) -> None:
    for kind in (LossRecord, DeviceLossRecord):
        entries = filled(kind, [1.0, bad, 2.0], None, None).read()
        assert entries.loss_sum == pytest.approx(bad, nan_ok=True)
    both = filled(LossRecord, [float("inf"), -float("inf")], None, None).read()
    assert both.loss_sum != both.loss_sum


@pytest.mark.parametrize("sent", [True, False])
def test_a_result_that_is_kept_keeps_neither_the_device_nor_tensors(sent: bool) -> None:
    held = torch.ones(1)
    device = Waiting(lambda: [held])
    record = LossRecord(1, device)
    record.add(torch.tensor(2.0), None)
    if sent:
        record.start_reading()
    else:
        record.read()
    gone = weakref.ref(device)
    del device
    assert gone() is None
    assert record.read().losses == [2.0]
    assert not any(isinstance(value, Tensor) for value in vars(record).values())


def test_it_waits_once_however_often_it_is_read() -> None:
    record = filled(DeviceLossRecord, [1.0, 2.0], [1, 2], 0.5)
    with Waits() as waits:
        assert record.read() is record.read()
    assert waits.count == 1
