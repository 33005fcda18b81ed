"""The data and the metrics of an evaluation, checked before anything is trained."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from autobatch.data.source import Data, Source, open_source
from autobatch.training.engine.train_step import TrainStep
from autobatch.training.evaluation.evaluator import Evaluator, FindSize
from autobatch.training.evaluation.metrics import Metric
from autobatch.training.losses.objective import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationData:
    """The data and the metrics of an evaluation.

    Attributes:
        source: The data. It can be read again after each epoch.
        desired: The most examples in one forward pass.
        metrics: Metric functions by name; None measures the accuracy of class scores.
    """

    source: Source
    desired: int
    metrics: Mapping[str, Metric] | None

    @classmethod
    def resolve(
        cls,
        data: Data | None,
        metrics: Mapping[str, Metric] | None,
        *,
        desired: int,
        objective: Objective,
    ) -> "EvaluationData | None":
        """Check ``eval_data`` and ``metrics``; return None if there is no evaluation.

        Raises:
            TypeError, ValueError: An argument is wrong; the message shows its value and the way
                out.
        """
        if metrics is not None:
            _check_metrics(metrics, objective)
        if data is not None:
            return cls(source=_open(data, desired), desired=desired, metrics=metrics)
        if metrics is not None:
            raise ValueError("metrics are measured on eval_data, got none: pass eval_data as well")
        return None

    def evaluator(
        self,
        step: TrainStep,
        find: FindSize = lambda _, sizes: sizes[-1],
        limited: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Evaluator:
        """Return the evaluator of this data.

        The evaluator has an objective of its own, so that training is the same with and without
        evaluation.

        Args:
            step: The training step, of which the model, the precision and the loss are evaluated.
            find: Returns the largest size that inference ran at.
            limited: Returns the context in which memory may be used.
        """
        return Evaluator(
            gradient=step.gradient_pass,
            objective=step.objective.for_evaluation(),
            source=self.source,
            desired=self.desired,
            metrics=self.metrics,
            find=find,
            limited=limited,
        )


def _open(data: Data, desired: int) -> Source:
    try:
        source = open_source(data, batch_size=desired)
    except (TypeError, ValueError) as error:
        raise type(error)(f"eval_data: {error}") from None
    if source.one_pass:
        raise TypeError(
            "eval_data is read after every epoch, got a one-pass iterable; pass a DataLoader, a "
            "Dataset, tensors or a list of batches"
        )
    return source


def _check_metrics(metrics: object, objective: Objective) -> None:
    if not objective.shows_outputs:
        raise ValueError(
            "metrics take outputs and targets, and batch_loss returns neither; pass loss and "
            "forward instead"
        )
    if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
        raise TypeError(
            f"metrics must be a mapping from names to callables (outputs, targets), got {metrics!r}"
        )
