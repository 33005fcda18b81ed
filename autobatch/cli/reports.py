"""Reports of the commands: text for people, and fields for JSON."""

import math
from dataclasses import asdict, dataclass, field
from typing import Protocol

from autobatch.errors import DoesNotFitError
from autobatch.events import EpochEnded, Event, StepEnded, TrainingStarted, TrialEnded
from autobatch.results.memory import Breakdown
from autobatch.results.plan import BatchPlan
from autobatch.results.search import SearchResult, Trial
from autobatch.results.training import TrainingResult
from autobatch.units import count

Fields = dict[str, object]


class ProgressLog(Protocol):
    """Receives the events and log lines of a running command."""

    def __call__(self, event: Event) -> None:
        """Receive an event."""

    def log(self, text: str) -> None:
        """Receive a line of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of a command.

    Attributes:
        text: The outcome as text for people.
        fields: The outcome in full, as values for JSON.
    """

    text: str
    fields: Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport(Report):
    """The outcome of a training.

    Attributes:
        result: What ``find_and_train`` returned.
        before: The accuracy on the test data before training; None without test data.
        after: The accuracy after training.
    """

    result: TrainingResult
    before: float | None
    after: float | None


@dataclass(slots=True)
class Journal:
    """An observer that records the progress of a command, for a command that does not finish."""

    trials: list[Trial] = field(default_factory=list)
    training: TrainingStarted | None = None
    steps: int = 0
    examples: int = 0
    epoch: int = 1
    last_loss: float | None = None

    def __call__(self, event: Event) -> None:
        """Record ``event``."""
        match event:
            case TrialEnded():
                self.trials.append(event.trial)
            case TrainingStarted():
                self.training = event
            case StepEnded():
                self._add(event)
            case EpochEnded():
                self.epoch = event.epoch + 1

    def _add(self, event: StepEnded) -> None:
        self.epoch = event.epoch
        if not event.step.skipped:
            self.steps += 1
            self.examples += event.step.examples
            self.last_loss = event.step.loss

    def __str__(self) -> str:
        if self.training is not None:
            return self._training_so_far(self.training)
        if not self.trials:
            return "before the first trial"
        fitting = max((trial.size for trial in self.trials if trial.fits), default=None)
        largest = "none ran" if fitting is None else f"the largest size that ran is {fitting}"
        return f"in the search, after {count(len(self.trials), 'trial')}: {largest}"

    def _training_so_far(self, training: TrainingStarted) -> str:
        place = f"in epoch {min(self.epoch, training.epochs)} of {training.epochs}"
        if self.last_loss is None:
            return f"{place}, before the first optimizer step"
        steps = count(self.steps, "optimizer step")
        if training.steps is not None:
            steps = f"{self.steps} of {count(training.steps, 'optimizer step')}"
        return f"{place}, after {steps} ({self.examples} examples): last loss {self.last_loss:.4f}"

    @property
    def fields(self) -> Fields:
        """The progress, as values for JSON."""
        return {
            "trials": [trial_fields(trial) for trial in self.trials],
            "steps": self.steps,
            "examples": self.examples,
            "last_loss": _number(self.last_loss),
        }


def plan_fields(plan: BatchPlan) -> Fields:
    """Return the plan as values for JSON."""
    return {
        "desired": plan.desired,
        "tolerable": plan.tolerable,
        "accumulation_steps": plan.accumulation_steps,
        "micro_batch_sizes": list(plan.micro_batch_sizes),
    }


def trial_fields(trial: Trial) -> Fields:
    """Return the trial as values for JSON."""
    return {
        "size": trial.size,
        "fits": trial.fits,
        "failure": None if trial.failure is None else trial.failure.name.lower(),
        "peak_bytes": trial.peak_bytes,
        "reserved_bytes": trial.reserved_bytes,
        "seconds": trial.seconds,
        "message": trial.message,
        "repeated": trial.repeated,
    }


def search_fields(search: SearchResult) -> Fields:
    """Return the search as values for JSON."""
    return {
        "size": search.size,
        "ceiling": search.ceiling,
        "limit_bytes": search.limit_bytes,
        "limited_by": search.limited_by,
        "peak_bytes": search.peak_bytes,
        "upper": {
            "reason": search.upper.reason,
            "size": search.upper.size,
            "bytes": search.upper.bytes,
        },
        "worst_case": search.worst_case,
        "breakdown": None if search.breakdown is None else breakdown_fields(search.breakdown),
        "trials": [trial_fields(trial) for trial in search.trials],
        "speeds": [asdict(speed) for speed in search.speeds],
        "others": [{"pid": other.pid, "used_bytes": other.used_bytes} for other in search.others],
        "notes": list(search.notes),
    }


def failure_fields(error: BaseException) -> Fields:
    """Return the attributes of an error, as values for JSON."""
    if not isinstance(error, DoesNotFitError) or error.breakdown is None:
        return {}
    return {
        "limit_bytes": error.limit_bytes,
        "breakdown": breakdown_fields(error.breakdown),
        "remedies": [asdict(remedy) for remedy in error.remedies],
    }


def breakdown_fields(breakdown: Breakdown) -> Fields:
    """Return the breakdown as values for JSON."""
    return asdict(breakdown) | {"total_bytes": breakdown.total_bytes}


def training_fields(result: TrainingResult) -> Fields:
    """Return the training as values for JSON; a loss that is not finite becomes null."""
    return {
        "plan": plan_fields(result.plan),
        "search": search_fields(result.search),
        "losses": [_number(loss) for loss in result.losses],
        "steps": result.steps,
        "epochs": result.epochs,
        "examples": result.examples,
        "seconds": result.seconds,
        "loading_seconds": result.loading_seconds,
        "examples_per_second": result.examples_per_second,
        "replays": result.replays,
        "notes": list(result.notes),
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
