"""The means of an evaluation: the loss and the metrics, each a sum over a number of terms."""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from autobatch.data.tree import BatchTree
from autobatch.devices.factory import in_widest
from autobatch.training.losses.callable import read_pair, require_scalar

Metric = Callable[..., object]

ACCURACY: Final = "accuracy"

SumAndTerms = tuple[Tensor, float | None]  # The terms are None for a sum that is not divided.


@dataclass(slots=True)
class _Mean:
    """A sum that is divided by its number of terms at the end; a sum alone if terms are None."""

    total: Tensor | None = None
    terms: float | None = 0.0

    def add(self, total: Tensor, terms: float | None) -> None:
        self.total = total if self.total is None else self.total + total
        self.terms = None if terms is None or self.terms is None else self.terms + terms

    @property
    def value(self) -> float:
        if self.total is None:
            return math.nan
        if self.terms is None:
            return float(self.total)
        return float(self.total) / self.terms if self.terms else math.nan


@dataclass(slots=True)
class Totals:
    """The loss and the metrics of all batches so far.

    Attributes:
        loss: The summed loss and its terms.
        metrics: The sum and the terms of each metric, by name.
    """

    loss: _Mean = field(default_factory=_Mean)
    metrics: dict[str, _Mean] = field(default_factory=dict)

    def add(self, loss: SumAndTerms, metrics: Mapping[str, SumAndTerms]) -> None:
        """Add the numbers of one batch."""
        self.loss.add(*loss)
        for name, number in metrics.items():
            self.metrics.setdefault(name, _Mean()).add(*number)


def accuracy(outputs: BatchTree, targets: BatchTree, ignored: int) -> dict[str, SumAndTerms]:
    """Return the accuracy by its name; nothing if outputs are not scores of classes.

    Args:
        outputs: Scores of shape ``(example, class, ...)``.
        targets: Class indices of shape ``(example, ...)``.
        ignored: The class index that is not counted.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return {}
    if targets.is_floating_point() or not outputs.is_floating_point() or outputs.ndim < 2:
        return {}
    if targets.shape != (outputs.shape[0], *outputs.shape[2:]) or outputs.shape[1] < 2:
        return {}
    counts = targets != ignored
    right = (outputs.argmax(1) == targets) & counts
    return {ACCURACY: (in_widest(right.sum()), float(counts.sum()))}


def read_mean(value: object, examples: int, name: str) -> tuple[Tensor, float]:
    """Return the sum and the number of terms of a metric's value.

    Args:
        value: A mean over examples, or ``(sum, terms)``.
        examples: The number of examples that the value is about.
        name: The name of the metric, for an error.

    Raises:
        TypeError, ValueError: The value is neither; the message shows the value.
    """
    if isinstance(value, tuple):
        total, terms = value if len(value) == 2 else (None, None)
        if isinstance(total, numbers.Real):
            total = torch.tensor(float(total), dtype=torch.float64)
        summed, count = read_pair((total, terms), f"the metric {name!r}")
        return in_widest(summed), float(count)
    mean = (
        torch.tensor(float(value), dtype=torch.float64)
        if isinstance(value, numbers.Real)
        else value
    )
    return in_widest(require_scalar(f"the metric {name!r}", mean)) * examples, float(examples)
