"""Epochs of logical batches, one optimizer step each."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from autobatch.batches.nest import Nest
from autobatch.events import EpochEnded, Observer, StepEnded
from autobatch.plan import BatchPlan
from autobatch.results import StepResult
from autobatch.training.step import Accumulator


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a training has done so far.

    Attributes:
        losses: One per optimizer step.
        examples: That entered a step.
        epochs: Begun.
        replays: Windows run again.
        skipped: Logical batches without a valid term.
        seconds: Since the first window.
    """

    losses: list[float] = field(default_factory=list)
    examples: int = 0
    epochs: int = 0
    replays: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def count(self, step: StepResult) -> None:
        """Add one step, or one that was skipped."""
        self.replays += step.replays
        if step.skipped:
            self.skipped += 1
            return
        self.losses.append(step.loss)
        self.examples += step.examples


def train(
    accumulator: Accumulator,
    epochs: Iterable[Iterator[Nest]],
    *,
    desired: int,
    max_steps: int | None,
    observer: Observer,
) -> Progress:
    """Step through ``epochs`` of logical batches, and return what was done.

    Args:
        accumulator: Takes the steps.
        epochs: Each yields the logical batches of one epoch. None is opened before its turn.
        desired: Examples in a full logical batch.
        max_steps: Stop after so many optimizer steps; None goes on to the end.
        observer: Is told of every step and epoch.
    """
    progress = Progress()
    started = time.perf_counter()
    for epoch, logical_batches in enumerate(epochs, start=1):
        progress.epochs = epoch
        before, epoch_started = len(progress.losses), time.perf_counter()
        sizes: list[int] = []
        for batch in logical_batches:
            step = accumulator.step(batch)
            progress.count(step)
            if not step.skipped:
                sizes.append(step.examples)
            tolerable = accumulator.micro_batch or desired
            plan = BatchPlan(desired=desired, tolerable=min(tolerable, desired))
            observer(StepEnded(step=step, epoch=epoch, plan=plan))
            if len(progress.losses) == max_steps:
                break
        progress.seconds = time.perf_counter() - started
        elapsed = time.perf_counter() - epoch_started
        observer(
            EpochEnded(
                epoch=epoch,
                loss=_weighted_mean(progress.losses[before:], sizes),
                examples_per_second=sum(sizes) / elapsed if elapsed else 0.0,
            )
        )
        if len(progress.losses) == max_steps:
            break
    return progress


def _weighted_mean(losses: list[float], sizes: list[int]) -> float:
    if not sizes:
        return math.nan
    return math.fsum(map(float.__mul__, losses, map(float, sizes))) / sum(sizes)
