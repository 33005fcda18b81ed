"""Loss and metrics over data that is not trained on, at the size that inference tolerates."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from autobatch.batches.nest import Nest, size_of, take
from autobatch.batches.pieces import cut_to, largest_piece
from autobatch.batches.regroup import Source, logical_batches
from autobatch.batches.sample import read_sample, repeated
from autobatch.devices.oom import MEMORY_VERDICTS, verdict_of
from autobatch.errors import DoesNotFitError
from autobatch.plan import useful_sizes
from autobatch.randomness import random_state
from autobatch.results import Evaluation
from autobatch.training.forward import outputs_of
from autobatch.training.inferred import compared_by
from autobatch.training.losses import read_mean
from autobatch.training.objective import Objective
from autobatch.training.undisturbed import undisturbed
from autobatch.training.whole_batch import Whole, joined
from autobatch.training.wide import in_widest
from autobatch.training.window import Recipe

Metric = Callable[..., object]
Made = TypeVar("Made")

ACCURACY: Final = "accuracy"


class Inference:
    """What an evaluation runs, ready to be tried at any size.

    Args:
        run: Runs on a batch.
        sample: Real examples; they are repeated to any size.
    """

    def __init__(self, run: Callable[[Nest], object], sample: Nest) -> None:
        self._run = run
        self._sample = sample

    def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002  # It is one phase.
        """Return one pass over the largest of ``sizes`` examples, not yet run."""
        batch = repeated(self._sample, max(sizes))

        def run() -> None:
            with torch.no_grad():
                self._run(batch)

        return run

    def verify(self, size: int, peak_bytes: int) -> str:  # noqa: ARG002  # The protocol's.
        """Return ``""``: what an evaluation makes is not checked."""
        return ""

    def clear(self) -> None:
        """Do nothing: no gradient is left."""


def inference(
    recipe: Recipe, forward: Callable[[nn.Module, Nest], object] | None, sample: Nest
) -> Inference:
    """Return the forward pass alone, in the mode that the model is in then.

    Args:
        recipe: What a training step would be made of.
        forward: The user's; None is the standard one.
        sample: Real examples, with or without targets.
    """
    call = outputs_of if forward is None else forward

    def run(batch: Nest) -> None:
        with recipe.precision.forward():
            call(recipe.model, recipe.feed.move(batch))

    return Inference(run, sample)


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Evaluates after each epoch. Training goes on as if it had not.

    Attributes:
        recipe: What a training step is made of: the same model, loss and precision.
        source: The data.
        desired: The most examples in one forward pass; where the loss is that of a whole batch,
            the examples in one.
        metrics: By name: ``(outputs, targets)`` to a mean over examples or ``(sum, terms)``. None
            is the accuracy, where outputs are scores of classes and targets their indices.
        find: Returns the largest of some sizes that ``Inference`` really ran at.
        limited: Returns the context in which memory may be used.
        size: That was found; None before the first evaluation.
    """

    recipe: Recipe
    source: Source
    desired: int
    metrics: Mapping[str, Metric] | None
    find: Callable[[Inference, Sequence[int]], int] = lambda _, sizes: sizes[-1]
    limited: Callable[[], AbstractContextManager[None]] = nullcontext
    size: int | None = field(default=None, init=False)

    def __call__(self, epoch: int) -> Evaluation:
        """Return loss and metrics over all of the data.

        Raises:
            ValueError: If the data holds no example.
            DoesNotFitError: If not even one example fits.
        """
        totals = _Totals()
        examples = 0
        with self._aside():
            for batch in logical_batches(self.source.epoch(), self.desired):
                examples += size_of(batch)
                self._add(batch, totals)
        if not examples:
            raise ValueError("eval_data: data is empty: it holds no example")
        return Evaluation(
            epoch=epoch,
            loss=totals.loss.value,
            metrics={name: total.value for name, total in totals.metrics.items()},
            examples=examples,
        )

    def try_out(self) -> None:
        """Evaluate two examples, so that what is wrong is said before anything is trained.

        Errors of the loss and of the metrics pass through.

        Raises:
            ValueError: If the data holds no example.
        """
        try:
            with self._aside():
                sample = largest_piece(read_sample(self.source))
                self._add(take(sample, range(min(2, size_of(sample)))), _Totals())
        except DoesNotFitError:
            pass  # The search says it better.
        except Exception as error:
            error.add_note("seen in two examples of eval_data; nothing has been trained")
            raise
        finally:
            self.size = None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Evaluation mode inside; modes, buffers, attributes and RNG as they were afterwards.

        Inside, nothing is made in ``inference_mode``: what a function keeps for later, positions
        say, would be fit for no backward pass in this process, and no gradient could be taken of.
        """
        put_random_back = random_state([self.source.owner])
        try:
            with undisturbed(self.recipe.model):
                yield
        finally:
            put_random_back()

    def _add(self, batch: Nest, totals: "_Totals") -> None:
        """Add one logical batch to the totals."""
        objective = self.recipe.objective
        self.recipe.prepared(batch, cut=True)
        if not isinstance(objective, Whole):
            for numbers in self._in_parts(batch, self._numbers):
                totals.add(*numbers)
            return
        pairs = list(self._in_parts(batch, functools.partial(_encoded, self.recipe, objective)))
        with self.limited(), torch.no_grad():
            totals.add(*self._numbers_of_whole(objective, pairs, size_of(batch)))

    def _in_parts(self, batch: Nest, run: Callable[[Nest], Made]) -> Iterator[Made]:
        """What ``run`` makes of each part of a logical batch, at the size that is tolerable."""
        if self.size is None:
            sizes = useful_sizes(size_of(batch))
            self.size = self.find(Inference(run, largest_piece(batch)), sizes)
        for part in cut_to(batch, self.size)[0]:
            yield from self._fitting(part, run)

    def _fitting(self, part: Nest, run: Callable[[Nest], Made]) -> list[Made]:
        """What ``run`` makes of a part, or of its halves if memory runs out."""
        try:
            with self.limited(), torch.no_grad():
                return [run(part)]
        except Exception as error:
            if verdict_of(error) not in MEMORY_VERDICTS:
                raise
            message = str(error)
        # Only here has the error let go of what was made.
        if size_of(part) == 1:
            raise DoesNotFitError(1, None, message=message)
        self.recipe.device.release_cached()
        half = size_of(part) // 2
        if self.size is not None and size_of(part) >= self.size:  # A short one says nothing.
            self.size = half
        halves = cut_to(part, half)[0]
        return [made for half in halves for made in self._fitting(half, run)]

    def _numbers(self, part: Nest) -> "tuple[_Number, dict[str, _Number]]":
        loss_sum, terms, pairs = _shown(self.recipe, part)
        metrics: dict[str, _Number] = {}
        for outputs, targets in pairs:
            metrics |= self._measured(outputs, targets, size_of(part))
        return (in_widest(loss_sum), terms), metrics

    def _numbers_of_whole(
        self, objective: Whole, pairs: Sequence[tuple[Nest, Nest]], examples: int
    ) -> "tuple[_Number, dict[str, _Number]]":
        """The loss of a whole logical batch, weighted by its examples."""
        outputs, targets = joined(pairs)
        with self.recipe.precision.forward():
            loss = objective.loss(outputs, targets)
        return (in_widest(loss) * examples, examples), self._measured(outputs, targets, examples)

    def _measured(self, outputs: Nest, targets: Nest, examples: int) -> "dict[str, _Number]":
        if self.metrics is None:
            return _accuracy(outputs, targets, _ignored(self.recipe.objective))
        return {
            name: read_mean(metric(outputs, targets), examples, name)
            for name, metric in self.metrics.items()
        }


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


def _shown(recipe: Recipe, part: Nest) -> tuple[Tensor, float | None, list[tuple[Nest, Nest]]]:
    """The summed loss of one part, its terms, and outputs and targets where they are known."""
    pairs: list[tuple[Nest, Nest]] = []
    objective = recipe.objective
    with recipe.precision.forward():
        loss_sum, terms = objective.share(
            recipe.model,
            recipe.feed.move(part),
            host=part,
            borrowed=0,
            witness=lambda outputs, targets: pairs.append((outputs, targets)),
        )
    compared = compared_by(objective)
    if compared is not None and not compared.loss.divides:
        return loss_sum, None, pairs
    return loss_sum, objective.denominator(part) if terms is None else float(terms), pairs


def _encoded(recipe: Recipe, objective: Whole, part: Nest) -> tuple[Nest, Nest]:
    with recipe.precision.forward():
        return objective.encode(recipe.model, recipe.feed.move(part), 0)


def _ignored(objective: Objective) -> int:
    """The class that counts for nothing."""
    compared = compared_by(objective)
    settings: Callable[[], Mapping[str, object]] = getattr(
        compared and compared.loss, "settings", dict
    )
    ignored = settings().get("ignore_index", -100)
    return ignored if isinstance(ignored, int) else -100


def _accuracy(outputs: Nest, targets: Nest, ignored: int) -> dict[str, _Number]:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return {}
    if targets.is_floating_point() or not outputs.is_floating_point() or outputs.ndim < 2:
        return {}
    if targets.shape != (outputs.shape[0], *outputs.shape[2:]) or outputs.shape[1] < 2:
        return {}
    counts = targets != ignored
    right = (outputs.argmax(1) == targets) & counts
    return {ACCURACY: (in_widest(right.sum()), float(counts.sum()))}
