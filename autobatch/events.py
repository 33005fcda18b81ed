"""What an observer may be told while work goes on."""

from collections.abc import Callable
from dataclasses import dataclass

from autobatch.results.plan import BatchPlan
from autobatch.results.search import OtherProcess, SearchResult, Trial
from autobatch.results.training import Evaluation, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStarted:
    """A search is about to try its first size.

    Attributes:
        device: The device's name, for people.
        limit_bytes: What a step may allocate.
        ceiling: The largest size of interest.
        others: Other processes on the device, as far as told.
    """

    device: str
    limit_bytes: int
    ceiling: int
    others: tuple[OtherProcess, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted:
    """A size is being rehearsed."""

    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnded:
    """A size was rehearsed."""

    trial: Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchEnded:
    """The tolerable batch is known."""

    search: SearchResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SizesTimed:
    """It is known how fast the tolerable batch and smaller ones train.

    Attributes:
        search: With its ``speeds``.
    """

    search: SearchResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStarted:
    """The first window is about to run.

    Attributes:
        plan: How each logical batch is cut.
        steps: Optimizer steps to come, or None where the data does not say.
        epochs: Epochs to come.
    """

    plan: BatchPlan
    steps: int | None
    epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnded:
    """An optimizer step was taken, or skipped.

    Attributes:
        step: What it did.
        epoch: Counted from 1.
        plan: How the next logical batch will be cut.
    """

    step: StepResult
    epoch: int
    plan: BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochEnded:
    """All data was seen once more.

    Attributes:
        epoch: Counted from 1.
        loss: The mean of the epoch's losses, weighted by examples; nan for an epoch without steps.
        examples_per_second: Over the whole epoch, loading included.
    """

    epoch: int
    loss: float
    examples_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Loss and metrics over data that is not trained on are known."""

    evaluation: Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Training goes on from a checkpoint.

    Attributes:
        checkpoint: Its path.
        steps: Optimizer steps that it has taken.
        epoch: In which it goes on, counted from 1; the last one, where nothing is left to do.
        differences: What goes on, or went, otherwise than is asked for now.
    """

    checkpoint: str
    steps: int
    epoch: int
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Memory ran out in a window, which is run again.

    Attributes:
        failed: The micro-batch size that did not fit.
        micro_batch: The size that is tried instead.
    """

    failed: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorForgotten:
    """The error that a notebook or a prompt kept was deleted, and its frames were cleared."""


Event = (
    ErrorForgotten
    | SearchStarted
    | TrialStarted
    | TrialEnded
    | SearchEnded
    | SizesTimed
    | TrainingStarted
    | StepEnded
    | EpochEnded
    | Evaluated
    | Resumed
    | Replayed
)
Observer = Callable[[Event], None]
