"""Predictions of a step's memory, and of the tolerable batch, for a GPU that is not present."""

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
from autobatch.prediction.traced_step import (
    LARGEST,
    PredictionMode,
    StepVariants,
    TracedStep,
    trace_own,
    trace_step,
)
from autobatch.results.memory import break_down
from autobatch.results.search import LimitedBy
from autobatch.training.engine.precision import PrecisionName
from autobatch.training.losses.resolve import LossLike
from autobatch.training.options import StepOptions
from autobatch.training.step_arguments import StepArguments, shows_step_options, step_options
from autobatch.training.workload import OptimizerFactory, Workload
from autobatch.validation import check_size

GpuName = str | Gpu

_SAMPLE: Final = 16  # The number of a Dataset's examples that a trace repeats.
_LESS: Final = 0.98  # A variant that tolerates less than this share of the batch gets a note.
_MODES: Final = get_args(PredictionMode)


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
    mode: PredictionMode = "train",
    options: StepOptions | None = None,
    **step: Unpack[StepArguments],
) -> Prediction:
    """Predict the result of ``find_batch_size`` on a GPU that is not present, in seconds.

    The step that training runs is traced in another process, on tensors without values; this
    process is not changed. docs/prediction.md holds the measured error.

    Args:
        model: As for ``find_batch_size``.
        data: As for ``find_batch_size``; a sample is read. The number of examples of a Dataset or a
            DataLoader bounds the tolerable batch. Tensors, arrays and lists are a sample, and bound
            nothing.
        gpu: A name such as ``"RTX 4090"``, a ``Gpu``, a list of them, or ``"all"`` for the whole
            catalogue.
        desired: Examples per optimizer step, for a plan.
        ceiling: The largest batch to consider; None for no bound beyond ``data``.
        loss: As for ``find_batch_size``.
        optimizer: As for ``find_batch_size``.
        mode: As for ``find_batch_size``: ``"train"``, or ``"inference"`` for a forward pass in
            evaluation mode, without gradients and targets.
        options: As for ``find_batch_size``.
        step: As for ``find_batch_size``.

    Returns:
        The prediction for the first GPU, with those for the other GPUs in ``others``.

    Raises:
        TypeError, ValueError: If an argument is wrong.
        DoesNotFitError: If ``gpu`` is one GPU, and not even one example fits on it.
        AutobatchError: If the process that traces ends without an answer, or on Windows.
        Exception: The error that the model, the loss or the optimizer raises.

    Example:
        >>> predict(model, train_set, gpu="RTX 4090", desired=1024, precision="bf16").tolerable
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {_MODES}, got {mode!r}")
    if mode == "inference" and desired is not None:
        raise ValueError(
            f'mode="inference" takes no optimizer step: pass ceiling={desired!r}, not desired'
        )
    request = _PredictionRequest(gpus=_gpus(gpu), desired=desired, ceiling=ceiling, mode=mode)
    options = step_options(predict, options, loss, step)
    # With the CPU as its device the job does not move the model, and uses no GPU.
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
        replace(request, precision=options.precision, held=held),
        lambda flash: trace_step(job, options, flash=flash, mode=mode),
    )


def peak(
    step: Callable[[int], object],
    *,
    gpu: GpuName | Sequence[GpuName],
    desired: int | None = None,
    ceiling: int | None = None,
) -> Prediction:
    """Predict the memory of any step that the user wrote on a GPU that is not present.

    The step is sent to a process that has no GPU, and is called there three times at each of three
    batches. Tensors that the step keeps from one call to the next are part of the memory.

    Args:
        step: A function that takes a step at a number of examples, as for ``find_largest``. The
            function makes its batch itself, on ``device="cuda"`` or on its model's device. In the
            other process the modules and optimizers that the step refers to (by a closure, an
            attribute, or a global of the script) are on the GPU; other tensors of the host stay on
            the host.
        gpu: As for ``predict``.
        desired: Examples per optimizer step, for a plan.
        ceiling: The largest batch to consider; None for no bound.

    Returns:
        As for ``predict``.

    Raises:
        TypeError, ValueError: If an argument is wrong, or if the step's memory does not grow with
            the batch.
        DoesNotFitError: If ``gpu`` is one GPU, and not even one example fits on it.
        AutobatchError: If the process that traces ends without an answer, or on Windows.
        Exception: The error that ``step`` raises there.

    Example:
        >>> def step(batch):
        ...     model(torch.randn(batch, 784, device="cuda")).sum().backward()
        >>> peak(step, gpu="T4").peak_bytes(64)  # The peak at 64 examples.
    """
    if not callable(step):
        raise TypeError(f"step must be callable with a number of examples, got {step!r}")
    request = _PredictionRequest(gpus=_gpus(gpu), desired=desired, ceiling=ceiling, mode="own")
    return _predicted(request, lambda flash: trace_own(step, flash=flash))


@dataclass(frozen=True, slots=True, kw_only=True)
class _PredictionRequest:
    """The arguments of a prediction.

    Attributes:
        gpus: The GPUs.
        desired: Examples per optimizer step.
        ceiling: The largest batch to consider.
        mode: The mode, or ``"own"`` for a step that the user wrote.
        precision: The precision of the forward passes.
        held: The number of examples of the data; None if the data are a sample.
    """

    gpus: Sequence[Gpu]
    desired: int | None
    ceiling: int | None
    mode: PredictionMode | Literal["own"]
    precision: PrecisionName | None = None
    held: int | None = None

    def __post_init__(self) -> None:
        for name in ("desired", "ceiling"):
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_size(name, size))

    def bound(self, tolerable: int) -> tuple[int, LimitedBy]:
        """Return the smallest bound of the batch, and its reason."""
        bounds: list[tuple[int, LimitedBy]] = [(tolerable, "memory"), (LARGEST, "ceiling")]
        if self.held is not None:
            bounds.append((self.held, "data"))
        if self.ceiling is not None:
            bounds.append((self.ceiling, "ceiling"))
        return min(reversed(bounds), key=lambda bound: bound[0])


def _predicted(request: _PredictionRequest, trace: Callable[[bool], StepVariants]) -> Prediction:
    steps = {flash: trace(flash) for flash in {gpu.flash for gpu in request.gpus}}
    found = [_on(each, steps[each.flash], request) for each in request.gpus]
    if len(found) == 1 and not found[0].largest:
        raise _does_not_fit(found[0])
    return replace(found[0], others=tuple(found[1:]))


def _on(gpu: Gpu, traced: StepVariants, request: _PredictionRequest) -> Prediction:
    """Predict for one GPU."""
    step = traced.base
    limit_bytes = safe_bytes(gpu)
    safe = step.largest(gpu, limit_bytes)
    most = max(step.largest(gpu, possible_bytes(gpu)), safe)
    tolerable, limited_by = request.bound(safe)
    size = max(min(tolerable, request.desired or tolerable), 1)
    trace = step.at(size)
    events = trace.events(size, workspace_bytes=gpu.workspace_bytes)
    ran = replay(events, limit_bytes=limit_bytes if tolerable else None)
    assert ran.peak_at is not None, "a step allocates"
    live = trace.live_bytes(events, ran.peak_at)
    del live[ACTIVATIONS]  # They are the rest, which includes the unused parts of blocks.
    what_ifs = _what_ifs(gpu, traced, limit_bytes)
    beyond = [] if limited_by == "memory" else [_beyond(tolerable, limited_by, safe, most)]
    if step.time_limit.has_ended:
        beyond = [f"larger batches than {tolerable} may fit: tracing them takes too long"]
    return Prediction(
        gpu=gpu,
        precision=request.precision,
        mode=request.mode,
        tolerable=tolerable,
        largest=request.bound(most)[0],
        by_memory=safe,
        limited_by=limited_by,
        desired=request.desired,
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
        at_peak=trace.site_of(events[ran.peak_at][0]),
        what_ifs=what_ifs,
        notes=(
            *beyond,
            *step.notes,
            *_fragmentation_notes(gpu, traced, what_ifs, safe),
            *_notes_on_gpu(gpu, request.precision),
        ),
        _step=step,
    )


def _beyond(ceiling: int, limited_by: LimitedBy, safe: int, most: int) -> str:
    if safe == LARGEST == ceiling:
        return f"batches above {LARGEST} were not looked at"
    what = f"the data holds {ceiling}" if limited_by == "data" else f"the ceiling is {ceiling}"
    return f"{what}; memory alone would allow {interval(safe, most)}"


def _what_ifs(gpu: Gpu, traced: StepVariants, limit_bytes: int) -> tuple[WhatIf, ...]:
    expandable = traced.base.largest(gpu, limit_bytes, expandable=True)
    changed = [
        WhatIf(change=name, tolerable=step.largest(gpu, limit_bytes))
        for name, step in traced.changed.items()
        if name != "bf16" or gpu.bf16
    ]
    return (WhatIf(change="expandable segments", tolerable=expandable), *changed)


def _fragmentation_notes(
    gpu: Gpu, traced: StepVariants, what_ifs: Sequence[WhatIf], safe: int
) -> list[str]:
    """Return a note for each variant that allocates no more, and yet tolerates fewer examples.

    Without a note such a variant would look like an error of the prediction.
    """

    def allocated(step: TracedStep) -> int:
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


def _notes_on_gpu(gpu: Gpu, precision: PrecisionName | None) -> list[str]:
    notes = []
    if precision == "bf16" and not gpu.bf16:
        notes.append(f"{gpu.name} has no bfloat16 of its own: it is slow there")
    if gpu.derived:
        notes.append(f"what PyTorch sees of {gpu.name} is not published, but derived")
    return notes


def _does_not_fit(prediction: Prediction) -> DoesNotFitError:
    """Return the error, with the missing bytes at the smallest context and the helpful changes."""
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


def _gpus(given: Any) -> list[Gpu]:
    if given == "all":
        return list(CATALOGUE)
    several = [given] if isinstance(given, str | Gpu) else given
    if not isinstance(several, Sequence) or not several:
        raise TypeError(
            f'gpu must be a name such as "RTX 4090", a Gpu, a list of them, or "all", got {given!r}'
        )
    return [each if isinstance(each, Gpu) else find_gpu(each) for each in several]
