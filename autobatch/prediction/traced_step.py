"""A step's memory at any batch, from traces at a few batches, and that of the step's variants."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.data.sample import read_sample
from autobatch.prediction.activation_checkpointing import reason_against
from autobatch.prediction.caching_allocator import Replay, replay
from autobatch.prediction.fake_cuda import RECURRENT
from autobatch.prediction.gpu_catalogue import Gpu
from autobatch.prediction.programs import ForwardPass, OwnStep, TrainingStep, Updates
from autobatch.prediction.trace import Program, Trace, fit_traces
from autobatch.prediction.tracing_process import (
    modules_and_optimizers,
    pack_program,
    trace_in_processes,
)
from autobatch.prediction.tracing_worker import TracingRequest
from autobatch.state.rng import random_state
from autobatch.training.options import StepOptions
from autobatch.training.workload import Workload

_SMALL: Final = (6, 9)  # Traced batches. A batch of 1 would broadcast.
_PROOF: Final = 33  # The batch that must agree with what follows from the others.
_TIME_LIMIT_SECONDS: Final = 30.0
_MANY: Final = 150  # With more tensors a second process saves more time than its start takes.
LARGEST: Final = 2**20  # The largest batch that is considered, as in a search without a ceiling.

PredictionMode = Literal["train", "inference"]
ACTIVATION_CHECKPOINTING: Final = "activation checkpointing"


@dataclass(slots=True)
class TracingTimeLimit:
    """The time that is left for traces of single batches, which a loop over the batch makes slow.

    Attributes:
        seconds: The remaining time.
        has_ended: Whether a batch was skipped because no time remained.
    """

    seconds: float
    has_ended: bool = False

    @property
    def is_over(self) -> bool:
        """Whether no time remains."""
        return self.seconds <= 0

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Subtract the time that passes inside."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds -= time.monotonic() - began


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """A step whose memory is known, or can be traced, at any batch.

    Attributes:
        request: The request that traces the step.
        traces: The known traces by batch.
        every: The trace of every batch; None if batches differ in more than the sizes of tensors.
        notes: What the trace could not know.
        time_limit: The time for traces of single batches.
    """

    request: TracingRequest
    traces: dict[int, Trace]
    every: Trace | None
    notes: tuple[str, ...]
    time_limit: TracingTimeLimit = field(
        default_factory=lambda: TracingTimeLimit(_TIME_LIMIT_SECONDS)
    )

    def at(self, batch: int) -> Trace:
        """Return the trace at ``batch``, which takes a process if it does not follow from others.

        Raises:
            Exception: The error of the step at this batch.
        """
        if self.every is not None:
            return self.every
        if batch not in self.traces:
            request = replace(self.request, batches=(batch,), optional=False)
            with self.time_limit.spent():
                (result,) = trace_in_processes([[request]])
                self.traces[batch] = result.traces[0][0]
        return self.traces[batch]

    def replayed(self, batch: int, gpu: Gpu, limit_bytes: int, *, expandable: bool) -> Replay:
        """Return the allocator's replay of the step at ``batch``.

        Args:
            batch: Examples in a micro-batch.
            gpu: The GPU, for the size of cuBLAS's workspace.
            limit_bytes: The most that the allocator may reserve.
            expandable: Whether the allocator has expandable segments.
        """
        events = self.at(batch).events(batch, workspace_bytes=gpu.workspace_bytes)
        return replay(events, limit_bytes=limit_bytes, expandable=expandable)

    def largest(self, gpu: Gpu, limit_bytes: int, *, expandable: bool = False) -> int:
        """Return the largest batch that fits, or 0 if not even one example does.

        If each batch needs a trace, only the batches count for which the time sufficed. The
        arguments are those of ``replayed``.
        """

        def fits(batch: int) -> bool | None:
            if self.every is None and batch not in self.traces and self.time_limit.is_over:
                self.time_limit.has_ended = True
                return None
            return self.replayed(batch, gpu, limit_bytes, expandable=expandable).fits

        guess, every = max(self.traces, default=1), self.every
        if every is not None:  # No batch fits whose allocated bytes do not.
            workspace = gpu.workspace_bytes
            guess = _boundary(
                lambda b: every.allocated_bytes(b, workspace_bytes=workspace) <= limit_bytes, 1
            )
            return _boundary(fits, max(guess, 1))
        return _boundary(fits, guess, stride=guess)  # The distance to the boundary is unknown.


def _boundary(fits: Callable[[int], bool | None], guess: int, stride: int | None = None) -> int:
    """Return the largest size that fits, or 0.

    Args:
        fits: Whether a size fits, or None to end the search.
        guess: The first size. The search is short if the result is near.
        stride: The first distance to the next size.
    """
    good, bad, stride = 0, LARGEST + 1, stride or max(guess // 32, 1)
    size = guess
    while good < size < bad:
        fitting = fits(size)
        if fitting is None:
            break
        if fitting:
            good = size
            size = min(size + stride, bad - 1)
        else:
            bad = size
            size = max(size - stride, good + 1)
        stride *= 2
        if good and bad <= LARGEST:
            size = (good + bad) // 2
    return good


@dataclass(frozen=True, slots=True, kw_only=True)
class StepVariants:
    """A step, and its variants.

    Attributes:
        base: The step as it is.
        changed: The variants by name, such as ``"bf16"`` or ``"activation checkpointing"``.
    """

    base: TracedStep
    changed: dict[str, TracedStep]


def trace_step(
    job: Workload, options: StepOptions, *, flash: bool, mode: PredictionMode
) -> StepVariants:
    """Trace the step of a job, and the step's variants.

    Args:
        job: The model, the data and the optimizer.
        options: The options of the step.
        flash: Whether the GPU has flash attention.
        mode: ``"train"``, or ``"inference"`` for a forward pass without gradients.

    Raises:
        TypeError: If part of the step cannot be sent to another process.
        Exception: The error that the step raises.
    """
    put_back = random_state([job.source.owner])
    try:
        sample = read_sample(job.source)
    finally:
        put_back()
    made = TrainingStep if mode == "train" else ForwardPass
    optimizer = job.step.optimizer
    step = made(model=job.step.model, options=options, optimizer=optimizer, sample=sample)
    tensors = _on_device(job.modules, [optimizer])
    return _traced(step, _changes(step), tensors, flash=flash, notes=_untried(step))


_WHERE: Final = (
    "the step must make tensors of that many examples on its model's device, "
    "device=next(model.parameters()).device, and must refer to the model itself, not to a global "
    "of an imported module"
)


def trace_own(step: Callable[[int], object], *, flash: bool) -> StepVariants:
    """Trace a step that the user wrote, with the modules and optimizers that it refers to.

    Args:
        step: A function of a number of examples.
        flash: Whether the GPU has flash attention.

    Raises:
        TypeError: If part of the step cannot be sent to another process.
        ValueError: If no allocation grows with the batch.
        Exception: The error that the step raises.
    """
    modules, optimizers = modules_and_optimizers(step)
    program = OwnStep(step=step, modules=modules, optimizers=optimizers)
    try:
        traced_step = _traced(program, {}, _on_device(modules, optimizers), flash=flash)
    except Exception as error:
        if "on the same device" in str(error):
            error.add_note(_WHERE)
        raise
    every = traced_step.base.every
    if every is not None and not any(change.slope for change in every.changes):
        raise ValueError(f"nothing that step makes on the GPU grows with its batch: {_WHERE}")
    return traced_step


def _traced(
    step: Program,
    changes: Mapping[str, Program],
    tensors: Sequence[Tensor],
    *,
    flash: bool,
    notes: Sequence[str] = (),
) -> StepVariants:
    base = TracingRequest(
        program=pack_program(step, tensors), batches=(*_SMALL, _PROOF), flash=flash
    )
    requests = {
        name: TracingRequest(
            program=pack_program(changed, tensors),
            batches=_SMALL,
            flash=flash,
            optional=True,
            update=_update(changed, tensors),
        )
        for name, changed in changes.items()
    }
    in_two = len(tensors) > _MANY
    first, *others = _in_processes([base, *requests.values()], in_two=in_two)
    found = _fit(base, *first)
    fits, all_notes = {}, list(notes)
    for (name, request), (traces, on_cuda) in zip(requests.items(), others, strict=True):
        if traces and found.every is not None:  # Else each of its batches would need a trace.
            fits[name] = _fit(request, traces, on_cuda)
        elif not traces:
            all_notes.append(f"{name} was not tried: the step fails with it")
    return StepVariants(base=replace(found, notes=(*found.notes, *all_notes)), changed=fits)


def _update(changed: Program, tensors: Sequence[Tensor]) -> bytes | None:
    """Return the optimizer's part, packed, if the variant changes nothing else; otherwise None."""
    if not isinstance(changed, TrainingStep) or changed.change not in ("fused", "SGD"):
        return None
    return pack_program(Updates(optimizer=changed.optimizer, change=changed.change), tensors)


def _in_processes(
    requests: Sequence[TracingRequest], *, in_two: bool
) -> list[tuple[Sequence[Trace], bool]]:
    """Trace the requests in one process or two.

    With two, one process traces the first request, and those whose traces follow from the first
    one's.

    Args:
        requests: The requests.
        in_two: Whether to use two processes. A process takes seconds to start.

    Returns:
        For each request its traces, and whether they are those of a GPU.
    """
    follows = [
        not in_two or request is requests[0] or request.update is not None for request in requests
    ]
    parts = {
        kind: [request for request, each in zip(requests, follows, strict=True) if each is kind]
        for kind in dict.fromkeys(follows)
    }
    results = dict(zip(parts, trace_in_processes([*parts.values()]), strict=True))
    found = {kind: iter(result.traces) for kind, result in results.items()}
    return [(next(found[kind]), results[kind].on_cuda) for kind in follows]


def _on_device(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Return the tensors that are on the GPU between two steps."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    for optimizer, group in ((o, group) for o in optimizers for group in o.param_groups):
        on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            tensors.append(parameter)
            entry = optimizer.state.get(parameter, {})
            tensors += [  # torch keeps counts of steps on the host.
                value
                for key, value in entry.items()
                if isinstance(value, Tensor) and (key != "step" or on_device)
            ]
    return tensors


def _changes(step: TrainingStep | ForwardPass) -> dict[str, Program]:
    """Return the variants of a step, without those that the step is already."""
    found: dict[str, Program] = {}
    if isinstance(step, TrainingStep):
        kind, groups = type(step.optimizer), step.optimizer.param_groups
        if all("fused" in group and not group["fused"] for group in groups):
            found[f"fused {kind.__name__}"] = replace(step, change="fused")
        if kind is not torch.optim.SGD:
            found["SGD with momentum"] = replace(step, change="SGD")
        if not reason_against(step.model):
            found[ACTIVATION_CHECKPOINTING] = replace(step, change="activation checkpointing")
    if step.options.precision == "fp32":
        found["bf16"] = replace(step, options=replace(step.options, precision="bf16"))
    return found


def _untried(step: TrainingStep | ForwardPass) -> list[str]:
    reason = reason_against(step.model) if isinstance(step, TrainingStep) else ""
    notes = [f"{ACTIVATION_CHECKPOINTING} was not tried: {reason}"] if reason else []
    if any(type(module).__name__ == "OptimizedModule" for module in step.model.modules()):
        notes.append("the model was traced uncompiled; torch.compile changes its memory")
    return notes


def _fit(request: TracingRequest, traces: Sequence[Trace], on_cuda: bool) -> TracedStep:
    every = fit_traces(*traces)
    notes = [
        f"the step needs a value that is not known; guessed: {guess}" + f", {n} times" * (n > 1)
        for guess, n in sorted(traces[0].guessed.items())
        if guess != RECURRENT
    ]
    if RECURRENT in traces[0].guessed:
        notes.append(RECURRENT)
    if every is None:
        notes.append("batches take different ways: each candidate was traced")
    if not on_cuda:
        notes.append(
            f"torch {torch.__version__} refuses tensors of a GPU that is not present: traced as on "
            "the CPU, whose kernels keep other memory; expect errors of tens of percent"
        )
    known = dict(zip(request.batches, traces, strict=True))
    return TracedStep(request=request, traces=known, every=every, notes=tuple(notes))
