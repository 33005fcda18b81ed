"""The evaluation after an epoch, at the batch size that fits without gradients."""

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
from autobatch.training.evaluation.metrics import Metric, SumAndTerms, Totals, accuracy, read_mean
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

FindSize = Callable[[Inference, Sequence[int]], int]


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Evaluates after each epoch, and leaves the training as it was.

    Attributes:
        gradient: Holds the model, the device and the precision of the training.
        objective: The loss that is evaluated.
        source: The data.
        desired: The most examples in one forward pass. If the loss needs the full batch, the
            examples in one batch.
        metrics: Functions by name: ``(outputs, targets)`` to a mean over examples or ``(sum,
            terms)``. None measures the accuracy if outputs are scores of classes.
        find: Returns the largest of several sizes that an ``Inference`` ran at.
        limited: Returns the context in which memory may be used.
        size: The batch size that was found, in examples; None before the first evaluation.
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
        """Return the loss and the metrics over all of the data.

        Args:
            epoch: The number of the epoch that has ended, counted from 1.

        Raises:
            ValueError: The data holds no example.
            DoesNotFitError: Not even one example fits.
        """
        totals = Totals()
        examples = 0
        with self._undisturbed():
            for batch in logical_batches(self.source.epoch(), self.desired):
                examples += size_of(batch)
                self._add(batch, totals)
        if not examples:
            raise ValueError("eval_data is empty: it holds no example")
        return Evaluation(
            epoch=epoch,
            loss=totals.loss.value,
            metrics={name: total.value for name, total in totals.metrics.items()},
            examples=examples,
        )

    def try_out(self) -> None:
        """Evaluate two examples, so that an error shows before anything is trained.

        An error of the loss or of a metric is raised as it is, with a note.

        Raises:
            ValueError: The data holds no example.
        """
        try:
            with self._undisturbed():
                sample = largest_piece(read_sample(self.source))
                self._add(take(sample, range(min(2, size_of(sample)))), Totals())
        except DoesNotFitError:
            pass  # The search raises this with a breakdown of the memory.
        except Exception as error:
            error.add_note(
                "raised by the first two examples of eval_data; nothing has been trained"
            )
            raise

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Set evaluation mode inside the block; restore model and random generators after it.

        The block does not use ``inference_mode``: a tensor that a model caches there, for example
        positions, could not be used in a later backward pass.
        """
        restore_random = random_state([self.source.owner])
        try:
            with undisturbed(self.gradient.model):
                yield
        finally:
            restore_random()

    def _add(self, batch: BatchTree, totals: Totals) -> None:
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
        """Return what ``run`` returns for a part, or for its halves if memory runs out."""
        try:
            with self.limited(), torch.no_grad():
                return [run(part)]
        except Exception as error:
            if verdict_of(error) not in MEMORY_VERDICTS:
                raise
            message = str(error)
        # Only outside of the except block are the tensors of the failed pass released.
        if size_of(part) == 1:
            raise DoesNotFitError(1, None, message=message)
        self.gradient.device.release_cached()
        half = size_of(part) // 2
        if (
            self.size is not None and size_of(part) >= self.size
        ):  # A shorter part says nothing about the size.
            self.size = half
        halves = cut_to(part, half)[0]
        return [made for half in halves for made in self._fitting(half, run)]

    def measured(
        self, outputs: BatchTree, targets: BatchTree, examples: int
    ) -> dict[str, SumAndTerms]:
        """Return the sum and the terms of each metric."""
        if self.metrics is None:
            return accuracy(outputs, targets, self.objective.ignored_class)
        return {
            name: read_mean(metric(outputs, targets), examples, name)
            for name, metric in self.metrics.items()
        }


class _EvaluationPasses(Passes):
    """Runs one logical batch without gradients, and adds its loss and metrics to the totals.

    Args:
        evaluator: Holds the size that fits.
        batch: The logical batch, on the host.
        totals: The loss and the metrics of the whole evaluation.
    """

    def __init__(self, evaluator: Evaluator, batch: BatchTree, totals: Totals) -> None:
        self._evaluator = evaluator
        self._batch = batch
        self._totals = totals
        self._pairs: list[tuple[BatchTree, BatchTree]] = []

    def record(self, outputs: BatchTree, targets: BatchTree) -> None:
        """Keep the outputs and targets of the part that runs."""
        self._pairs.append((outputs, targets))

    def one_by_one(self, loss: MicroBatchLoss) -> None:
        """Add the loss and the metrics of each part."""
        for numbers in self._evaluator.in_parts(
            self._batch, lambda part: self._numbers(part, loss)
        ):
            self._totals.add(*numbers)

    def outputs_first(self, encode: Encode, loss: FullBatchLoss) -> None:
        """Compute all outputs, and add their common loss, weighted by the number of examples."""
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
    ) -> tuple[SumAndTerms, dict[str, SumAndTerms]]:
        evaluator = self._evaluator
        self._pairs.clear()
        with evaluator.gradient.precision.forward():
            loss_sum, terms = loss(self._on_device(part))
        metrics: dict[str, SumAndTerms] = {}
        for outputs, targets in self._pairs:
            metrics |= evaluator.measured(outputs, targets, size_of(part))
        self._pairs.clear()
        return (in_widest(loss_sum), self._terms(part, terms)), metrics

    def _terms(self, part: BatchTree, terms: Terms) -> float | None:
        """Return what the summed loss is divided by; None for a sum that is not divided."""
        objective = self._evaluator.objective
        if not objective.divides:
            return None
        return objective.denominator(part) if terms is None else float(terms)

    def _on_device(self, part: BatchTree) -> MicroBatch:
        return MicroBatch(self._evaluator.gradient.prefetcher.move(part), part)
