"""A step at any batch, from traces of a few: what it needs, and what else it could be."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import torch

from autobatch.batches.sample import read_sample
from autobatch.job import Job
from autobatch.prediction.allocator import Replay, replay
from autobatch.prediction.gpus import Gpu
from autobatch.prediction.orders import Order, packed, traced
from autobatch.prediction.program import Change, TrainingStep
from autobatch.prediction.trace import Trace, fitted
from autobatch.randomness import random_state
from autobatch.training.options import StepOptions

_SMALL: Final = (6, 9)  # Batches that are traced: not 1, which broadcasts.
_PROOF: Final = 33
_LARGEST: Final = 2**20  # As where a search knows no ceiling.


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
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
class TracedStep:
    """A step, and by name what else it could be."""

    base: Step
    changed: dict[str, Step]


def trace_step(job: Job, options: StepOptions, *, flash: bool) -> TracedStep:
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
    return TracedStep(base=fits[0], changed=dict(zip(changes, fits[1:], strict=True)))


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


def _fit(order: Order, traces: Sequence[Trace], on_cuda: bool) -> Step:
    every = fitted(*traces)
    guessed = sum(traces[0].guessed.values())
    notes = []
    if guessed:
        kinds = ", ".join(f"{n} of {kind}" for kind, n in sorted(traces[0].guessed.items()))
        notes.append(
            f"the step asks for values of tensors (.item(), if tensor:), which a trace without a "
            f"GPU does not have; they were guessed ({kinds}): where memory depends on them, the "
            "prediction is as good as the guess"
        )
    if every is None:
        notes.append("batches take different ways: each candidate was traced")
    if not on_cuda:
        notes.append(
            f"torch {torch.__version__} refuses tensors of a GPU that is not here: traced as on "
            "the CPU, whose kernels keep other memory; expect errors of tens of percent"
        )
    known = dict(zip(order.batches, traces, strict=True))
    return Step(order=order, traces=known, every=every, notes=tuple(notes))
