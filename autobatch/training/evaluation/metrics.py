"""Metrics over an evaluation, each a sum and its terms."""

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

_Number = tuple[Tensor, float | None]  # A sum and its terms; None where nothing is divided.


@dataclass(slots=True)
class _Mean:
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
class _Totals:
    loss: _Mean = field(default_factory=_Mean)
    metrics: dict[str, _Mean] = field(default_factory=dict)

    def add(self, loss: _Number, metrics: Mapping[str, _Number]) -> None:
        self.loss.add(*loss)
        for name, number in metrics.items():
            self.metrics.setdefault(name, _Mean()).add(*number)


def _accuracy(outputs: BatchTree, targets: BatchTree, ignored: int) -> dict[str, _Number]:
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
    """Return sum and terms of a metric that gives a mean over examples, or ``(sum, terms)``.

    Raises:
        TypeError, ValueError: If it gives neither.
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
