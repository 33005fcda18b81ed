"""The public functions: the only place where probing meets training."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autobatch.batches.nest import Nest, map_tensors, size_of
from autobatch.batches.regroup import Data, Source, open_source
from autobatch.batches.sample import read_sample
from autobatch.batches.worst import worst_case_of
from autobatch.course import Course
from autobatch.display import observer_of
from autobatch.errors import DoesNotFitError
from autobatch.events import Observer, SizesTimed, TrialStarted
from autobatch.isolation.parent import run_isolated, try_isolated
from autobatch.job import Job, OptimizerFactory
from autobatch.plan import BatchPlan, check_size, even_sizes, useful_sizes
from autobatch.probing.finder import Finder
from autobatch.probing.options import STANDARD_SEARCH, SearchOptions, check_search
from autobatch.probing.speed import sizes_to_time, speeds
from autobatch.randomness import check_seed, random_state, seed_all
from autobatch.results import LimitedBy, SearchResult, StepResult, TrainingResult, Trial, Verdict
from autobatch.training.batch_norm import BatchNormMode
from autobatch.training.custom import BatchLoss
from autobatch.training.evaluation import Inference, Metric, inference
from autobatch.training.forward import Forward
from autobatch.training.options import LossLike, NonFinite, StepOptions
from autobatch.training.precision import PrecisionName
from autobatch.training.rehearsal import Rehearsal
from autobatch.training.schedule import Interval, Scheduler, SchedulerFactory
from autobatch.training.whole_batch import Whole
from autobatch.units import Size

_SAMPLE: Final = 64  # Examples of a Dataset that a trial repeats.
Mode = Literal["train", "inference"]
Prefer = Literal["largest", "fastest"]
_PREFER: Final = get_args(Prefer)
_PASSES: Final[dict[Mode, int]] = {"train": 2, "inference": 1}  # Micro-batches in a trial.
_UNKNOWN_CEILING: Final = 2**20  # Where neither the call nor the data names one.

Resolve = Callable[..., Job]
Find = Callable[..., SearchResult]
Sample = tuple[Nest, str]  # A trial's examples, and which they are, in words.


def find_and_train(
    model: nn.Module,
    data: Data,
    desired: int = 256,
    *,
    loss: LossLike | None = None,
    forward: Forward | None = None,
    batch_loss: BatchLoss | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    scheduler: Scheduler | SchedulerFactory | None = None,
    scheduler_interval: Interval = "step",
    epochs: int = 1,
    max_steps: int | None = None,
    drop_last: bool = False,
    device: str | torch.device | None = None,
    precision: PrecisionName = "fp32",
    scaler: GradScaler | None = None,
    gradient_dtype: torch.dtype | None = None,
    memory_limit: Size | None = None,
    headroom: Size | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    nonfinite: NonFinite = "raise",
    batch_norm: BatchNormMode = "micro",
    snapshot_steps: bool = False,
    eval_data: Data | None = None,
    metrics: Mapping[str, Metric] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    on_step: Callable[[StepResult], object] | None = None,
    prefer: Prefer = "largest",
    search: SearchOptions = STANDARD_SEARCH,
    seed: int | None = None,
    progress: bool | Observer = True,
) -> TrainingResult:
    """Train ``model`` on logical batches of ``desired`` examples, in pieces that the device holds.

    First finds the tolerable batch by rehearsing real training steps, and puts everything that
    they disturbed back; then takes one optimizer step per logical batch, each the step that the
    undivided batch would take. The model is trained in place, and stays on the device.

    Args:
        model: Any module in one place; it trains in training mode and is put back into its own.
        data: A Dataset (shuffled), a DataLoader (its batches are cut and joined to ``desired``),
            a tuple or mapping of tensors or arrays (shuffled), or an iterable of batches. A batch
            is ``(inputs, ..., target)``, or a mapping with a key ``labels`` or ``target``; a tensor
            in ``Shared(tensor)`` is not cut.
        desired: Examples per optimizer step. The last step of an epoch takes what is left.
        loss: A loss of torch, its functional or a partial of that; any callable
            ``(outputs, targets)`` that returns a mean over examples or ``(sum, terms)``; or
            ``WholeBatch(loss)`` for one that compares examples with one another. None is the
            model's own ``.loss`` where it returns one, otherwise cross-entropy for integer targets
            and mean squared error for floating ones.
        forward: ``(model, batch) -> (outputs, targets)``, for batches of another kind.
        batch_loss: ``(model, batch) -> (sum, terms)``, in the place of loss and forward.
        optimizer: An instance, or a factory ``params -> Optimizer``; None is AdamW.
        scheduler: An instance, or a factory ``optimizer -> scheduler``.
        scheduler_interval: ``"step"``: after each optimizer step that was taken; ``"epoch"``: after
            each epoch (ReduceLROnPlateau on the evaluation's loss, or the epoch's without one).
        epochs: How often the data is seen.
        max_steps: Stop after so many optimizer steps, even within an epoch.
        drop_last: Leave out a last logical batch that is short.
        device: Where to train; None is where the parameters are, or a GPU if they are on the CPU
            and there is one.
        precision: As for ``Accumulator``: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        scaler: As for ``Accumulator``.
        gradient_dtype: As for ``Accumulator``.
        memory_limit: What the whole process may use, in bytes or like ``"24GiB"``: plans for a
            smaller device. None takes what is free.
        headroom: Bytes to keep free; None is 2 % of the device and at least 300 MiB, or nothing
            where a ``memory_limit`` is given.
        clip_grad_norm: As for ``Accumulator``.
        clip_grad_value: As for ``Accumulator``.
        nonfinite: As for ``Accumulator``: ``"raise"``, ``"skip"`` or ``"ignore"``.
        batch_norm: As for ``Accumulator``: ``"micro"``, ``"frozen"`` or ``"refuse"``.
        snapshot_steps: As for ``Accumulator``.
        eval_data: Evaluated after each epoch, at the size that inference tolerates: data of the
            same kinds; a DataLoader keeps its order. Training goes on as if it had not been. Two
            examples are tried before the search, so that what is wrong shows at once.
        metrics: By name, ``(outputs, targets)`` to a mean over examples or ``(sum, terms)``; None
            is the accuracy where outputs are scores of classes.
        checkpoint_dir: Save here after each epoch, and at Ctrl-C or SIGTERM once the step that
            runs is done; go on from what is here. The same call again trains on, bit for bit.
        on_step: Called with every ``StepResult``.
        prefer: ``"largest"``: the fewest micro-batches. ``"fastest"``: the smallest size within 2 %
            of the most examples a second, among the tolerable batch and a few sizes below it, each
            timed over whole logical batches.
        search: How the tolerable batch is searched for.
        seed: Seeds torch, NumPy and Python first; None leaves them alone.
        progress: True shows trials and a progress bar, False is silent; a callable is told of
            every event instead.

    Returns:
        The plan, the search, the losses, and notes on what was not exact.

    Raises:
        TypeError, ValueError: A bad argument, before anything is touched.
        DoesNotFitError: Not even one example fits; model and optimizer are as they were, or as
            the checkpoint has them.
        SearchTimeoutError: The search had no time left; model and optimizer are as they were.
        DeviceLostError: The device was lost in the search: the process must be restarted.
        InexactStepError: Splitting would change this loss. Found in the first windows that are
            cut: at the first, nothing has been trained; that step has moved nothing.
        NonFiniteLossError: A loss is nan or infinite; that step has moved nothing.
        CheckpointError: What is in ``checkpoint_dir`` cannot be trained on from.
        ReplayLimitError: Memory ran out again and again in one window.
        StepInterruptedError: Memory ran out with an optimizer step half done.
    """
    desired = check_size("desired", desired)
    epochs = check_size("epochs", epochs)
    if max_steps is not None:
        max_steps = check_size("max_steps", max_steps)
    check_seed(seed)
    check_search(search)
    if prefer not in _PREFER:
        raise ValueError(f"prefer must be one of {_PREFER}, got {prefer!r}")
    options = StepOptions(
        loss=loss,
        forward=forward,
        batch_loss=batch_loss,
        precision=precision,
        scaler=scaler,
        gradient_dtype=gradient_dtype,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
        nonfinite=nonfinite,
        batch_norm=batch_norm,
        snapshot_steps=snapshot_steps,
    )
    with ExitStack() as stack:
        course = Course.resolve(
            Job.resolve(
                model,
                data,
                batch_size=desired,
                options=options,
                optimizer=optimizer,
                device=device,
                memory_limit=memory_limit,
                headroom=headroom,
            ),
            desired=desired,
            epochs=epochs,
            max_steps=max_steps,
            drop_last=drop_last,
            nonfinite=options.nonfinite,
            eval_data=eval_data,
            metrics=metrics,
            checkpoint_dir=checkpoint_dir,
            on_step=on_step,
            schedule=(scheduler, scheduler_interval),
        )
        seed_all(seed)
        return _train(course, prefer, search, observer_of(progress, stack))


def find_batch_size(
    model: nn.Module,
    data: Data,
    *,
    ceiling: int | None = None,
    loss: LossLike | None = None,
    forward: Forward | None = None,
    batch_loss: BatchLoss | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    device: str | torch.device | None = None,
    precision: PrecisionName = "fp32",
    memory_limit: Size | None = None,
    headroom: Size | None = None,
    mode: Mode = "train",
    search: SearchOptions = STANDARD_SEARCH,
    progress: bool | Observer = False,
) -> SearchResult:
    """Return the largest batch that runs inside the limit; leave everything as it was.

    Every size up to ``ceiling`` is a candidate. A trial runs two micro-batches and the optimizer's
    step, as training with accumulation does; or a forward pass. Arguments are those of
    ``find_and_train``.

    Args:
        model: Put back bit for bit: parameters, buffers, gradients, modes, device.
        data: Only a sample is read. Not an iterator, which could not be given back.
        ceiling: The largest size of interest; None is what the data holds, or about a million
            where it does not say.
        loss: As for ``find_and_train``.
        forward: As for ``find_and_train``.
        batch_loss: As for ``find_and_train``.
        optimizer: As for ``find_and_train``; an instance is put back too.
        device: As for ``find_and_train``; the model is put back where it was.
        precision: As for ``find_and_train``.
        memory_limit: As for ``find_and_train``.
        headroom: As for ``find_and_train``.
        mode: ``"train"``, or ``"inference"`` for forward passes in evaluation mode, without
            gradients and optimizer: batches may lack targets then.
        search: As for ``find_and_train``.
        progress: As for ``find_and_train``.

    Raises:
        TypeError, ValueError: A bad argument, before anything is touched.
        DoesNotFitError: Not even one example fits.
        SearchTimeoutError, DeviceLostError: As for ``find_and_train``.
    """
    if ceiling is not None:
        ceiling = check_size("ceiling", ceiling)
    check_search(search)
    _check_mode(mode)
    options = StepOptions(loss=loss, forward=forward, batch_loss=batch_loss, precision=precision)
    resolve = functools.partial(
        Job.resolve,
        model,
        options=options,
        optimizer=optimizer,
        device=device,
        memory_limit=memory_limit,
        headroom=headroom,
    )
    job = None if search.isolate else resolve(data, batch_size=_SAMPLE)
    source = open_source(data, batch_size=_SAMPLE) if job is None else job.source
    _refuse_one_pass(source)
    held = source.examples
    largest = min(ceiling or held or _UNKNOWN_CEILING, held or ceiling or _UNKNOWN_CEILING)
    find = functools.partial(
        _find_any,
        candidates=search.candidates(largest),
        mode=mode,
        search=search,
        reason="data" if largest == held and largest != ceiling else "ceiling",
    )
    with ExitStack() as stack:
        observer = observer_of(progress, stack)
        if job is None:
            return _isolated(resolve, find, _sample_to_send(source, search), search, observer)
        with job.undisturbed():
            return find(job, _sample(source, search), observer)


def check(
    model: nn.Module,
    data: Data,
    size: int,
    *,
    loss: LossLike | None = None,
    forward: Forward | None = None,
    batch_loss: BatchLoss | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    device: str | torch.device | None = None,
    precision: PrecisionName = "fp32",
    memory_limit: Size | None = None,
    headroom: Size | None = None,
    mode: Mode = "train",
    search: SearchOptions = STANDARD_SEARCH,
) -> Trial:
    """Rehearse one size, and leave everything as it was. Not fitting is a value, no exception.

    Args:
        model: As for ``find_batch_size``.
        data: As for ``find_batch_size``; its examples are repeated if it holds fewer than ``size``.
        size: Examples in each of the rehearsal's two micro-batches, or in its forward pass.
        loss: As for ``find_and_train``.
        forward: As for ``find_and_train``.
        batch_loss: As for ``find_and_train``.
        optimizer: As for ``find_and_train``.
        device: As for ``find_and_train``.
        precision: As for ``find_and_train``.
        memory_limit: As for ``find_and_train``.
        headroom: As for ``find_and_train``.
        mode: As for ``find_batch_size``.
        search: Of it, the timeout and the worst case.

    Raises:
        TypeError, ValueError: A bad argument, before anything is touched.
    """
    size = check_size("size", size)
    check_search(search)
    _check_mode(mode)
    options = StepOptions(loss=loss, forward=forward, batch_loss=batch_loss, precision=precision)
    resolve = functools.partial(
        Job.resolve,
        model,
        options=options,
        optimizer=optimizer,
        device=device,
        memory_limit=memory_limit,
        headroom=headroom,
    )
    examples = min(size, _SAMPLE)
    if search.isolate:
        source = open_source(data, batch_size=examples)
        _refuse_one_pass(source)
        sample = _sample_to_send(source, search)
        task = functools.partial(_try_alone, resolve, sample, size, mode, search)
        return try_isolated(task, timeout_seconds=search.patience_seconds)
    job = resolve(data, batch_size=examples)
    _refuse_one_pass(job.source)
    with job.undisturbed():
        return _try(job, _sample(job.source, search), size, mode, search)


def _train(
    course: Course, prefer: Prefer, search: SearchOptions, observer: Observer
) -> TrainingResult:
    """Search, then train with what was found."""
    job = course.job
    with course.undone_on_error():
        first = course.open(observer)
        if course.is_done():
            return course.done_before()
        window = course.window(first)
        find = functools.partial(
            _find_useful,
            window=window,
            prefer=prefer,
            search=search,
            reason="ceiling" if window == course.desired else "data",
        )
        if search.isolate:
            sample = _sample_to_send(job.source, search, first)
            found = _isolated(job.resolve_again, find, sample, search, observer)
        else:
            with job.undisturbed():
                sample = _sample(job.source, search, first)
                found = find(job, sample, observer)
    del first, sample  # The largest that there is: the epochs hold it for as long as it is needed.
    infer = functools.partial(_size_for_inference, job)
    return course.train(found, window, observer, infer, search.multiple_of)


def _timed(
    job: Job, rehearsal: Rehearsal, found: SearchResult, window: int, multiple_of: int
) -> SearchResult:
    """The search, with how fast the size that it found and smaller ones train."""
    limited = functools.partial(job.device.limited_to, found.limit_bytes)
    timed = speeds(
        rehearsal,
        job.device,
        {
            size: even_sizes(window, size, multiple_of)
            for size in sizes_to_time(useful_sizes(window, multiple_of), found.size)
        },
        limited if job.trains_limited else nullcontext,
    )
    return replace(found, speeds=timed)


def _size_for_inference(job: Job, run: Inference, candidates: Sequence[int]) -> int:
    """The largest size that inference really ran at, beside the weights and the optimizer."""
    finder = _finder(job, run, STANDARD_SEARCH, lambda _: None, "")
    return finder.largest(candidates, windows=lambda size: (size,), reason="ceiling").size


def _find_any(
    job: Job,
    sample: Sample,
    observer: Observer,
    history: Sequence[Trial] = (),
    *,
    candidates: Sequence[int],
    mode: Mode,
    search: SearchOptions,
    reason: LimitedBy,
) -> SearchResult:
    """Search all candidates, in a job that is undisturbed."""
    return _probe(job, sample, mode, search, observer, history).largest(
        candidates, windows=lambda size: (size,) * _PASSES[mode], reason=reason
    )


def _find_useful(
    job: Job,
    sample: Sample,
    observer: Observer,
    history: Sequence[Trial] = (),
    *,
    window: int,
    prefer: Prefer,
    search: SearchOptions,
    reason: LimitedBy,
) -> SearchResult:
    """Search the sizes that change how a window is cut, in a job that is undisturbed."""
    examples, said = sample
    rehearsal, multiple_of = Rehearsal(job.recipe, examples, window), search.multiple_of
    if isinstance(job.recipe.objective, Whole):
        # Outputs of all examples are alive whatever the size: memory is no convex curve.
        search = replace(search, confirm="failed")
    found = _finder(job, rehearsal, search, observer, said, history).largest(
        useful_sizes(window, multiple_of),
        windows=lambda size: _rehearsed(
            job, BatchPlan(desired=window, tolerable=size, multiple_of=multiple_of)
        ),
        reason=reason,
        spared_bytes=rehearsal.spared_bytes,
    )
    if prefer == "fastest":
        found = _timed(job, rehearsal, found, window, multiple_of)
        observer(SizesTimed(search=found))
    return found


def _try(job: Job, sample: Sample, size: int, mode: Mode, search: SearchOptions) -> Trial:
    """Rehearse one size, in a job that is undisturbed."""
    try:
        finder = _probe(job, sample, mode, search, lambda _: None)
        return finder.rehearse((size,) * _PASSES[mode])
    except DoesNotFitError as error:  # The model alone is too large: so is any batch.
        return Trial(size=size, fits=False, failure=Verdict.OUT_OF_MEMORY, message=str(error))


def _isolated(
    resolve: Resolve, find: Find, sample: Sample, search: SearchOptions, observer: Observer
) -> SearchResult:
    """Search in a process of its own."""
    return run_isolated(
        functools.partial(_find_alone, resolve, find, sample),
        observer=observer,
        timeout_seconds=search.patience_seconds,
    )


def _find_alone(
    resolve: Resolve, find: Find, sample: Sample, observer: Observer, history: Sequence[Trial]
) -> SearchResult:
    """In the isolated process: make the job anew, and search."""
    job = resolve([sample[0]], batch_size=size_of(sample[0]))
    with job.undisturbed():
        return find(job, sample, observer, history)


def _try_alone(
    resolve: Resolve,
    sample: Sample,
    size: int,
    mode: Mode,
    search: SearchOptions,
    observer: Observer,
    _: Sequence[Trial],
) -> Trial:
    """In the isolated process: make the job anew, and rehearse one size."""
    job = resolve([sample[0]], batch_size=size_of(sample[0]))
    observer(TrialStarted(size=size))
    with job.undisturbed():
        return _try(job, sample, size, mode, search)


def _sample(source: Source, search: SearchOptions, first: Nest | None = None) -> Sample:
    """Return the examples of a trial: from ``first``, where that has been read already."""
    return worst_case_of(source, read_sample(source) if first is None else first, search.worst_case)


def _sample_to_send(source: Source, search: SearchOptions, first: Nest | None = None) -> Sample:
    """As ``_sample``; no generator has moved afterwards.

    Copied, for a slice of a tensor would take with it all that it is a slice of.
    """
    put_back = random_state([source.owner])
    try:
        examples, said = _sample(source, search, first)
        return map_tensors(Tensor.clone, examples), said
    finally:
        put_back()


def _probe(
    job: Job,
    sample: Sample,
    mode: Mode,
    search: SearchOptions,
    observer: Observer,
    history: Sequence[Trial] = (),
) -> Finder:
    """A search over a job that is undisturbed, in training or in inference."""
    examples, said = sample
    if mode == "train":
        return _finder(job, Rehearsal(job.recipe, examples), search, observer, said, history)
    job.recipe.model.eval()
    forward = job.options.batch_loss or job.options.forward
    run = inference(job.recipe, forward, examples)
    return _finder(job, run, search, observer, said, history)


def _check_mode(mode: object) -> None:
    if mode not in _PASSES:
        raise ValueError(f"mode must be one of {tuple(_PASSES)}, got {mode!r}")


def _finder(
    job: Job,
    rehearsal: Rehearsal | Inference,
    search: SearchOptions,
    observer: Observer,
    worst_case: str,
    history: Sequence[Trial] = (),
) -> Finder:
    return Finder(
        rehearsal=rehearsal,
        device=job.device,
        limit_bytes=job.limit_bytes,
        breakdown=functools.partial(job.breakdown, trains=isinstance(rehearsal, Rehearsal)),
        observer=observer,
        options=search,
        worst_case=worst_case,
        history=history,
    )


def _rehearsed(job: Job, plan: BatchPlan) -> tuple[int, ...]:
    """The micro-batches that stand for a window of ``plan``.

    Two of the largest: gradients are alive in the second's forward pass. And a single example
    where the plan has one: BatchNorm may refuse it, and had better do so now. Where the loss is
    that of the whole batch, all of them: their outputs are alive together.
    """
    if isinstance(job.recipe.objective, Whole):
        return plan.micro_batch_sizes
    sizes = (plan.micro_batch,) * min(2, plan.accumulation_steps)
    return (*sizes, 1) if min(plan.micro_batch_sizes) == 1 < plan.micro_batch else sizes


def _refuse_one_pass(source: Source) -> None:
    if source.one_pass:
        raise TypeError(
            "the sample of a one-pass iterable could not be given back; pass a DataLoader, a "
            "Dataset, tensors or a list of batches, or use find_and_train, which trains on it"
        )
