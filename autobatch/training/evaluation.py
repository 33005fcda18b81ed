"""Loss and metrics over data that is not trained on, at the size that inference tolerates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from autobatch.batches.nest import Nest, size_of
from autobatch.batches.pieces import cut_to, largest_piece, pieces_of
from autobatch.batches.regroup import Source, logical_batches
from autobatch.batches.sample import repeated
from autobatch.devices.failures import verdict_of
from autobatch.plan import useful_sizes
from autobatch.randomness import random_state
from autobatch.results import Evaluation, Verdict
from autobatch.training.losses import read_mean
from autobatch.training.window import Recipe

Metric = Callable[[Nest, Nest], object]
Seen = list[tuple[Nest, Nest]]

ACCURACY: Final = "accuracy"


class Inference:
    """Forward passes and losses without gradient, ready to be tried at any size.

    Args:
        recipe: What a training step is made of.
        sample: Real examples; they are repeated to any size.
    """

    def __init__(self, recipe: Recipe, sample: Nest) -> None:
        self._recipe = recipe
        self._sample = sample

    def prepare(self, sizes: Sequence[int]) -> Callable[[], None]:
        """Return one forward pass over the largest of ``sizes`` examples, not yet run."""
        batch = repeated(self._sample, max(sizes))

        def run() -> None:
            with _inference(self._recipe.model):
                _shown(self._recipe, batch)

        return run

    def clear(self) -> None:
        """Do nothing: no gradient is left."""


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Evaluates after each epoch. Training goes on as if it had not.

    Attributes:
        recipe: What a training step is made of: the same model, loss and precision.
        source: The data.
        desired: The most examples in one forward pass.
        metrics: By name: ``(outputs, targets)`` to a mean over examples or ``(sum, terms)``. None
            is the accuracy, where outputs are scores of classes and targets their indices.
        find: Returns the largest of some sizes that ``Inference`` really ran at.
        ignored: The class that counts for nothing.
        size: That was found; None before the first evaluation.
    """

    recipe: Recipe
    source: Source
    desired: int
    metrics: Mapping[str, Metric] | None
    find: Callable[[Inference, Sequence[int]], int]
    ignored: int = -100
    size: int | None = field(default=None)

    def __call__(self, epoch: int) -> Evaluation:
        """Return loss and metrics over all of the data.

        Raises:
            ValueError: If the data holds no example.
            DoesNotFitError: If not even one example fits.
        """
        put_random_back = random_state([self.source.owner])
        totals: dict[str, _Mean] = {}
        examples = 0
        try:
            for batch in logical_batches(self.source.epoch(), self.desired):
                examples += size_of(batch)
                self._add(batch, totals)
        finally:
            put_random_back()
        if not examples:
            raise ValueError("eval_data is empty: it holds no example")
        loss = totals.pop("", _Mean())
        return Evaluation(
            epoch=epoch,
            loss=loss.value,
            metrics={name: total.value for name, total in totals.items()},
            examples=examples,
        )

    def _add(self, batch: Nest, totals: "dict[str, _Mean]") -> None:
        """Add one logical batch to the means, in smaller parts if memory runs out."""
        if self.size is None:
            sizes = useful_sizes(size_of(batch))
            self.size = self.find(Inference(self.recipe, largest_piece(batch)), sizes)
        for piece in pieces_of(batch):
            for part in cut_to(piece, self.size)[0]:
                for name, total in self._measured(part):
                    totals.setdefault(name, _Mean()).add(*total)

    def _measured(self, part: Nest) -> "list[tuple[str, tuple[Tensor, float]]]":
        ran_out = False
        try:
            with _inference(self.recipe.model):
                return self._numbers(part)
        except Exception as error:
            if verdict_of(error) is not Verdict.OUT_OF_MEMORY or size_of(part) == 1:
                raise
            ran_out = True
        assert ran_out
        self.recipe.device.release_cached()
        self.size = max(1, size_of(part) // 2)
        smaller = cut_to(part, self.size)[0]
        return [number for half in smaller for number in self._measured(half)]

    def _numbers(self, part: Nest) -> "list[tuple[str, tuple[Tensor, float]]]":
        loss_sum, terms, seen = _shown(self.recipe, part)
        numbers = [("", (loss_sum.double(), terms))] if terms else []
        for outputs, targets in seen:
            examples = size_of(part)
            if self.metrics is None:
                numbers += _accuracy(outputs, targets, self.ignored)
                continue
            for name, metric in self.metrics.items():
                numbers.append((name, read_mean(metric(outputs, targets), examples)))
        return numbers


@dataclass(slots=True)
class _Mean:
    total: Tensor | None = None
    terms: float = 0.0

    def add(self, total: Tensor, terms: float) -> None:
        self.total = total if self.total is None else self.total + total
        self.terms += terms

    @property
    def value(self) -> float:
        return float(self.total) / self.terms if self.total is not None else float("nan")


def _shown(recipe: Recipe, part: Nest) -> tuple[Tensor, float, Seen]:
    """The summed loss of one part, its terms, and outputs and targets where they are known."""
    seen: Seen = []
    with recipe.precision.forward():
        loss_sum, terms = recipe.objective.share(
            recipe.model,
            recipe.feed.move(part),
            host=part,
            borrowed=0,
            witness=lambda outputs, targets: seen.append((outputs, targets)),
        )
    return loss_sum, recipe.objective.denominator(part) if terms is None else float(terms), seen


def _accuracy(outputs: Nest, targets: Nest, ignored: int) -> list[tuple[str, tuple[Tensor, float]]]:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return []
    if targets.is_floating_point() or not outputs.is_floating_point() or outputs.ndim < 2:
        return []
    if targets.shape != (outputs.shape[0], *outputs.shape[2:]):
        return []
    counts = targets != ignored
    right = (outputs.argmax(1) == targets) & counts
    return [(ACCURACY, (right.sum().double(), float(counts.sum())))]


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no autograd inside; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
