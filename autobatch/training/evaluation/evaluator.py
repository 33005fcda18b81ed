"""Loss and metrics over data that is not trained on, at the size that inference tolerates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from autobatch.data.micro_batches import cut_to, largest_piece
from autobatch.data.rebatch import logical_batches
from autobatch.data.sample import read_sample
from autobatch.data.source import Source
from autobatch.data.tree import BatchTree, size_of, take
from autobatch.devices.factory import in_widest
from autobatch.devices.oom import MEMORY_VERDICTS, verdict_of
from autobatch.errors import DoesNotFitError
from autobatch.results.plan import useful_sizes
from autobatch.results.training import Evaluation
from autobatch.state.rng import random_state
from autobatch.training.engine.grad_cache import joined
from autobatch.training.engine.gradient_pass import GradientPass
from autobatch.training.evaluation.inference import Inference
from autobatch.training.evaluation.metrics import Metric, _accuracy, _Number, _Totals, read_mean
from autobatch.training.losses.loss import Terms
from autobatch.training.losses.objective import (
    Encode,
    FullBatchLoss,
    MicroBatch,
    MicroBatchLoss,
    Objective,
    Passes,
)
from autobatch.training.model_state.evaluation_mode import undisturbed

Made = TypeVar("Made")


FindSize = Callable[["Inference", Sequence[int]], int]


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Evaluates after each epoch. Training goes on as if it had not.

    Attributes:
        gradient: What training computes gradients with: the same model and precision.
        objective: The loss that is evaluated.
        source: The data.
        desired: The most examples in one forward pass; where the loss needs the full batch, the
            examples in one batch.
        metrics: By name: ``(outputs, targets)`` to a mean over examples or ``(sum, terms)``. None
            is the accuracy, where outputs are scores of classes and targets their indices.
        find: Returns the largest of some sizes that ``Inference`` really ran at.
        limited: Returns the context in which memory may be used.
        size: The size that was found; None before the first evaluation.
    """

    gradient: GradientPass
    objective: Objective
    source: Source
    desired: int
    metrics: Mapping[str, Metric] | None
    find: FindSize
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
        with self._undisturbed():
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
            with self._undisturbed():
                sample = largest_piece(read_sample(self.source))
                self._add(take(sample, range(min(2, size_of(sample)))), _Totals())
        except DoesNotFitError:
            pass  # The search says it better.
        except Exception as error:
            error.add_note("seen in two examples of eval_data; nothing has been trained")
            raise

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode inside; modes, buffers, attributes and RNG as they were afterwards.

        Inside, nothing is made in ``inference_mode``: what a function keeps for later, positions
        say, would be fit for no backward pass in this process, and no gradient could be taken of.
        """
        put_random_back = random_state([self.source.owner])
        try:
            with undisturbed(self.gradient.model):
                yield
        finally:
            put_random_back()

    def _add(self, batch: BatchTree, totals: "_Totals") -> None:
        """Add one logical batch to the totals."""
        gradient = replace(self.gradient, objective=self.objective)
        gradient.prepare(batch, cut=True)
        passes = _EvaluationPasses(self, batch, totals)
        self.objective.run(passes, gradient.model, passes.record)

    def in_parts(self, batch: BatchTree, run: Callable[[BatchTree], Made]) -> Iterator[Made]:
        """Yield what ``run`` returns for each part of a logical batch, at the size that fits."""
        if self.size is None:
            sizes = useful_sizes(size_of(batch))
            self.size = self.find(Inference(run, largest_piece(batch)), sizes)
        for part in cut_to(batch, self.size)[0]:
            yield from self._fitting(part, run)

    def _fitting(self, part: BatchTree, run: Callable[[BatchTree], Made]) -> list[Made]:
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
        self.gradient.device.release_cached()
        half = size_of(part) // 2
        if self.size is not None and size_of(part) >= self.size:  # A short one says nothing.
            self.size = half
        halves = cut_to(part, half)[0]
        return [made for half in halves for made in self._fitting(half, run)]

    def measured(
        self, outputs: BatchTree, targets: BatchTree, examples: int
    ) -> "dict[str, _Number]":
        """Return sum and terms of each metric."""
        if self.metrics is None:
            return _accuracy(outputs, targets, self.objective.ignored_class)
        return {
            name: read_mean(metric(outputs, targets), examples, name)
            for name, metric in self.metrics.items()
        }


class _EvaluationPasses(Passes):
    """Runs one logical batch without gradients, and adds its loss and metrics to the totals.

    Args:
        evaluator: Knows the size that fits.
        batch: The logical batch, on the host.
        totals: Of the whole evaluation.
    """

    def __init__(self, evaluator: Evaluator, batch: BatchTree, totals: "_Totals") -> None:
        self._evaluator = evaluator
        self._batch = batch
        self._totals = totals
        self._pairs: list[tuple[BatchTree, BatchTree]] = []

    def record(self, outputs: BatchTree, targets: BatchTree) -> None:
        """Keep the outputs and targets of the part that runs."""
        self._pairs.append((outputs, targets))

    def one_by_one(self, loss: MicroBatchLoss) -> None:
        """Add what each part gives."""
        for numbers in self._evaluator.in_parts(
            self._batch, lambda part: self._numbers(part, loss)
        ):
            self._totals.add(*numbers)

    def outputs_first(self, encode: Encode, loss: FullBatchLoss) -> None:
        """Compute all outputs, and add the loss of all, weighted by the examples."""
        evaluator, examples = self._evaluator, size_of(self._batch)
        forward = evaluator.gradient.precision.forward

        def outputs_of(part: BatchTree) -> tuple[BatchTree, BatchTree]:
            with forward():
                return encode(self._on_device(part))

        pairs = list(evaluator.in_parts(self._batch, outputs_of))
        with evaluator.limited(), torch.no_grad():
            outputs, targets = joined(pairs)
            with forward():
                value = loss(outputs, targets)
            metrics = evaluator.measured(outputs, targets, examples)
            self._totals.add((in_widest(value) * examples, examples), metrics)

    def _numbers(
        self, part: BatchTree, loss: MicroBatchLoss
    ) -> "tuple[_Number, dict[str, _Number]]":
        evaluator = self._evaluator
        self._pairs.clear()
        with evaluator.gradient.precision.forward():
            loss_sum, terms = loss(self._on_device(part))
        metrics: dict[str, _Number] = {}
        for outputs, targets in self._pairs:
            metrics |= evaluator.measured(outputs, targets, size_of(part))
        self._pairs.clear()
        return (in_widest(loss_sum), self._terms(part, terms)), metrics

    def _terms(self, part: BatchTree, terms: Terms) -> float | None:
        """What the summed loss is divided by; None where nothing divides it."""
        objective = self._evaluator.objective
        if not objective.divides:
            return None
        return objective.denominator(part) if terms is None else float(terms)

    def _on_device(self, part: BatchTree) -> MicroBatch:
        return MicroBatch(self._evaluator.gradient.feed.move(part), part)
