"""The tolerable batch of a GPU that is not here."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from torch import nn
from torch.optim import Optimizer

from autobatch.batches.regroup import Data
from autobatch.breakdown import Breakdown, break_down
from autobatch.devices.base import standard_headroom
from autobatch.errors import DoesNotFitError
from autobatch.job import Job, OptimizerFactory
from autobatch.plan import BatchPlan, check_size
from autobatch.prediction.allocator import replay
from autobatch.prediction.gpus import CATALOGUE, Gpu, find_gpu
from autobatch.prediction.step import Step, TracedStep, trace_step
from autobatch.prediction.trace import ACTIVATIONS, Place
from autobatch.training.options import LossLike, StepOptions
from autobatch.training.precision import PrecisionName
from autobatch.units import format_bytes

GpuName = str | Gpu

_SAMPLE: Final = 16  # Examples of a Dataset that a trace repeats.


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
    _step: "Step" = field(repr=False)

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
    steps = {flash: trace_step(job, options, flash=flash) for flash in {gpu.flash for gpu in gpus}}
    found = [_on(each, steps[each.flash], desired, precision) for each in gpus]
    if len(found) == 1 and not found[0].largest:
        raise _does_not_fit(found[0])
    return replace(found[0], others=tuple(found[1:]))


def _on(gpu: Gpu, traced: TracedStep, desired: int | None, precision: PrecisionName) -> Prediction:
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
    headroom_bytes = standard_headroom(gpu.capacity_bytes)
    return gpu.capacity_bytes - gpu.context_bytes[1] - headroom_bytes


def _what_ifs(gpu: Gpu, traced: TracedStep, limit_bytes: int) -> tuple[WhatIf, ...]:
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
    """Say by how much, with the smallest context and no headroom, and what would help."""
    gpu = prediction.gpu
    limit = gpu.capacity_bytes - gpu.context_bytes[0]
    missing = prediction.peak_bytes(1) - limit
    breakdown = replace(
        prediction.breakdown,
        outside_bytes=gpu.context_bytes[0],
        headroom_bytes=0,
        free_bytes=max(-missing, 0),
        missing_bytes=max(missing, 0),
    )
    helps = [str(what_if) for what_if in prediction.what_ifs if what_if.tolerable]
    message = f"{gpu.name} lacks {format_bytes(max(missing, 0))}" + (
        f"; a batch that would fit with {', '.join(helps)}" if helps else ""
    )
    return DoesNotFitError(1, limit, breakdown, message)


def _gpus(asked: Any) -> list[Gpu]:
    if asked == "all":
        return list(CATALOGUE)
    several = [asked] if isinstance(asked, str | Gpu) else asked
    if not isinstance(several, Sequence) or not several:
        raise TypeError(
            f'gpu must be a name such as "RTX 4090", a Gpu, a list of them, or "all", got {asked!r}'
        )
    return [each if isinstance(each, Gpu) else find_gpu(each) for each in several]
