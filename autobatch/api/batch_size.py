"""Search the largest batch that fits, or check whether one size fits."""

import functools
from contextlib import ExitStack
from typing import Final, Unpack

import torch
from torch import nn
from torch.optim import Optimizer

from autobatch.data.source import Data, open_source
from autobatch.display import observer_of
from autobatch.events import Observer
from autobatch.isolation.trials import try_isolated
from autobatch.results.search import SearchResult, Trial
from autobatch.search.options import STANDARD_SEARCH, SearchOptions, check_search
from autobatch.state.last_error import forget_last_error
from autobatch.training.losses.resolve import LossLike
from autobatch.training.options import StepOptions
from autobatch.training.step_arguments import StepArguments, shows_step_options, step_options
from autobatch.training.workload import OptimizerFactory, Workload
from autobatch.tuner import (
    Mode,
    check_mode,
    find_any_size,
    find_isolated,
    find_size,
    refuse_one_pass,
    sample_of,
    sample_to_send,
    try_in_process,
    try_size,
)
from autobatch.units import Size
from autobatch.validation import check_size

_SAMPLE: Final = 64  # The examples of a Dataset that a trial repeats.
_UNKNOWN_CEILING: Final = 2**20  # For a call without ceiling and data without length.


@shows_step_options
def find_batch_size(
    model: nn.Module,
    data: Data,
    *,
    ceiling: int | None = None,
    loss: LossLike | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    device: str | torch.device | None = None,
    memory_limit: Size | None = None,
    headroom: Size | None = None,
    mode: Mode = "train",
    search: SearchOptions = STANDARD_SEARCH,
    progress: bool | Observer = False,
    options: StepOptions | None = None,
    **step: Unpack[StepArguments],
) -> SearchResult:
    """Return the largest batch that runs inside the memory limit, and leave everything as it was.

    Every size up to ``ceiling`` is a candidate. A trial runs two micro-batches and the optimizer's
    step with the step's options, as training with accumulation does, or a forward pass::

        data = (torch.randn(64, 4), torch.randint(0, 2, (64,)))
        found = find_batch_size(nn.Linear(4, 2), data, precision="bf16")
        print(found.size, found.limited_by)

    Args:
        model: As for ``find_and_train``. Parameters, buffers, gradients, modes and device are
            restored bit for bit.
        data: As for ``find_and_train``, of which a sample is read; not an iterator, because its
            examples could not be returned to it.
        ceiling: The largest size of interest. None is the number of examples in the data, or 2**20
            where the data has no length.
        loss: As for ``find_and_train``.
        optimizer: As for ``find_and_train``; an instance is restored too.
        device: As for ``find_and_train``; the model is returned to where it was.
        memory_limit: As for ``find_and_train``.
        headroom: As for ``find_and_train``.
        mode: ``"train"``, or ``"inference"`` for forward passes in evaluation mode, without
            gradients and optimizer. Batches need no targets then.
        search: As for ``find_and_train``.
        progress: As for ``find_and_train``.
        options: As for ``find_and_train``.
        step: As for ``find_and_train``.

    Returns:
        The size, what limits it, its memory and the trials.

    Raises:
        TypeError, ValueError: An argument is wrong. Nothing was changed.
        DoesNotFitError: Not even one example fits.
        SearchTimeoutError, DeviceLostError: As for ``find_and_train``.
    """
    options = step_options(find_batch_size, options, loss, step)
    if ceiling is not None:
        ceiling = check_size("ceiling", ceiling)
    check_search(search)
    check_mode(mode)
    resolve = functools.partial(
        Workload.resolve,
        model,
        options=options,
        optimizer=optimizer,
        device=device,
        memory_limit=memory_limit,
        headroom=headroom,
    )
    # An isolated search opens the device in its own process only.
    workload = None if search.isolate else resolve(data, batch_size=_SAMPLE)
    source = open_source(data, batch_size=_SAMPLE) if workload is None else workload.source
    refuse_one_pass(source)
    examples = source.examples
    largest = min(ceiling or examples or _UNKNOWN_CEILING, examples or ceiling or _UNKNOWN_CEILING)
    find = functools.partial(
        find_any_size,
        candidates=search.candidates(largest),
        mode=mode,
        search=search,
        reason="data" if largest == examples and largest != ceiling else "ceiling",
    )
    with ExitStack() as stack:
        observer = observer_of(progress, stack)
        if search.forget_errors:
            forget_last_error(observer)
        if workload is None:
            return find_isolated(resolve, find, sample_to_send(source, search), search, observer)
        return find_size(workload, find, search, observer)


@shows_step_options
def check(
    model: nn.Module,
    data: Data,
    size: int,
    *,
    loss: LossLike | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    device: str | torch.device | None = None,
    memory_limit: Size | None = None,
    headroom: Size | None = None,
    mode: Mode = "train",
    search: SearchOptions = STANDARD_SEARCH,
    options: StepOptions | None = None,
    **step: Unpack[StepArguments],
) -> Trial:
    """Try one size, and leave everything as it was; a size that does not fit raises nothing.

    For example::

        data = (torch.randn(64, 4), torch.randint(0, 2, (64,)))
        trial = check(nn.Linear(4, 2), data, size=32)
        print(trial.fits, trial.peak_bytes)

    Args:
        model: As for ``find_batch_size``.
        data: As for ``find_batch_size``; its examples are repeated if it has fewer than ``size``.
        size: Examples in each of the two micro-batches of the trial, or in its forward pass.
        loss: As for ``find_and_train``.
        optimizer: As for ``find_and_train``.
        device: As for ``find_and_train``.
        memory_limit: As for ``find_and_train``.
        headroom: As for ``find_and_train``.
        mode: As for ``find_batch_size``.
        search: Its timeout and its worst case are used.
        options: As for ``find_and_train``.
        step: As for ``find_and_train``.

    Returns:
        Whether the size fits, its peak memory in bytes, and how the trial failed if it failed.

    Raises:
        TypeError, ValueError: An argument is wrong. Nothing was changed.
    """
    options = step_options(check, options, loss, step)
    size = check_size("size", size)
    check_search(search)
    check_mode(mode)
    resolve = functools.partial(
        Workload.resolve,
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
        task = functools.partial(try_in_process, resolve, sample, size, mode, search)
        return try_isolated(task, timeout_seconds=search.patience_seconds)
    workload = resolve(data, batch_size=examples)
    refuse_one_pass(workload.source)
    with workload.undisturbed():
        return try_size(workload, sample_of(workload.source, search), size, mode, search)
