"""The results of a training: of a step, of an evaluation, and of the whole training."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from autobatch.results.plan import BatchPlan
from autobatch.results.search import SearchResult
from autobatch.units import count

Number = TypeVar("Number", bound=float | None)


class _Deferred(Generic[Number]):
    """A number of a ``StepResult`` that is read from the device at the first access."""

    def __init__(self, *, required: bool) -> None:
        self._required = required

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, result: "StepResult | None", owner: type | None = None) -> Number:
        if result is None:  # Dataclass reads the default from the class.
            if self._required:
                raise AttributeError(self._name)
            return None  # type: ignore[return-value]  # Number includes None here.
        value = vars(result)[self._name]
        if callable(value):
            value = vars(result)[self._name] = value()
        return value  # type: ignore[no-any-return]  # Set as a Number.

    def __set__(self, result: "StepResult", value: Number | Callable[[], Number]) -> None:
        vars(result)[self._name] = value


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one optimizer step on one logical batch.

    Example::

        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = Accumulator(model, optimizer, nn.CrossEntropyLoss(), micro_batch=8)
        step = accumulator.step((torch.randn(32, 4), torch.randint(0, 2, (32,))))
        assert step.micro_batch_sizes == (8, 8, 8, 8)
        print(step.loss, step.skipped)

    Attributes:
        loss: The loss of the undivided logical batch; nan if it has no valid term. With
            ``nonfinite="ignore"`` the first access waits for the device.
        terms: The denominator of the loss, such as the number of examples or of valid tokens.
        examples: Examples in the logical batch.
        grad_norm: The 2-norm of the gradient before clipping; None if it was not computed.
        micro_batch_sizes: The sizes of the micro-batches in the run that succeeded.
        replays: How often the logical batch was run again because memory ran out.
        skipped: Whether the optimizer step was skipped.
        reason: Why the step was skipped: ``"no valid term"``, ``"not finite"``, or ``"overflow"``
            if the GradScaler lowers its scale; ``""`` if it was not skipped.
    """

    loss: _Deferred[float] = _Deferred(required=True)
    terms: float
    examples: int
    grad_norm: _Deferred[float | None] = _Deferred(required=False)
    micro_batch_sizes: tuple[int, ...]
    replays: int = 0
    skipped: bool = False
    reason: Literal["", "no valid term", "not finite", "overflow"] = ""

    def __getstate__(self) -> dict[str, object]:
        _ = self.loss, self.grad_norm  # Read the deferred numbers: they cannot be pickled.
        return vars(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Loss and metrics of the model on ``eval_data``, after one epoch.

    Example::

        data = (torch.randn(64, 4), torch.randint(0, 2, (64,)))
        result = find_and_train(nn.Linear(4, 2), data, desired=32, eval_data=data)
        evaluation = result.evaluations[-1]
        print(evaluation.epoch, evaluation.loss, evaluation.metrics)

    Attributes:
        epoch: The epoch that ended before the evaluation, counted from 1.
        loss: The loss over all examples of the data, divided once by their number of terms.
        metrics: The value of each metric over all examples, by its name.
        examples: The number of examples.
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
    """The result of a training.

    Example::

        data = (torch.randn(64, 4), torch.randint(0, 2, (64,)))
        result = find_and_train(nn.Linear(4, 2), data, desired=32, epochs=2)
        assert result.steps == len(result.losses) == 4
        print(result)

    Attributes:
        plan: How logical batches were cut at the end. Micro-batches become smaller during a
            training if memory runs out.
        search: How the tolerable batch was found.
        losses: The loss of the undivided logical batch, one per optimizer step.
        epochs: The number of epochs that were started.
        examples: The number of examples in all optimizer steps.
        seconds: The duration of the training, without the search.
        loading_seconds: The part of ``seconds`` in which steps waited for data.
        replays: How often a logical batch was run again because memory ran out.
        evaluations: One evaluation per epoch; empty without ``eval_data``.
        notes: Remarks on what was not exact or differs from the arguments, and why.
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
        """The number of optimizer steps."""
        return len(self.losses)

    @property
    def examples_per_second(self) -> float:
        """The training throughput, with data loading and optimizer steps."""
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
