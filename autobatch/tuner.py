"""Searches over the training step, here or in another process."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Final, Literal, get_args

from torch import Tensor

from autobatch.data.sample import read_sample
from autobatch.data.source import Source
from autobatch.data.tree import BatchTree, map_tensors, size_of
from autobatch.data.worst_case import worst_case_of
from autobatch.errors import DoesNotFitError
from autobatch.events import Observer, SizesTimed, TrialStarted
from autobatch.isolation.trials import run_isolated
from autobatch.results.plan import BatchPlan, even_sizes, useful_sizes
from autobatch.results.search import LimitedBy, SearchResult, Trial
from autobatch.results.verdict import Verdict
from autobatch.search.finder import BatchSizeFinder
from autobatch.search.options import STANDARD_SEARCH, SearchOptions
from autobatch.search.throughput import FEWEST_WINDOWS, sizes_to_time, speeds
from autobatch.state.rng import random_state
from autobatch.training.evaluation.inference import Inference, inference
from autobatch.training.trial_step import TrialStep
from autobatch.training.workload import Workload

Mode = Literal["train", "inference"]
Prefer = Literal["largest", "fastest"]
Resolve = Callable[..., Workload]
Find = Callable[..., SearchResult]
Sample = tuple[BatchTree, str]  # The examples of a trial, and a description of them.

_PREFER: Final = get_args(Prefer)
_PASSES: Final[dict[Mode, int]] = {"train": 2, "inference": 1}  # Micro-batches in a trial.


def find_size(
    workload: Workload,
    find: Find,
    search: SearchOptions,
    observer: Observer,
    first: BatchTree | None = None,
) -> SearchResult:
    """Search here, or in another process if ``search.isolate`` is set, and restore everything.

    Args:
        workload: The step that trials run.
        find: ``find_any_size`` or ``find_training_size``, without its first three arguments.
        search: How to search.
        observer: Receives an event for every trial.
        first: A batch that has been read already; None reads a sample.
    """
    if search.isolate:
        sample = sample_to_send(workload.source, search, first)
        return find_isolated(workload.resolver(), find, sample, search, observer)
    with workload.undisturbed():
        return find(workload, sample_of(workload.source, search, first), observer)


def find_any_size(
    workload: Workload,
    sample: Sample,
    observer: Observer,
    history: Sequence[Trial] = (),
    *,
    candidates: Sequence[int],
    mode: Mode,
    search: SearchOptions,
    reason: LimitedBy,
) -> SearchResult:
    """Search all candidates. The caller restores the workload."""
    return _mode_finder(workload, sample, mode, search, observer, history).largest(
        candidates, windows=lambda size: (size,) * _PASSES[mode], reason=reason
    )


def find_training_size(
    workload: Workload,
    sample: Sample,
    observer: Observer,
    history: Sequence[Trial] = (),
    *,
    logical_batch_size: int,
    prefer: Prefer,
    search: SearchOptions,
    reason: LimitedBy,
    steps: int | None = None,
) -> SearchResult:
    """Search the sizes that change how a logical batch is cut. The caller restores the workload.

    Args:
        workload: The step that trials run.
        sample: The examples of a trial.
        observer: Receives an event for every trial.
        history: Trials of an earlier process, which are not repeated.
        logical_batch_size: Examples in a logical batch.
        prefer: The largest size that fits, or the fastest one.
        search: How to search.
        reason: What limits the largest candidate.
        steps: The optimizer steps that the training will take; None if unknown.
    """
    examples, description = sample
    trial_step = TrialStep(workload.step, examples, logical_batch_size)
    multiple_of = search.multiple_of
    full_batch = workload.step.objective.needs_full_batch
    if full_batch:  # All outputs are in memory once a batch is cut: memory is not convex in size.
        search = replace(search, confirm="failed")
    candidates = search.not_below_floor(useful_sizes(logical_batch_size, multiple_of))

    def sizes_to_try(size: int) -> tuple[int, ...]:
        plan = BatchPlan(desired=logical_batch_size, tolerable=size, multiple_of=multiple_of)
        return plan.micro_batch_sizes if full_batch else _micro_batches_to_try(plan)

    found = _finder(workload, trial_step, search, observer, description, history).largest(
        candidates,
        windows=sizes_to_try,
        reason=reason,
        saved_bytes=trial_step.saved_bytes,
        ceiling_first=full_batch,
    )
    if prefer == "fastest":
        windows = {
            size: even_sizes(logical_batch_size, size, multiple_of)
            for size in sizes_to_time(candidates, found.size)
        }
        found = _timed(workload, trial_step, found, windows, steps)
        observer(SizesTimed(search=found))
    return found


def find_inference_size(workload: Workload, run: Inference, candidates: Sequence[int]) -> int:
    """Return the largest candidate that inference ran at, with the optimizer state in memory."""
    finder = _finder(workload, run, STANDARD_SEARCH, lambda _: None, "")
    return finder.largest(candidates, windows=lambda size: (size,), reason="ceiling").size


def try_size(
    workload: Workload, sample: Sample, size: int, mode: Mode, search: SearchOptions
) -> Trial:
    """Try one size. The caller restores the workload."""
    try:
        finder = _mode_finder(workload, sample, mode, search, lambda _: None)
        return finder.try_window((size,) * _PASSES[mode])
    except DoesNotFitError as error:  # The model alone does not fit, so no batch does.
        return Trial(size=size, fits=False, failure=Verdict.OUT_OF_MEMORY, message=str(error))


def find_isolated(
    resolve: Resolve, find: Find, sample: Sample, search: SearchOptions, observer: Observer
) -> SearchResult:
    """Search in another process.

    Args:
        resolve: Makes the workload there, from data and a batch size.
        find: As for ``find_size``.
        sample: The examples of a trial, from ``sample_to_send``.
        search: How to search.
        observer: Receives here an event for every trial there.
    """
    return run_isolated(
        functools.partial(_find_in_process, resolve, find, sample),
        observer=observer,
        timeout_seconds=search.patience_seconds,
    )


def _find_in_process(
    resolve: Resolve, find: Find, sample: Sample, observer: Observer, history: Sequence[Trial]
) -> SearchResult:
    """Make the workload anew in the isolated process, and search."""
    workload = resolve([sample[0]], batch_size=size_of(sample[0]))
    with workload.undisturbed():
        return find(workload, sample, observer, history)


def try_in_process(
    resolve: Resolve,
    sample: Sample,
    size: int,
    mode: Mode,
    search: SearchOptions,
    observer: Observer,
    _: Sequence[Trial],
) -> Trial:
    """Make the workload anew in the isolated process, and try one size."""
    workload = resolve([sample[0]], batch_size=size_of(sample[0]))
    observer(TrialStarted(size=size))
    with workload.undisturbed():
        return try_size(workload, sample, size, mode, search)


def sample_of(source: Source, search: SearchOptions, first: BatchTree | None = None) -> Sample:
    """Return the examples of a trial: those of ``first``, or a sample that is read now."""
    return worst_case_of(source, read_sample(source) if first is None else first, search.worst_case)


def sample_to_send(source: Source, search: SearchOptions, first: BatchTree | None = None) -> Sample:
    """Return ``sample_of`` for another process, and restore the random generators.

    The tensors are copied: to send a slice of a tensor would send the whole tensor.
    """
    restore_random = random_state([source.owner])
    try:
        examples, description = sample_of(source, search, first)
        return map_tensors(Tensor.clone, examples), description
    finally:
        restore_random()


def check_prefer(prefer: object) -> None:
    """Refuse an unknown value of ``prefer``.

    Raises:
        ValueError: The value is unknown; the message shows it and the values that are allowed.
    """
    if prefer not in _PREFER:
        raise ValueError(f"prefer must be one of {_PREFER}, got {prefer!r}")


def check_mode(mode: object) -> None:
    """Refuse an unknown value of ``mode``.

    Raises:
        ValueError: The value is unknown; the message shows it and the values that are allowed.
    """
    if mode not in _PASSES:
        raise ValueError(f"mode must be one of {tuple(_PASSES)}, got {mode!r}")


def refuse_one_pass(source: Source) -> None:
    """Refuse data that can be read only once: a sample could not be returned to it.

    Raises:
        TypeError: The data is an iterator or a generator; the message shows the way out.
    """
    if source.one_pass:
        raise TypeError(
            "data is a one-pass iterable, and the sample of a search could not be returned to it; "
            "pass a DataLoader, a Dataset, tensors or a list of batches, or use find_and_train, "
            "which trains on the sample"
        )


def _mode_finder(
    workload: Workload,
    sample: Sample,
    mode: Mode,
    search: SearchOptions,
    observer: Observer,
    history: Sequence[Trial] = (),
) -> BatchSizeFinder:
    """Return the finder of a mode: training steps, or forward passes in evaluation mode."""
    examples, description = sample
    trial_step: TrialStep | Inference
    if mode == "train":
        trial_step = TrialStep(workload.step, examples)
    else:
        workload.step.model.eval()
        trial_step = inference(
            workload.step.gradient_pass, workload.step.objective.forward, examples
        )
    return _finder(workload, trial_step, search, observer, description, history)


def _finder(
    workload: Workload,
    trial_step: TrialStep | Inference,
    search: SearchOptions,
    observer: Observer,
    worst_case: str,
    history: Sequence[Trial] = (),
) -> BatchSizeFinder:
    trains = isinstance(trial_step, TrialStep)
    return BatchSizeFinder(
        program=trial_step,
        device=workload.device,
        limit_bytes=functools.partial(workload.limit_bytes, trains=trains),
        breakdown=functools.partial(workload.breakdown, trains=trains),
        observer=observer,
        options=search,
        worst_case=worst_case,
        history=history,
    )


def _micro_batches_to_try(plan: BatchPlan) -> tuple[int, ...]:
    """Return the sizes of the micro-batches whose trial stands for a logical batch of ``plan``.

    These are two of the largest, because gradients are in memory in the second forward pass. If the
    plan has a micro-batch of one example, it is tried as well: BatchNorm may refuse it.
    """
    sizes = (plan.micro_batch,) * min(2, plan.accumulation_steps)
    return (*sizes, 1) if min(plan.micro_batch_sizes) == 1 < plan.micro_batch else sizes


def _timed(
    workload: Workload,
    trial_step: TrialStep,
    found: SearchResult,
    windows: Mapping[int, Sequence[int]],
    steps: int | None,
) -> SearchResult:
    """Return the search result with the training speed at each size of ``windows``.

    A training of ``steps`` optimizer steps that is shorter than the timing itself is not timed.
    """
    fewest = FEWEST_WINDOWS * len(windows)
    if steps is not None and steps <= fewest:
        note = (
            f'prefer="fastest" timed nothing: timing takes {fewest} steps or more, and the '
            f"training takes {steps}"
        )
        return replace(found, notes=(*found.notes, note))
    limited = functools.partial(workload.device.limited_to, found.limit_bytes)
    timed = speeds(
        trial_step, workload.device, windows, limited if workload.limits_training else nullcontext
    )
    return replace(found, speeds=timed)
