"""What a training returns: steps, evaluations and the result."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from autobatch.results.plan import BatchPlan
from autobatch.results.search import SearchResult
from autobatch.units import count

Number = TypeVar("Number", bound=float | None)


class _Late(Generic[Number]):
    """A number of a ``StepResult`` that may still be on its way from the device."""

    def __init__(self, *, required: bool) -> None:
        self._required = required

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, result: "StepResult | None", owner: type | None = None) -> Number:
        if result is None:  # The class is asked for a default.
            if self._required:
                raise AttributeError(self._name)
            return None  # type: ignore[return-value]  # Then None is among its numbers.
        value = vars(result)[self._name]
        if callable(value):
            value = vars(result)[self._name] = value()
        return value  # type: ignore[no-any-return]  # As it was set.

    def __set__(self, result: "StepResult", value: Number | Callable[[], Number]) -> None:
        vars(result)[self._name] = value


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step on one logical batch.

    Attributes:
        loss: What the undivided batch's loss would have been; nan when it had no valid term. With
            ``nonfinite="ignore"`` reading it is what waits for the device.
        terms: The denominator of that loss.
        examples: Examples in the logical batch.
        grad_norm: The gradient's 2-norm before clipping; None where nothing needed it.
        micro_batch_sizes: How it was cut in the run that succeeded.
        replays: How often memory ran out and the window was run again.
        skipped: True if no step was taken.
        reason: Why not: ``"no valid term"``, ``"not finite"``, or ``"overflow"`` where a
            GradScaler asks for another scale; ``""`` otherwise.
    """

    loss: _Late[float] = _Late(required=True)
    terms: float
    examples: int
    grad_norm: _Late[float | None] = _Late(required=False)
    micro_batch_sizes: tuple[int, ...]
    replays: int = 0
    skipped: bool = False
    reason: Literal["", "no valid term", "not finite", "overflow"] = ""

    def __getstate__(self) -> dict[str, object]:
        _ = self.loss, self.grad_norm  # What is still on its way cannot be sent elsewhere.
        return vars(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Loss and metrics over data that is not trained on.

    Attributes:
        epoch: After which it was made, counted from 1.
        loss: Over all of the data, with its own terms.
        metrics: Means over examples, or over the terms that a metric counts.
        examples: How many were seen.
    """

    epoch: int
    loss: float
    metrics: Mapping[str, float] = field(hash=False)
    examples: int

    def __str__(self) -> str:
        metrics = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        return f"evaluation after epoch {self.epoch}: loss {self.loss:.4f}{metrics}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """A finished training.

    Attributes:
        plan: How the desired batch was cut at the end: a replay may have made it finer.
        search: How the tolerable batch was found.
        losses: One per optimizer step: the value that the undivided batch's loss has.
        epochs: Epochs that were begun.
        examples: Examples that entered a step.
        seconds: Time spent in training, without the search.
        loading_seconds: Of it, how long steps waited for their data.
        replays: How often memory ran out and a window was run again.
        evaluations: One per epoch, where there was ``eval_data``.
        notes: What was not exact, or not as asked, and why.
    """

    plan: BatchPlan
    search: SearchResult
    losses: tuple[float, ...]
    epochs: int
    examples: int
    seconds: float
    loading_seconds: float = 0.0
    replays: int = 0
    evaluations: tuple[Evaluation, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses)

    @property
    def examples_per_second(self) -> float:
        """Training speed, loading and the optimizer's steps included."""
        return self.examples / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        losses = f"loss {self.losses[0]:.4f} to {statistics.fmean(tail):.4f}" if tail else "no loss"
        lines = (
            str(self.plan),
            f"{count(self.steps, 'step')} in {count(self.epochs, 'epoch')}, {losses}",
            f"{self.examples} examples in {self.seconds:.1f} s "
            f"({self.examples_per_second:.0f} per second), {self.replays} replays",
            *map(str, self.evaluations[-1:]),
            *(f"note: {note}" for note in self.notes),
        )
        return "\n".join(lines)
