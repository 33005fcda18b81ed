"""A step at any batch, from traces of a few: what it needs, and what else it could be."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.batches.sample import read_sample
from autobatch.job import Job
from autobatch.prediction.activation_checkpointing import why_not
from autobatch.prediction.caching_allocator import Replay, replay
from autobatch.prediction.fake_cuda import RECURRENT
from autobatch.prediction.gpu_catalogue import Gpu
from autobatch.prediction.programs import ForwardPass, OwnStep, TrainingStep, Updates
from autobatch.prediction.trace import Program, Trace, fitted
from autobatch.prediction.tracing_process import (
    modules_and_optimizers,
    pack_program,
    trace_in_processes,
)
from autobatch.prediction.tracing_worker import TracingRequest
from autobatch.randomness import random_state
from autobatch.training.options import StepOptions

_SMALL: Final = (6, 9)  # Batches that are traced: not 1, which broadcasts.
_PROOF: Final = 33
_PATIENCE_SECONDS: Final = 30.0
_MANY: Final = 150  # Tensors of a model from where a second process saves what its start takes.
LARGEST: Final = 2**20  # As where a search knows no ceiling.

Mode = Literal["train", "inference"]
CHECKPOINTING: Final = "activation checkpointing"


@dataclass(slots=True)
class Patience:
    """How long candidates may be traced, one by one: a loop over the batch takes as long as that.

    Attributes:
        seconds: That are left.
        has_ended: Whether a candidate was left out for want of them.
    """

    seconds: float
    has_ended: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be traced."""
        return self.seconds <= 0

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Count the time that is spent inside."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds -= time.monotonic() - began


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step at any batch.

    Attributes:
        request: How to trace it.
        traces: By batch, those that are known.
        every: The trace of every batch, if there is one.
        notes: What could not be known.
        patience: For candidates that have to be traced.
    """

    request: TracingRequest
    traces: dict[int, Trace]
    every: Trace | None
    notes: tuple[str, ...]
    patience: Patience = field(default_factory=lambda: Patience(_PATIENCE_SECONDS))

    def at(self, batch: int) -> Trace:
        """Return the trace at ``batch``: traced where it does not follow from others."""
        if self.every is not None:
            return self.every
        if batch not in self.traces:
            request = replace(self.request, batches=(batch,), optional=False)
            with self.patience.spent():
                (result,) = trace_in_processes([[request]])
                self.traces[batch] = result.traces[0][0]
        return self.traces[batch]

    def replayed(self, batch: int, gpu: Gpu, limit_bytes: int, *, expandable: bool) -> Replay:
        """Return what the allocator makes of ``batch``."""
        events = self.at(batch).events(batch, workspace_bytes=gpu.workspace_bytes)
        return replay(events, limit_bytes=limit_bytes, expandable=expandable)

    def largest(self, gpu: Gpu, limit_bytes: int, *, expandable: bool = False) -> int:
        """Return the largest batch that fits, or 0; of those that there was time for to trace."""

        def fits(batch: int) -> bool | None:
            if self.every is None and batch not in self.traces and self.patience.is_over:
                self.patience.has_ended = True
                return None
            return self.replayed(batch, gpu, limit_bytes, expandable=expandable).fits

        guess, every = max(self.traces, default=1), self.every
        if every is not None:  # What is allocated is the least that is needed.
            workspace = gpu.workspace_bytes
            guess = _boundary(
                lambda b: every.allocated_bytes(b, workspace_bytes=workspace) <= limit_bytes, 1
            )
            return _boundary(fits, max(guess, 1))
        return _boundary(fits, guess, stride=guess)  # Nothing says how near it is.


def _boundary(fits: Callable[[int], bool | None], guess: int, stride: int | None = None) -> int:
    """Return the largest size that fits, or 0; few questions if it is near ``guess``.

    Where None is the answer, nothing further is asked.
    """
    good, bad, stride = 0, LARGEST + 1, stride or max(guess // 32, 1)
    size = guess
    while good < size < bad:
        answer = fits(size)
        if answer is None:
            break
        if answer:
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
class TracedStep:
    """A step, and by name what else it could be."""

    base: Step
    changed: dict[str, Step]


def trace_step(job: Job, options: StepOptions, *, flash: bool, mode: Mode) -> TracedStep:
    """Trace the step, and beside it what it might be changed into."""
    put_back = random_state([job.source.owner])
    try:
        sample = read_sample(job.source)
    finally:
        put_back()
    made = TrainingStep if mode == "train" else ForwardPass
    optimizer = job.recipe.optimizer
    step = made(model=job.recipe.model, options=options, optimizer=optimizer, sample=sample)
    tensors = _on_device(job.modules, [optimizer])
    return _traced(step, _changes(step), tensors, flash=flash, notes=_untried(step))


_WHERE: Final = (
    "it has to make tensors of that many examples where its model is, "
    "device=next(model.parameters()).device, and to hold that model itself, not as a global of a "
    "module that is imported"
)


def trace_own(step: Callable[[int], object], *, flash: bool) -> TracedStep:
    """Trace a step of the user's own, with the modules and optimizers that it holds.

    Raises:
        ValueError: If nothing grows with the batch.
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
) -> TracedStep:
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
    fits, told = {}, list(notes)
    for (name, request), (traces, on_cuda) in zip(requests.items(), others, strict=True):
        if traces and found.every is not None:  # Each of its candidates would cost a trace.
            fits[name] = _fit(request, traces, on_cuda)
        elif not traces:
            told.append(f"{name} was not tried: the step fails with it")
    return TracedStep(base=replace(found, notes=(*found.notes, *told)), changed=fits)


def _update(changed: Program, tensors: Sequence[Tensor]) -> bytes | None:
    """The part of the optimizer, packed, where nothing else is changed."""
    if not isinstance(changed, TrainingStep) or changed.change not in ("fused", "SGD"):
        return None
    return pack_program(Updates(optimizer=changed.optimizer, change=changed.change), tensors)


def _in_processes(
    requests: Sequence[TracingRequest], *, in_two: bool
) -> list[tuple[Sequence[Trace], bool]]:
    """Trace the first request, and what follows from it, in a process, and the others in another.

    Args:
        requests: As they are answered.
        in_two: Whether there is another: it takes seconds to start.
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
    """What lies on the GPU between two steps."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    for optimizer, group in ((o, group) for o in optimizers for group in o.param_groups):
        on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            tensors.append(parameter)
            entry = optimizer.state.get(parameter, {})
            tensors += [  # Counts of steps stay on the host: torch moves them nowhere.
                value
                for key, value in entry.items()
                if isinstance(value, Tensor) and (key != "step" or on_device)
            ]
    return tensors


def _changes(step: TrainingStep | ForwardPass) -> dict[str, Program]:
    """What else the step could be, where it is not that already."""
    found: dict[str, Program] = {}
    if isinstance(step, TrainingStep):
        kind, groups = type(step.optimizer), step.optimizer.param_groups
        if all("fused" in group and not group["fused"] for group in groups):
            found[f"fused {kind.__name__}"] = replace(step, change="fused")
        if kind is not torch.optim.SGD:
            found["SGD with momentum"] = replace(step, change="SGD")
        if not why_not(step.model):
            found[CHECKPOINTING] = replace(step, change="checkpointed")
    if step.options.precision == "fp32":
        found["bf16"] = replace(step, options=replace(step.options, precision="bf16"))
    return found


def _untried(step: TrainingStep | ForwardPass) -> list[str]:
    reason = why_not(step.model) if isinstance(step, TrainingStep) else ""
    notes = [f"{CHECKPOINTING} was not tried: {reason}"] if reason else []
    if any(type(module).__name__ == "OptimizedModule" for module in step.model.modules()):
        notes.append("what torch.compile makes of the model was not traced: it keeps other memory")
    return notes


def _fit(request: TracingRequest, traces: Sequence[Trace], on_cuda: bool) -> Step:
    every = fitted(*traces)
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
            f"torch {torch.__version__} refuses tensors of a GPU that is not here: traced as on "
            "the CPU, whose kernels keep other memory; expect errors of tens of percent"
        )
    known = dict(zip(request.batches, traces, strict=True))
    return Step(request=request, traces=known, every=every, notes=tuple(notes))
