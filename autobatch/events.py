"""The events that an observer receives during a search and a training.

An observer is a function of one event, passed as ``progress=``::

    from autobatch.events import StepEnded

    def observer(event):
        if isinstance(event, StepEnded):
            print(event.epoch, event.step.loss)

    find_and_train(model, data, progress=observer)
"""

from collections.abc import Callable
from dataclasses import dataclass

from autobatch.results.plan import BatchPlan
from autobatch.results.search import OtherProcess, SearchResult, Trial
from autobatch.results.training import Evaluation, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStarted:
    """A search begins.

    Attributes:
        device: The name of the device.
        limit_bytes: The bytes that a step may allocate.
        ceiling: The largest size of interest, in examples.
        others: Other processes on the device, as far as the driver reports them.
    """

    device: str
    limit_bytes: int
    ceiling: int
    others: tuple[OtherProcess, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted:
    """A trial begins.

    Attributes:
        size: The batch size of the trial, in examples.
    """

    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnded:
    """A trial has ended.

    Attributes:
        trial: The result of the trial.
    """

    trial: Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchEnded:
    """A search has found the tolerable batch.

    Attributes:
        search: The result of the search.
    """

    search: SearchResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SizesTimed:
    """The training speed at the tolerable batch and at a few smaller sizes was measured.

    Attributes:
        search: The result of the search, with its ``speeds`` in examples a second.
    """

    search: SearchResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStarted:
    """A training is about to take its first step.

    Attributes:
        plan: How each logical batch is cut into micro-batches.
        steps: The optimizer steps that are left; None if the data has no length.
        epochs: The number of epochs, with those before a checkpoint.
    """

    plan: BatchPlan
    steps: int | None
    epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnded:
    """An optimizer step was taken, or skipped.

    Attributes:
        step: The result of the step.
        epoch: The epoch of the step, counted from 1.
        plan: How the next logical batch will be cut into micro-batches.
    """

    step: StepResult
    epoch: int
    plan: BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochEnded:
    """An epoch has ended.

    Attributes:
        epoch: The epoch, counted from 1.
        loss: The mean of the epoch's losses, weighted by examples; nan for an epoch without steps.
        examples_per_second: The training speed over the whole epoch, with the loading of data.
    """

    epoch: int
    loss: float
    examples_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """An evaluation has ended.

    Attributes:
        evaluation: The loss and the metrics over ``eval_data``.
    """

    evaluation: Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """A training continues from a checkpoint.

    Attributes:
        checkpoint: The path of the checkpoint.
        steps: The optimizer steps that were taken before the checkpoint.
        epoch: The epoch that continues, counted from 1; the last epoch if nothing is left to do.
        differences: One sentence for each setting in which the checkpoint differs from this call.
    """

    checkpoint: str
    steps: int
    epoch: int
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Memory ran out in a logical batch, which runs again in smaller micro-batches.

    Attributes:
        failed: The micro-batch size that did not fit, in examples.
        micro_batch: The micro-batch size that is tried next, in examples.
    """

    failed: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorForgotten:
    """The last error, which a notebook or a prompt keeps, was deleted with its tensors."""


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
