"""The public functions: the only place where probing meets training."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import torch
from torch import nn
from torch.optim import Optimizer

from autobatch.batches.nest import Nest, size_of
from autobatch.batches.regroup import Data, logical_batches
from autobatch.batches.sample import read_sample
from autobatch.display import Display
from autobatch.errors import DoesNotFitError
from autobatch.events import Observer, TrainingStarted
from autobatch.job import Job, LossLike, OptimizerFactory, Size
from autobatch.plan import BatchPlan, check_size, useful_sizes
from autobatch.probing.finder import Finder
from autobatch.randomness import check_seed, seed_all
from autobatch.results import SearchResult, TrainingResult, Trial, Verdict
from autobatch.state import training_mode
from autobatch.training.batch_norm import normalises_by_batch
from autobatch.training.forward import Forward
from autobatch.training.loop import train
from autobatch.training.notes import notes
from autobatch.training.rehearsal import Rehearsal
from autobatch.training.step import Accumulator

_SAMPLE: Final = 64  # Examples of a Dataset that a trial repeats.
_UNKNOWN_CEILING: Final = 2**20  # Where neither the call nor the data names one.


def find_and_train(
    model: nn.Module,
    data: Data,
    desired: int = 256,
    *,
    loss: LossLike | None = None,
    forward: Forward | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    epochs: int = 1,
    max_steps: int | None = None,
    drop_last: bool = False,
    device: str | torch.device | None = None,
    memory_limit: Size | None = None,
    headroom: Size | None = None,
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
            is ``(inputs, ..., target)``, or a mapping with a key ``labels`` or ``target``.
        desired: Examples per optimizer step. The last step of an epoch takes what is left.
        loss: A loss of torch, its functional or a partial of that; or any callable
            ``(outputs, targets)`` that returns a mean over examples or ``(sum, terms)``. None is
            cross-entropy for integer targets and mean squared error for floating ones.
        forward: ``(model, batch) -> (outputs, targets)``, for batches of another kind.
        optimizer: An instance, or a factory ``params -> Optimizer``; None is AdamW.
        epochs: How often the data is seen.
        max_steps: Stop after so many optimizer steps, even within an epoch.
        drop_last: Leave out a last logical batch that is short.
        device: Where to train; None is where the parameters are, or a GPU if they are on the CPU
            and there is one.
        memory_limit: What the whole process may use, in bytes or like ``"24GiB"``: plans for a
            smaller device. None takes what is free.
        headroom: Bytes to keep free; None is 2 % of the device and at least 300 MiB, or nothing
            where a ``memory_limit`` is given.
        seed: Seeds torch, NumPy and Python first; None leaves them alone.
        progress: True shows trials and a progress bar, False is silent; a callable is told of
            every event instead.

    Returns:
        The plan, the search, the losses, and notes on what was not exact.

    Raises:
        TypeError, ValueError: A bad argument, before anything is touched.
        DoesNotFitError: Not even one example fits; model and optimizer are as they were.
        InexactStepError: Splitting would change this loss. Found in the first windows that are
            cut: at the first, nothing has been trained; that step has moved nothing.
        StepInterruptedError: Memory ran out with an optimizer step half done.
    """
    desired = check_size("desired", desired)
    epochs = check_size("epochs", epochs)
    if max_steps is not None:
        max_steps = check_size("max_steps", max_steps)
    check_seed(seed)
    job = Job.resolve(
        model,
        data,
        batch_size=desired,
        loss=loss,
        forward=forward,
        optimizer=optimizer,
        device=device,
        memory_limit=memory_limit,
        headroom=headroom,
    )
    if job.source.one_pass and epochs > 1:
        raise ValueError(f"epochs={epochs} needs data that can be read again, got a one-pass one")
    seed_all(seed)
    with ExitStack() as stack:
        observer = _observer(progress, stack)
        stream = logical_batches(job.source.epoch(), desired, drop_last=drop_last)
        first = _first(stream, job, desired, drop_last=drop_last)
        window = size_of(first)
        with job.undisturbed():
            found = _finder(job, first, observer).largest(
                useful_sizes(window),
                windows=lambda size: _rehearsed(BatchPlan(desired=window, tolerable=size)),
                reason="ceiling" if window == desired else "data",
            )
        with_first = itertools.chain([first], stream)
        del first
        return _train(
            job,
            found,
            _epochs(job, with_first, desired, epochs, drop_last=drop_last),
            desired=window,
            asked=desired,
            epochs=epochs,
            max_steps=max_steps,
            drop_last=drop_last,
            observer=observer,
        )


def find_batch_size(
    model: nn.Module,
    data: Data,
    *,
    ceiling: int | None = None,
    loss: LossLike | None = None,
    forward: Forward | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    device: str | torch.device | None = None,
    memory_limit: Size | None = None,
    headroom: Size | None = None,
    progress: bool | Observer = False,
) -> SearchResult:
    """Return the largest batch that trains inside the limit; leave everything as it was.

    Every size up to ``ceiling`` is a candidate. A trial runs two micro-batches and the optimizer's
    step, as training with accumulation does. Arguments are those of ``find_and_train``.

    Args:
        model: Put back bit for bit: parameters, buffers, gradients, modes, device.
        data: Only a sample is read. Not an iterator, which could not be given back.
        ceiling: The largest size of interest; None is what the data holds, or about a million
            where it does not say.
        loss: As for ``find_and_train``.
        forward: As for ``find_and_train``.
        optimizer: As for ``find_and_train``; an instance is put back too.
        device: As for ``find_and_train``; the model is put back where it was.
        memory_limit: As for ``find_and_train``.
        headroom: As for ``find_and_train``.
        progress: As for ``find_and_train``.

    Raises:
        TypeError, ValueError: A bad argument, before anything is touched.
        DoesNotFitError: Not even one example fits.
    """
    if ceiling is not None:
        ceiling = check_size("ceiling", ceiling)
    job = Job.resolve(
        model,
        data,
        batch_size=_SAMPLE,
        loss=loss,
        forward=forward,
        optimizer=optimizer,
        device=device,
        memory_limit=memory_limit,
        headroom=headroom,
    )
    _refuse_one_pass(job)
    held = job.source.examples
    largest = min(ceiling or held or _UNKNOWN_CEILING, held or ceiling or _UNKNOWN_CEILING)
    with ExitStack() as stack:
        observer = _observer(progress, stack)
        with job.undisturbed():
            return _finder(job, read_sample(job.source), observer).largest(
                range(1, largest + 1),
                windows=lambda size: (size, size),
                reason="data" if largest == held and largest != ceiling else "ceiling",
            )


def check(
    model: nn.Module,
    data: Data,
    size: int,
    *,
    loss: LossLike | None = None,
    forward: Forward | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    device: str | torch.device | None = None,
    memory_limit: Size | None = None,
    headroom: Size | None = None,
) -> Trial:
    """Rehearse one size, and leave everything as it was. Not fitting is a value, no exception.

    Args:
        model: As for ``find_batch_size``.
        data: As for ``find_batch_size``; its examples are repeated if it holds fewer than ``size``.
        size: Examples in each of the rehearsal's two micro-batches.
        loss: As for ``find_and_train``.
        forward: As for ``find_and_train``.
        optimizer: As for ``find_and_train``.
        device: As for ``find_and_train``.
        memory_limit: As for ``find_and_train``.
        headroom: As for ``find_and_train``.

    Raises:
        TypeError, ValueError: A bad argument, before anything is touched.
    """
    size = check_size("size", size)
    job = Job.resolve(
        model,
        data,
        batch_size=min(size, _SAMPLE),
        loss=loss,
        forward=forward,
        optimizer=optimizer,
        device=device,
        memory_limit=memory_limit,
        headroom=headroom,
    )
    _refuse_one_pass(job)
    with job.undisturbed():
        try:
            finder = _finder(job, read_sample(job.source), lambda _: None)
        except DoesNotFitError as error:  # The model alone is too large: so is any batch.
            return Trial(size=size, fits=False, failure=Verdict.OUT_OF_MEMORY, message=str(error))
        return finder.rehearse((size, size))


def _train(
    job: Job,
    found: SearchResult,
    streams: Iterator[Iterator[Nest]],
    *,
    desired: int,
    asked: int,
    epochs: int,
    max_steps: int | None,
    drop_last: bool,
    observer: Observer,
) -> TrainingResult:
    """Train with the size that was found."""
    job.move()
    plan = BatchPlan(desired=desired, tolerable=found.size)
    # The CPU is metered only where a limit was asked for: the meter costs time, and without one
    # the search has left the headroom.
    limited = job.memory_limit_bytes is not None or job.device.torch_device.type != "cpu"
    accumulator = Accumulator.following(
        job.recipe,
        micro_batch=found.size,
        limit_bytes=found.limit_bytes if limited else None,
        observer=observer,
    )
    steps = _steps(job.source.examples, asked, epochs, max_steps, drop_last=drop_last)
    observer(TrainingStarted(plan=plan, steps=steps, epochs=epochs))
    with training_mode(job.recipe.model):
        normalises = normalises_by_batch(job.recipe.model)
        done = train(accumulator, streams, desired=desired, max_steps=max_steps, observer=observer)
    tolerable = min(accumulator.micro_batch or desired, desired)
    return TrainingResult(
        plan=BatchPlan(desired=desired, tolerable=tolerable),
        search=found,
        losses=tuple(done.losses),
        epochs=done.epochs,
        examples=done.examples,
        seconds=done.seconds,
        replays=done.replays,
        notes=tuple(
            notes(
                plan,
                BatchPlan(desired=desired, tolerable=tolerable),
                done,
                asked=asked,
                normalises=normalises,
                checked=job.recipe.loss.checked,
                moved=sorted(accumulator.moved_buffers),
            )
        ),
    )


def _finder(job: Job, sample: Nest, observer: Observer) -> Finder:
    """A search over a job that is undisturbed."""
    return Finder(
        rehearsal=Rehearsal(job.recipe, sample),
        device=job.device,
        limit_bytes=job.limit_bytes,
        breakdown_bytes=job.breakdown_bytes,
        observer=observer,
    )


def _rehearsed(plan: BatchPlan) -> tuple[int, ...]:
    """The micro-batches that stand for a window of ``plan``.

    Two of the largest: gradients are alive in the second's forward pass. And a single example
    where the plan has one: BatchNorm may refuse it, and had better do so now.
    """
    sizes = (plan.micro_batch,) * min(2, plan.accumulation_steps)
    return (*sizes, 1) if min(plan.micro_batch_sizes) == 1 < plan.micro_batch else sizes


def _observer(progress: bool | Observer, stack: ExitStack) -> Observer:
    if callable(progress):
        return progress
    return stack.enter_context(Display()) if progress else lambda _: None


def _refuse_one_pass(job: Job) -> None:
    if job.source.one_pass:
        raise TypeError(
            "the sample of a one-pass iterable could not be given back; pass a DataLoader, a "
            "Dataset, tensors or a list of batches, or use find_and_train, which trains on it"
        )


def _first(stream: Iterator[Nest], job: Job, desired: int, *, drop_last: bool) -> Nest:
    """The first logical batch. Training goes on with the same iterator behind it."""
    first = next(stream, None)
    if first is not None:
        return first
    if drop_last and job.source.examples:
        raise ValueError(
            f"with drop_last=True nothing is left to train on: data holds {job.source.examples} "
            f"examples, desired is {desired}"
        )
    raise ValueError("data is empty: it holds no example" + " to fill a batch" * drop_last)


def _epochs(
    job: Job, first: Iterator[Nest], desired: int, epochs: int, *, drop_last: bool
) -> Iterator[Iterator[Nest]]:
    """The logical batches of each epoch; the first epoch has begun, the others open in turn."""
    yield first
    for _ in range(epochs - 1):
        yield logical_batches(job.source.epoch(), desired, drop_last=drop_last)


def _steps(
    examples: int | None, desired: int, epochs: int, max_steps: int | None, *, drop_last: bool
) -> int | None:
    """Optimizer steps to come, where the data says how many examples it holds."""
    if examples is None:
        return max_steps
    in_epoch = examples // desired if drop_last else -(-examples // desired)
    return min(epochs * in_epoch, max_steps or epochs * in_epoch)
