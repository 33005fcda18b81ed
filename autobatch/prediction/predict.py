"""The tolerable batch of a GPU that is not here."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from autobatch.batches.regroup import Data
from autobatch.batches.sample import read_sample
from autobatch.breakdown import Breakdown, break_down
from autobatch.devices.base import HEADROOM_BYTES, HEADROOM_FRACTION
from autobatch.errors import DoesNotFitError
from autobatch.job import Job, OptimizerFactory
from autobatch.plan import BatchPlan, check_size
from autobatch.prediction.allocator import Replay, replay
from autobatch.prediction.gpus import CATALOGUE, Gpu, find_gpu
from autobatch.prediction.orders import Order, packed, traced
from autobatch.prediction.program import Change, TrainingStep
from autobatch.prediction.trace import ACTIVATIONS, Place, Trace, fitted
from autobatch.randomness import random_state
from autobatch.training.options import LossLike, StepOptions
from autobatch.training.precision import PrecisionName
from autobatch.units import format_bytes

GpuName = str | Gpu

_SAMPLE: Final = 16  # Examples of a Dataset that a trace repeats.
_SMALL: Final = (6, 9)  # Batches that are traced: not 1, which broadcasts.
_PROOF: Final = 33
_LARGEST: Final = 2**20  # As where a search knows no ceiling.


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """What one change of the step would allow.

    Attributes:
        change: In words.
        tolerable: The batch that it would allow, by the same rule.
    """

    change: str
    tolerable: int

    def __str__(self) -> str:
        return f"{self.change}: {self.tolerable}"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step needs on a GPU, and the batch that it tolerates. Made without that GPU.

    Attributes:
        gpu: Which one.
        precision: Of the forward passes.
        tolerable: The largest batch that fits with the largest context seen on such a card and
            the headroom that a search keeps: the safe end.
        largest: The largest that fits with the smallest context and no headroom: beyond it memory
            runs out.
        desired: As given.
        size: The batch that the following is about: the tolerable one, ``desired`` if that is
            smaller, and 1 where none is tolerable.
        peak_allocated_bytes: The peak of allocated bytes at ``size``.
        peak_reserved_bytes: The peak of what the allocator holds at ``size``.
        breakdown: What the memory holds at the peak; what a search would keep free is in it.
        at_peak: The phase and the operation that reach the peak.
        what_ifs: What else would allow which batch.
        notes: What the prediction could not know.
        others: The same step on the other GPUs that were asked for.
    """

    gpu: Gpu
    precision: PrecisionName
    tolerable: int
    largest: int
    desired: int | None
    size: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    breakdown: Breakdown
    at_peak: Place
    what_ifs: tuple[WhatIf, ...] = ()
    notes: tuple[str, ...] = ()
    others: "tuple[Prediction, ...]" = ()
    _step: "_Step" = field(repr=False)

    @property
    def plan(self) -> BatchPlan | None:
        """How the desired batch is cut; None where none is desired, or none tolerable."""
        if self.desired is None or not self.tolerable:
            return None
        return BatchPlan(desired=self.desired, tolerable=self.tolerable)

    def peak_bytes(self, batch: int) -> int:
        """Return the peak of allocated bytes at any batch, fitting or not."""
        batch = check_size("batch", batch)
        events = self._step.at(batch).events(batch, workspace_bytes=self.gpu.workspace_bytes)
        return replay(events).peak_allocated

    @property
    def line(self) -> str:
        """The answer in a line: the tolerable batch as an interval, and the plan."""
        interval = f"{self.tolerable}" + f" to {self.largest}" * (self.largest > self.tolerable)
        plan = "" if self.plan is None else f"; {self.plan}"
        return f"{self.gpu.name}, {self.precision}: tolerable batch {interval}{plan}"

    def __str__(self) -> str:
        return "\n".join([self._report(), *map(str, self.others)])

    def _report(self) -> str:
        parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in self.breakdown.parts.items())
        lines = [
            self.line,
            f"  at {self.size}: peak {format_bytes(self.peak_allocated_bytes)} allocated, "
            f"{format_bytes(self.peak_reserved_bytes)} reserved, of "
            f"{format_bytes(self.gpu.capacity_bytes)}",
            f"  at the peak, in {self.at_peak.phase} ({self.at_peak.operation}): {parts}",
            *(f"  what if {what_if}" for what_if in self.what_ifs),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def predict(
    model: nn.Module,
    data: Data,
    *,
    gpu: GpuName | Sequence[GpuName],
    desired: int | None = None,
    loss: LossLike | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    precision: PrecisionName = "fp32",
    mode: Literal["train"] = "train",
) -> Prediction:
    """Predict what ``find_batch_size`` would find on a GPU that is not here, in seconds.

    The step that training runs is traced in a process of its own, on tensors without values;
    nothing here is touched. docs/prediction.md says how well it is met, and when not.

    Args:
        model: As for ``find_batch_size``.
        data: As for ``find_batch_size``: a sample is read.
        gpu: A name such as ``"RTX 4090"``, a ``Gpu`` of one's own, or several of them; ``"all"``
            is the catalogue.
        desired: Examples per optimizer step, for a plan.
        loss: As for ``find_batch_size``.
        optimizer: As for ``find_batch_size``.
        precision: As for ``find_batch_size``.
        mode: ``"train"``.

    Raises:
        TypeError, ValueError: A bad argument.
        DoesNotFitError: Not even one example fits on the only GPU asked for.
        AutobatchError: If the process that traces ends otherwise.
    """
    if mode != "train":
        raise ValueError(f'mode must be "train", got {mode!r}')
    if desired is not None:
        desired = check_size("desired", desired)
    gpus = _gpus(gpu)
    options = StepOptions(loss=loss, precision=precision)
    # On the host: the model stays where it is, and a GPU that is here is not asked.
    job = Job.resolve(
        model,
        data,
        batch_size=_SAMPLE,
        options=options,
        optimizer=optimizer,
        device="cpu",
        memory_limit=None,
        headroom=None,
    )
    if job.source.one_pass:
        raise TypeError(
            "the sample of a one-pass iterable could not be given back; pass a DataLoader, a "
            "Dataset, tensors or a list of batches"
        )
    steps = {flash: _trace(job, options, flash=flash) for flash in {gpu.flash for gpu in gpus}}
    found = [_on(each, steps[each.flash], desired, precision) for each in gpus]
    if len(found) == 1 and not found[0].largest:
        raise _does_not_fit(found[0])
    return replace(found[0], others=tuple(found[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step at any batch.

    Attributes:
        order: How to trace it.
        traces: By batch, those that are known.
        every: The trace of every batch, if there is one.
        notes: What could not be known.
    """

    order: Order
    traces: dict[int, Trace]
    every: Trace | None
    notes: tuple[str, ...]

    def at(self, batch: int) -> Trace:
        """Return the trace at ``batch``: traced where it does not follow from others."""
        if self.every is not None:
            return self.every
        if batch not in self.traces:
            order = replace(self.order, batches=(batch,))
            self.traces[batch] = traced([order]).traces[0][0]
        return self.traces[batch]

    def replayed(self, batch: int, gpu: Gpu, limit_bytes: int, *, expandable: bool) -> Replay:
        """Return what the allocator makes of ``batch``."""
        events = self.at(batch).events(batch, workspace_bytes=gpu.workspace_bytes)
        return replay(events, limit_bytes=limit_bytes, expandable=expandable)

    def largest(self, gpu: Gpu, limit_bytes: int, *, expandable: bool = False) -> int:
        """Return the largest batch that fits, or 0."""

        def fits(batch: int) -> bool:
            return self.replayed(batch, gpu, limit_bytes, expandable=expandable).fits

        guess, every = 1, self.every
        if every is not None:  # What is allocated is the least that is needed.
            workspace = gpu.workspace_bytes
            guess = _boundary(
                lambda b: every.allocated_bytes(b, workspace_bytes=workspace) <= limit_bytes, 1
            )
        return _boundary(fits, max(guess, 1))


def _boundary(fits: Callable[[int], bool], guess: int) -> int:
    """Return the largest size that fits, or 0; few questions if it is near ``guess``."""
    good, bad, stride = 0, _LARGEST + 1, max(guess // 32, 1)
    size = guess
    while good < size < bad:
        if fits(size):
            good = size
            size = min(size + stride, bad - 1)
        else:
            bad = size
            size = max(size - stride, good + 1)
        stride *= 2
        if good and bad <= _LARGEST:
            size = (good + bad) // 2
    return good


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traced:
    """A step, and by name what else it could be."""

    base: _Step
    changed: dict[str, _Step]


def _trace(job: Job, options: StepOptions, *, flash: bool) -> _Traced:
    """Trace the step, and beside it what it might be changed into."""
    put_back = random_state([job.source.owner])
    try:
        sample = read_sample(job.source)
    finally:
        put_back()
    optimizer = job.recipe.optimizer
    step = TrainingStep(model=job.recipe.model, options=options, optimizer=optimizer, sample=sample)
    base = Order(program=_packed(job, step), batches=(*_SMALL, _PROOF), flash=flash)
    changes = {
        name: Order(program=_packed(job, changed), batches=_SMALL, flash=flash)
        for name, changed in _changes(step).items()
    }
    answers = _in_two_processes([base, *changes.values()])
    fits = [
        _fit(order, *answer)
        for order, answer in zip([base, *changes.values()], answers, strict=True)
    ]
    return _Traced(base=fits[0], changed=dict(zip(changes, fits[1:], strict=True)))


def _in_two_processes(orders: Sequence[Order]) -> list[tuple[Sequence[Trace], bool]]:
    """Trace every second order in a process, and the others in another; as they were ordered."""
    halves = [half for half in (orders[::2], orders[1::2]) if half]
    with ThreadPoolExecutor(len(halves)) as pool:  # Each thread waits for a process.
        answers = list(pool.map(traced, halves))
    found = [iter(answer.traces) for answer in answers]
    return [(next(found[n % 2]), answers[n % 2].on_cuda) for n in range(len(orders))]


def _packed(job: Job, step: TrainingStep) -> bytes:
    tensors = [t for module in job.modules for t in (*module.parameters(), *module.buffers())]
    for group in step.optimizer.param_groups:
        on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            tensors.append(parameter)
            entry = step.optimizer.state.get(parameter, {})
            tensors += [  # Counts of steps stay on the host: torch moves them nowhere.
                value
                for key, value in entry.items()
                if isinstance(value, torch.Tensor) and (key != "step" or on_device)
            ]
    return packed(step, tensors)


def _changes(step: TrainingStep) -> dict[str, TrainingStep]:
    """What else the step could be, where it is not that already."""
    kind, groups = type(step.optimizer), step.optimizer.param_groups
    changes: dict[str, Change] = {}
    if all("fused" in group and not group["fused"] for group in groups):
        changes[f"fused {kind.__name__}"] = "fused"
    if kind is not torch.optim.SGD:
        changes["SGD with momentum"] = "SGD"
    found = {name: replace(step, change=change) for name, change in changes.items()}
    if step.options.precision == "fp32":
        found["bf16"] = replace(step, options=replace(step.options, precision="bf16"))
    return found


def _fit(order: Order, traces: Sequence[Trace], on_cuda: bool) -> _Step:
    every = fitted(*traces)
    guessed = sum(traces[0].guessed.values())
    notes = []
    if guessed:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(traces[0].guessed.items()))
        notes.append(f"the step needs values that are not known; guessed: {kinds}")
    if every is None:
        notes.append("batches take different ways: each candidate was traced")
    if not on_cuda:
        notes.append(
            f"torch {torch.__version__} refuses tensors of a GPU that is not here: traced as on "
            "the CPU, whose kernels keep other memory; expect errors of tens of percent"
        )
    known = dict(zip(order.batches, traces, strict=True))
    return _Step(order=order, traces=known, every=every, notes=tuple(notes))


def _on(gpu: Gpu, traced: _Traced, desired: int | None, precision: PrecisionName) -> Prediction:
    """Predict for one GPU."""
    step = traced.base
    limit_bytes = _safe_bytes(gpu)
    tolerable = step.largest(gpu, limit_bytes)
    size = max(min(tolerable, desired or tolerable), 1)
    trace = step.at(size)
    events = trace.events(size, workspace_bytes=gpu.workspace_bytes)
    ran = replay(events, limit_bytes=limit_bytes if tolerable else None)
    assert ran.peak_at is not None, "a step allocates"
    live = trace.live_bytes(events, ran.peak_at)
    del live[ACTIVATIONS]  # They are what is left, with what blocks have beyond their tensors.
    return Prediction(
        gpu=gpu,
        precision=precision,
        tolerable=tolerable,
        largest=max(step.largest(gpu, gpu.capacity_bytes - gpu.context_bytes[0]), tolerable),
        desired=desired,
        size=size,
        peak_allocated_bytes=ran.peak_allocated,
        peak_reserved_bytes=ran.peak_reserved,
        breakdown=break_down(
            live,
            peak_bytes=ran.peak_allocated,
            reserved_bytes=ran.peak_reserved if tolerable else None,
            limit_bytes=limit_bytes,
            total_bytes=gpu.capacity_bytes,
            outside_bytes=gpu.context_bytes[1],
        ),
        at_peak=trace.place_of(events[ran.peak_at][0]),
        what_ifs=_what_ifs(gpu, traced, limit_bytes),
        notes=(*step.notes, *_of_the_gpu(gpu, precision)),
        _step=step,
    )


def _safe_bytes(gpu: Gpu) -> int:
    """What a search would allow the allocator, with the largest context."""
    headroom = max(int(gpu.capacity_bytes * HEADROOM_FRACTION), HEADROOM_BYTES)
    return gpu.capacity_bytes - gpu.context_bytes[1] - headroom


def _what_ifs(gpu: Gpu, traced: _Traced, limit_bytes: int) -> tuple[WhatIf, ...]:
    expandable = traced.base.largest(gpu, limit_bytes, expandable=True)
    changed = [
        WhatIf(change=name, tolerable=step.largest(gpu, limit_bytes))
        for name, step in traced.changed.items()
        if name != "bf16" or gpu.bf16
    ]
    return (WhatIf(change="expandable segments", tolerable=expandable), *changed)


def _of_the_gpu(gpu: Gpu, precision: PrecisionName) -> list[str]:
    notes = []
    if precision == "bf16" and not gpu.bf16:
        notes.append(f"{gpu.name} has no bfloat16 of its own: it is slow there")
    if gpu.derived:
        notes.append(f"what PyTorch sees of {gpu.name} is not published, but derived")
    return notes


def _does_not_fit(prediction: Prediction) -> DoesNotFitError:
    """Say by how much, and what would help."""
    gpu = prediction.gpu
    limit = gpu.capacity_bytes - gpu.context_bytes[0]
    missing = prediction.peak_bytes(1) - limit
    helps = [str(what_if) for what_if in prediction.what_ifs if what_if.tolerable]
    message = f"{gpu.name} lacks {format_bytes(max(missing, 0))}" + (
        f"; a batch that would fit with {', '.join(helps)}" if helps else ""
    )
    return DoesNotFitError(1, limit, prediction.breakdown, message)


def _gpus(asked: Any) -> list[Gpu]:
    if asked == "all":
        return list(CATALOGUE)
    several = [asked] if isinstance(asked, str | Gpu) else asked
    if not isinstance(several, Sequence) or not several:
        raise TypeError(
            f'gpu must be a name such as "RTX 4090", a Gpu, a list of them, or "all", got {asked!r}'
        )
    return [each if isinstance(each, Gpu) else find_gpu(each) for each in several]
