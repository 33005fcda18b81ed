"""The tolerable batch of a GPU that is not here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Unpack, get_args

from torch import nn
from torch.optim import Optimizer

from autobatch.data.source import Data
from autobatch.errors import DoesNotFitError
from autobatch.prediction.caching_allocator import replay
from autobatch.prediction.gpu_catalogue import CATALOGUE, Gpu, find_gpu, possible_bytes, safe_bytes
from autobatch.prediction.result import Prediction, WhatIf, interval
from autobatch.prediction.trace import ACTIVATIONS
from autobatch.prediction.traced_step import LARGEST, Mode, Step, TracedStep, trace_own, trace_step
from autobatch.results.memory import break_down
from autobatch.results.search import LimitedBy
from autobatch.training.engine.precision import PrecisionName
from autobatch.training.losses.resolve import LossLike
from autobatch.training.options import StepOptions
from autobatch.training.step_arguments import StepArguments, shows_step_options, step_options
from autobatch.training.workload import OptimizerFactory, Workload
from autobatch.validation import check_size

GpuName = str | Gpu

_SAMPLE: Final = 16  # Examples of a Dataset that a trace repeats.
_LESS: Final = 0.98  # Of what the step as it is tolerates: fewer are worth a word.
_MODES: Final = get_args(Mode)


@shows_step_options
def predict(
    model: nn.Module,
    data: Data,
    *,
    gpu: GpuName | Sequence[GpuName],
    desired: int | None = None,
    ceiling: int | None = None,
    loss: LossLike | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    mode: Mode = "train",
    options: StepOptions | None = None,
    **step: Unpack[StepArguments],
) -> Prediction:
    """Predict what ``find_batch_size`` would find on a GPU that is not here, in seconds.

    The step that training runs is traced in a process of its own, on tensors without values;
    nothing here is touched. docs/prediction.md says how well it is met, and when not.

    Args:
        model: As for ``find_batch_size``.
        data: As for ``find_batch_size``: a sample is read. What a Dataset or a DataLoader holds is
            the most that is tolerable; tensors, arrays and lists are a sample, and bound nothing.
        gpu: A name such as ``"RTX 4090"``, a ``Gpu`` of one's own, or several of them; ``"all"``
            is the catalogue.
        desired: Examples per optimizer step, for a plan.
        ceiling: The largest size of interest; None is as far as ``data`` goes.
        loss: As for ``find_batch_size``.
        optimizer: As for ``find_batch_size``.
        options: As for ``find_batch_size``.
        step: As for ``find_batch_size``.
        mode: As for ``find_batch_size``: ``"train"``, or ``"inference"`` for a forward pass in
            evaluation mode, without gradients and targets.

    Raises:
        TypeError, ValueError: A bad argument.
        DoesNotFitError: Not even one example fits on the only GPU asked for.
        AutobatchError: If the process that traces ends otherwise.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {_MODES}, got {mode!r}")
    if mode == "inference" and desired is not None:
        raise ValueError(
            f'mode="inference" takes no optimizer step: pass ceiling={desired!r}, not desired'
        )
    asked = _Asked(gpus=_gpus(gpu), desired=desired, ceiling=ceiling, mode=mode)
    options = step_options(predict, options, loss, step)
    # On the host: the model stays where it is, and a GPU that is here is not asked.
    job = Workload.resolve(
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
    held = None if isinstance(data, tuple | Mapping | list) else job.source.examples
    return _predicted(
        replace(asked, precision=options.precision, held=held),
        lambda flash: trace_step(job, options, flash=flash, mode=mode),
    )


def peak(
    step: Callable[[int], object],
    *,
    gpu: GpuName | Sequence[GpuName],
    desired: int | None = None,
    ceiling: int | None = None,
) -> Prediction:
    """Predict the memory of a step of one's own, any loop, on a GPU that is not here.

    ``step`` is sent to a process that has no GPU, and is called there three times at each of three
    batches: what it holds on to from one call to the next is held there too.
    ``peak(step, gpu=...).peak_bytes(64)`` is its peak at 64 examples.

    Args:
        step: Takes a step at a number of examples, as ``find_largest`` calls it. It makes its own
            batch, on ``device="cuda"`` or where its model is. Modules and optimizers that it holds
            (a closure, an attribute, a global of the script) are on the GPU there, wherever they
            are here; other tensors of the host stay on the host.
        gpu: As for ``predict``.
        desired: Examples per optimizer step, for a plan.
        ceiling: The largest size of interest; None knows no bound.

    Raises:
        TypeError, ValueError: A bad argument, or a step whose memory does not grow.
        DoesNotFitError: Not even one example fits on the only GPU asked for.
        AutobatchError: If the process that traces ends otherwise.
        Exception: Whatever ``step`` raises there.
    """
    if not callable(step):
        raise TypeError(f"step must be callable with a number of examples, got {step!r}")
    asked = _Asked(gpus=_gpus(gpu), desired=desired, ceiling=ceiling, mode="own")
    return _predicted(asked, lambda flash: trace_own(step, flash=flash))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a prediction is asked for; ``held`` is how many examples a data set holds."""

    gpus: Sequence[Gpu]
    desired: int | None
    ceiling: int | None
    mode: Mode | Literal["own"]
    precision: PrecisionName | None = None
    held: int | None = None

    def __post_init__(self) -> None:
        for name in ("desired", "ceiling"):
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_size(name, size))

    def bound(self, tolerable: int) -> tuple[int, LimitedBy]:
        """Return ``tolerable``, or the largest size of interest where that is less, and why."""
        bounds: list[tuple[int, LimitedBy]] = [(tolerable, "memory"), (LARGEST, "ceiling")]
        if self.held is not None:
            bounds.append((self.held, "data"))
        if self.ceiling is not None:
            bounds.append((self.ceiling, "ceiling"))
        return min(reversed(bounds), key=lambda bound: bound[0])


def _predicted(asked: _Asked, trace: Callable[[bool], TracedStep]) -> Prediction:
    steps = {flash: trace(flash) for flash in {gpu.flash for gpu in asked.gpus}}
    found = [_on(each, steps[each.flash], asked) for each in asked.gpus]
    if len(found) == 1 and not found[0].largest:
        raise _does_not_fit(found[0])
    return replace(found[0], others=tuple(found[1:]))


def _on(gpu: Gpu, traced: TracedStep, asked: _Asked) -> Prediction:
    """Predict for one GPU."""
    step = traced.base
    limit_bytes = safe_bytes(gpu)
    safe = step.largest(gpu, limit_bytes)
    most = max(step.largest(gpu, possible_bytes(gpu)), safe)
    tolerable, limited_by = asked.bound(safe)
    size = max(min(tolerable, asked.desired or tolerable), 1)
    trace = step.at(size)
    events = trace.events(size, workspace_bytes=gpu.workspace_bytes)
    ran = replay(events, limit_bytes=limit_bytes if tolerable else None)
    assert ran.peak_at is not None, "a step allocates"
    live = trace.live_bytes(events, ran.peak_at)
    del live[ACTIVATIONS]  # They are what is left, with what blocks have beyond their tensors.
    what_ifs = _what_ifs(gpu, traced, limit_bytes)
    beyond = [] if limited_by == "memory" else [_beyond(tolerable, limited_by, safe, most)]
    if step.patience.has_ended:
        beyond = [f"larger batches than {tolerable} may fit: tracing them takes too long"]
    return Prediction(
        gpu=gpu,
        precision=asked.precision,
        mode=asked.mode,
        tolerable=tolerable,
        largest=asked.bound(most)[0],
        by_memory=safe,
        limited_by=limited_by,
        desired=asked.desired,
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
        what_ifs=what_ifs,
        notes=(
            *beyond,
            *step.notes,
            *_torn(gpu, traced, what_ifs, safe),
            *_of_the_gpu(gpu, asked.precision),
        ),
        _step=step,
    )


def _beyond(ceiling: int, limited_by: LimitedBy, safe: int, most: int) -> str:
    if safe == LARGEST == ceiling:
        return f"batches above {LARGEST} were not looked at"
    what = f"the data holds {ceiling}" if limited_by == "data" else f"the ceiling is {ceiling}"
    return f"{what}; memory alone would allow {interval(safe, most)}"


def _what_ifs(gpu: Gpu, traced: TracedStep, limit_bytes: int) -> tuple[WhatIf, ...]:
    expandable = traced.base.largest(gpu, limit_bytes, expandable=True)
    changed = [
        WhatIf(change=name, tolerable=step.largest(gpu, limit_bytes))
        for name, step in traced.changed.items()
        if name != "bf16" or gpu.bf16
    ]
    return (WhatIf(change="expandable segments", tolerable=expandable), *changed)


def _torn(gpu: Gpu, traced: TracedStep, what_ifs: Sequence[WhatIf], safe: int) -> list[str]:
    """Say which changes allow fewer examples though they allocate no more: it reads as an error."""

    def allocated(step: Step) -> int:
        events = step.at(safe).events(safe, workspace_bytes=gpu.workspace_bytes)
        return replay(events).peak_allocated

    less = [each.change for each in what_ifs if each.tolerable < _LESS * safe]
    followed = [name for name in less if name in traced.changed and traced.changed[name].every]
    worse = [
        name
        for name in followed
        if allocated(traced.changed[name]) <= allocated(traced.base) / _LESS
    ]
    return [
        f"{change} allocates no more, but leaves small blocks in large ones, which then serve no "
        "large tensor; expandable segments would help"
        for change in worse
    ]


def _of_the_gpu(gpu: Gpu, precision: PrecisionName | None) -> list[str]:
    notes = []
    if precision == "bf16" and not gpu.bf16:
        notes.append(f"{gpu.name} has no bfloat16 of its own: it is slow there")
    if gpu.derived:
        notes.append(f"what PyTorch sees of {gpu.name} is not published, but derived")
    return notes


def _does_not_fit(prediction: Prediction) -> DoesNotFitError:
    """Say by how much, with the smallest context and no headroom, and what would help."""
    gpu = prediction.gpu
    missing = prediction.peak_bytes(1) - possible_bytes(gpu)
    breakdown = replace(
        prediction.breakdown,
        outside_bytes=gpu.context_bytes[0],
        headroom_bytes=0,
        free_bytes=max(-missing, 0),
        missing_bytes=max(missing, 0),
    )
    helps = [f"{w.change} would allow {w.tolerable}" for w in prediction.what_ifs if w.tolerable]
    return DoesNotFitError(1, gpu.capacity_bytes, breakdown, ", ".join(helps), gpu.name)


def _gpus(asked: Any) -> list[Gpu]:
    if asked == "all":
        return list(CATALOGUE)
    several = [asked] if isinstance(asked, str | Gpu) else asked
    if not isinstance(several, Sequence) or not several:
        raise TypeError(
            f'gpu must be a name such as "RTX 4090", a Gpu, a list of them, or "all", got {asked!r}'
        )
    return [each if isinstance(each, Gpu) else find_gpu(each) for each in several]
