"""The public functions: arguments checked, a search, a training."""

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Final

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autobatch.batches.regroup import Data, open_source
from autobatch.course import Course
from autobatch.display import observer_of
from autobatch.events import Observer
from autobatch.isolation.trials import try_isolated
from autobatch.job import Job, OptimizerFactory
from autobatch.leftovers import forget_last_error
from autobatch.plan import check_size
from autobatch.probing.options import STANDARD_SEARCH, SearchOptions, check_search
from autobatch.randomness import check_seed, seed_all
from autobatch.results import SearchResult, StepResult, TrainingResult, Trial
from autobatch.searching import (
    Mode,
    Prefer,
    check_mode,
    check_prefer,
    find_any,
    find_isolated,
    find_useful,
    refuse_one_pass,
    sample_of,
    sample_to_send,
    size_for_inference,
    try_alone,
    try_size,
)
from autobatch.training.batch_norm import BatchNormMode
from autobatch.training.custom import BatchLoss
from autobatch.training.evaluation import Metric
from autobatch.training.forward import Forward
from autobatch.training.options import LossLike, NonFinite, StepOptions
from autobatch.training.precision import PrecisionName
from autobatch.training.schedule import Interval, Scheduler, SchedulerFactory
from autobatch.units import Size

_SAMPLE: Final = 64  # Examples of a Dataset that a trial repeats.
_UNKNOWN_CEILING: Final = 2**20  # Where neither the call nor the data names one.


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
    replay: bool = True,
    snapshot_on_oom: str | os.PathLike[str] | None = None,
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
        replay: As for ``Accumulator``.
        snapshot_on_oom: As for ``Accumulator``; the search's trials write nothing.
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
            timed over whole logical batches (not where the training is shorter than that).
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
    check_prefer(prefer)
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
        replay=replay,
        snapshot_on_oom=snapshot_on_oom,
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
    check_mode(mode)
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
    refuse_one_pass(source)
    held = source.examples
    largest = min(ceiling or held or _UNKNOWN_CEILING, held or ceiling or _UNKNOWN_CEILING)
    find = functools.partial(
        find_any,
        candidates=search.candidates(largest),
        mode=mode,
        search=search,
        reason="data" if largest == held and largest != ceiling else "ceiling",
    )
    with ExitStack() as stack:
        observer = observer_of(progress, stack)
        if search.forget_errors:
            forget_last_error(observer)
        if job is None:
            return find_isolated(resolve, find, sample_to_send(source, search), search, observer)
        with job.undisturbed():
            return find(job, sample_of(source, search), observer)


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
    check_mode(mode)
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
    if search.forget_errors:
        forget_last_error(lambda _: None)
    if search.isolate:
        source = open_source(data, batch_size=examples)
        refuse_one_pass(source)
        sample = sample_to_send(source, search)
        task = functools.partial(try_alone, resolve, sample, size, mode, search)
        return try_isolated(task, timeout_seconds=search.patience_seconds)
    job = resolve(data, batch_size=examples)
    refuse_one_pass(job.source)
    with job.undisturbed():
        return try_size(job, sample_of(job.source, search), size, mode, search)


def _train(
    course: Course, prefer: Prefer, search: SearchOptions, observer: Observer
) -> TrainingResult:
    """Search, then train with what was found."""
    job = course.job
    if search.forget_errors:
        forget_last_error(observer)
    with course.undone_on_error():
        first = course.open(observer)
        if course.is_done():
            return course.done_before()
        window = course.window(first)
        find = functools.partial(
            find_useful,
            window=window,
            # The checkpoint's own size stays where it fits: it need not be timed again.
            prefer=prefer if course.saved is None else "largest",
            steps=course.steps_to_come(),
            search=search,
            reason="ceiling" if window == course.desired else "data",
        )
        if search.isolate:
            sample = sample_to_send(job.source, search, first)
            found = find_isolated(job.resolve_again, find, sample, search, observer)
        else:
            with job.undisturbed():
                sample = sample_of(job.source, search, first)
                found = find(job, sample, observer)
    del first, sample  # The largest that there is: the epochs hold it for as long as it is needed.
    infer = functools.partial(size_for_inference, job)
    return course.train(found, window, observer, infer, search.multiple_of)
