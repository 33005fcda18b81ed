"""Searches wired, the only place where probing meets training: here or in another process."""

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
from autobatch.isolation.process import run_isolated
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
Sample = tuple[BatchTree, str]  # A trial's examples, and which they are, in words.

_PREFER: Final = get_args(Prefer)
_PASSES: Final[dict[Mode, int]] = {"train": 2, "inference": 1}  # Micro-batches in a trial.


def _timed(
    job: Workload,
    rehearsal: TrialStep,
    found: SearchResult,
    windows: Mapping[int, Sequence[int]],
    steps: int | None,
) -> SearchResult:
    """The search, with how fast the size that it found and smaller ones train.

    Not where timing would take longer than the training: so many steps, if that is known.
    """
    fewest = FEWEST_WINDOWS * len(windows)
    if steps is not None and steps <= fewest:
        told = (
            f'prefer="fastest" timed nothing: timing takes {fewest} steps or more, and the '
            f"training takes {steps}"
        )
        return replace(found, notes=(*found.notes, told))
    limited = functools.partial(job.device.limited_to, found.limit_bytes)
    timed = speeds(
        rehearsal,
        job.device,
        windows,
        limited if job.trains_limited else nullcontext,
    )
    return replace(found, speeds=timed)


def size_for_inference(job: Workload, run: Inference, candidates: Sequence[int]) -> int:
    """The largest size that inference really ran at, beside the weights and the optimizer."""
    finder = _finder(job, run, STANDARD_SEARCH, lambda _: None, "")
    return finder.largest(candidates, windows=lambda size: (size,), reason="ceiling").size


def find_any(
    job: Workload,
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


def find_useful(
    job: Workload,
    sample: Sample,
    observer: Observer,
    history: Sequence[Trial] = (),
    *,
    window: int,
    prefer: Prefer,
    search: SearchOptions,
    reason: LimitedBy,
    steps: int | None = None,
) -> SearchResult:
    """Search the sizes that change how a window is cut, in a job that is undisturbed.

    Args:
        job: Whose step is rehearsed.
        sample: The examples of a trial.
        observer: Is told of every trial.
        history: Trials that were made elsewhere.
        window: Examples in a logical batch.
        prefer: The largest size, or the fastest.
        search: How to search.
        reason: What the ceiling is made of.
        steps: How many will be taken, where that is known.
    """
    examples, said = sample
    rehearsal, multiple_of = TrialStep(job.step, examples, window), search.multiple_of
    full_batch = job.step.objective.needs_full_batch
    if full_batch:  # All outputs are alive if it is cut, whatever the size: no convex curve.
        search = replace(search, confirm="failed")
    candidates = search.not_below_floor(useful_sizes(window, multiple_of))
    found = _finder(job, rehearsal, search, observer, said, history).largest(
        candidates,
        windows=lambda size: _rehearsed(
            job, BatchPlan(desired=window, tolerable=size, multiple_of=multiple_of)
        ),
        reason=reason,
        saved_bytes=rehearsal.saved_bytes,
        ceiling_first=full_batch,
    )
    if prefer == "fastest":
        sizes = sizes_to_time(candidates, found.size)
        windows = {size: even_sizes(window, size, multiple_of) for size in sizes}
        found = _timed(job, rehearsal, found, windows, steps)
        observer(SizesTimed(search=found))
    return found


def try_size(job: Workload, sample: Sample, size: int, mode: Mode, search: SearchOptions) -> Trial:
    """Rehearse one size, in a job that is undisturbed."""
    try:
        finder = _probe(job, sample, mode, search, lambda _: None)
        return finder.try_window((size,) * _PASSES[mode])
    except DoesNotFitError as error:  # The model alone is too large: so is any batch.
        return Trial(size=size, fits=False, failure=Verdict.OUT_OF_MEMORY, message=str(error))


def find_isolated(
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


def try_alone(
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
        return try_size(job, sample, size, mode, search)


def sample_of(source: Source, search: SearchOptions, first: BatchTree | None = None) -> Sample:
    """Return the examples of a trial: from ``first``, where that has been read already."""
    return worst_case_of(source, read_sample(source) if first is None else first, search.worst_case)


def sample_to_send(source: Source, search: SearchOptions, first: BatchTree | None = None) -> Sample:
    """As ``sample_of``; no generator has moved afterwards.

    Copied, for a slice of a tensor would take with it all that it is a slice of.
    """
    put_back = random_state([source.owner])
    try:
        examples, said = sample_of(source, search, first)
        return map_tensors(Tensor.clone, examples), said
    finally:
        put_back()


def _probe(
    job: Workload,
    sample: Sample,
    mode: Mode,
    search: SearchOptions,
    observer: Observer,
    history: Sequence[Trial] = (),
) -> BatchSizeFinder:
    """A search over a job that is undisturbed, in training or in inference."""
    examples, said = sample
    if mode == "train":
        return _finder(job, TrialStep(job.step, examples), search, observer, said, history)
    job.step.model.eval()
    run = inference(job.step.gradient, job.step.objective.forward, examples)
    return _finder(job, run, search, observer, said, history)


def check_prefer(prefer: object) -> None:
    """Refuse what is no preference.

    Raises:
        ValueError: With the value that came.
    """
    if prefer not in _PREFER:
        raise ValueError(f"prefer must be one of {_PREFER}, got {prefer!r}")


def check_mode(mode: object) -> None:
    """Refuse what is no mode of a search.

    Raises:
        ValueError: With the value that came.
    """
    if mode not in _PASSES:
        raise ValueError(f"mode must be one of {tuple(_PASSES)}, got {mode!r}")


def _finder(
    job: Workload,
    rehearsal: TrialStep | Inference,
    search: SearchOptions,
    observer: Observer,
    worst_case: str,
    history: Sequence[Trial] = (),
) -> BatchSizeFinder:
    trains = isinstance(rehearsal, TrialStep)
    return BatchSizeFinder(
        program=rehearsal,
        device=job.device,
        limit_bytes=functools.partial(job.limit_bytes, trains=trains),
        breakdown=functools.partial(job.breakdown, trains=trains),
        observer=observer,
        options=search,
        worst_case=worst_case,
        history=history,
    )


def _rehearsed(job: Workload, plan: BatchPlan) -> tuple[int, ...]:
    """The micro-batches that stand for a window of ``plan``.

    Two of the largest: gradients are alive in the second's forward pass. And a single example
    where the plan has one: BatchNorm may refuse it, and had better do so now. Where the loss is
    that of the whole batch, all of them: their outputs are alive together.
    """
    if job.step.objective.needs_full_batch:
        return plan.micro_batch_sizes
    sizes = (plan.micro_batch,) * min(2, plan.accumulation_steps)
    return (*sizes, 1) if min(plan.micro_batch_sizes) == 1 < plan.micro_batch else sizes


def refuse_one_pass(source: Source) -> None:
    """Refuse data of which a sample could not be given back.

    Raises:
        TypeError: With the way out.
    """
    if source.one_pass:
        raise TypeError(
            "the sample of a one-pass iterable could not be given back; pass a DataLoader, a "
            "Dataset, tensors or a list of batches, or use find_and_train, which trains on it"
        )
