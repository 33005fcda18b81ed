"""One window: the gradient of one logical batch, from its micro-batches."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.batches.nest import Nest, join, part, size_of
from autobatch.devices.base import MemoryDevice
from autobatch.devices.oom import verdict_of
from autobatch.randomness import random_state
from autobatch.results import Verdict
from autobatch.training.accumulate import Terms, accumulate, rescale
from autobatch.training.batch_norm import (
    BatchNormMode,
    frozen_statistics,
    moving_layers,
    normalises_by_batch,
)
from autobatch.training.feed import Feed
from autobatch.training.inferred import compared_by
from autobatch.training.ledger import Ledger
from autobatch.training.members import Members
from autobatch.training.objective import Compared, Objective, Share, Witness
from autobatch.training.pooling import Pool, pooled_statistics
from autobatch.training.precision import Precision
from autobatch.training.replay import Start, window_start
from autobatch.training.running_statistics import Statistics
from autobatch.training.update import Update
from autobatch.training.whole_batch import Whole, accumulate_whole
from autobatch.training.wide import WideSums
from autobatch.training.witness import Widths


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a training step is made of. A trial and training follow the same one.

    Attributes:
        model: In training mode.
        objective: What is made smaller.
        update: How the gradient becomes a step.
        precision: What forward passes compute in.
        batch_norm: What BatchNorm does with a micro-batch.
        gradient_dtype: What 16-bit gradients are summed in; None is their own.
        feed: Brings micro-batches to the device.
        generators: The model's own random number generators.
        members: Modules and parameters, as they are in this step.
    """

    model: nn.Module
    objective: Objective
    update: Update
    precision: Precision
    batch_norm: BatchNormMode
    gradient_dtype: torch.dtype | None
    feed: Feed
    generators: Sequence[object]
    members: Members

    @property
    def device(self) -> MemoryDevice:
        """Where the model is."""
        return self.update.device

    @property
    def optimizer(self) -> Optimizer:
        """Over some or all of the model's parameters."""
        return self.update.optimizer

    def prepared(self, batch: Nest, *, cut: bool) -> float:
        """Learn what has to be known of a logical batch, and return its denominator.

        Zero means that no term is valid.

        Args:
            batch: On the host, or wherever it is.
            cut: Whether it is to be cut, so that the law matters.
        """
        try:
            self.objective.settle(self.model, batch, self.feed.move, cut=cut)
        except Exception as error:
            # No search has rehearsed two examples side by side; the window itself may fit.
            if verdict_of(error) is not Verdict.OUT_OF_MEMORY:
                raise
            ran_out = True
        else:
            ran_out = False
        if ran_out:
            self.device.release_cached()
        return self.objective.denominator(batch)

    def begin(self) -> None:
        """See what the model has now, and let go of every gradient."""
        self.members.refresh()
        self.clear()

    def start(self) -> Start:
        """Take what a window may move."""
        layers = moving_layers(self.members.batch_norms) if self.batch_norm == "micro" else []
        return window_start(
            self.members.modules,
            self.generators,
            self.update.scaler,
            Statistics(layers) if layers else None,
        )

    def accumulate(
        self,
        parts: Sequence[Nest],
        denominator: float,
        start: Start,
        *,
        witness: Witness | None = None,
        more_follow: bool = False,
        mark: Callable[[], None] | None = None,
    ) -> Ledger:
        """Leave the logical batch's finished gradient in ``.grad``, which must be empty.

        Finished: rescaled, unscaled and clipped. Nothing here waits for the device.

        Args:
            parts: The micro-batches, on the host.
            denominator: The logical batch's.
            start: What the window may move, as it is now.
            witness: Is shown each micro-batch's outputs and its targets.
            more_follow: Whether they stand for a window of more.
            mark: Called before the second micro-batch, and after the last one. Not where the loss
                is that of the whole batch, whose memory belongs to no single micro-batch.
        """
        ledger = Ledger(len(parts), self.device)
        parameters = self.members.parameters
        wide = WideSums(parameters, self.gradient_dtype) if self.gradient_dtype else None
        with self.precision.window(), self._statistics(len(parts), start) as pool:
            if len(parts) > 1 and isinstance(self.objective, Whole):
                _Run(self, pool, ledger, wide, more_follow).whole(parts, self.objective)
            else:
                run = _Run(self, pool, ledger, wide, more_follow, mark)
                run.shares(parts, denominator, witness)
        terms = ledger.terms
        if terms is not None and (isinstance(terms, Tensor) or terms not in (0.0, denominator)):
            # Elsewhere than on the CPU nobody looks: where there are none, no step is taken.
            sums = [p.grad for p in parameters if p.grad is not None]
            sums += wide.sums if wide is not None else []
            rescale(sums, denominator / terms)
        if wide is not None:
            wide.give_back()
        norm = self.update.finish_gradient()
        if norm is not None:
            ledger.note_norm(norm)
        return ledger

    def check_gradient(self) -> None:
        """Refuse a step on nothing.

        Raises:
            ValueError: If no parameter of the optimizer received a gradient.
        """
        if all(parameter.grad is None for parameter in self.update.parameters()):
            raise ValueError(
                "no parameter received a gradient: the loss does not depend on the model"
            )

    def clear(self) -> None:
        """Let go of every gradient."""
        for parameter in self.members.parameters:
            parameter.grad = None

    def _statistics(self, micro_batches: int, start: Start) -> AbstractContextManager[Pool | None]:
        if self.batch_norm == "frozen":
            return frozen_statistics(self.model)
        if micro_batches == 1 or start.statistics is None:
            return nullcontext()
        return pooled_statistics(start.statistics)


@dataclass(frozen=True, slots=True)
class _Run:
    """The passes of one window."""

    recipe: Recipe
    pool: Pool | None
    ledger: Ledger
    wide: WideSums | None
    more_follow: bool
    mark: Callable[[], None] | None = None

    def shares(self, parts: Sequence[Nest], denominator: float, witness: Witness | None) -> None:
        """Forward and backward, micro-batch by micro-batch."""
        recipe, pool = self.recipe, self.pool
        share, forward = self._share(witness), recipe.precision.forward

        def pooled(micro_batch: tuple[Nest, Nest, int]) -> tuple[Tensor, Terms]:
            if pool is not None:
                pool.begin(micro_batch[2])
            with forward():
                result = share(micro_batch)
            if pool is not None:
                pool.end()
            return result

        plain = pool is None and recipe.precision.name == "fp32"
        accumulate(
            self._fed(parts),
            share if plain else pooled,
            denominator=denominator,
            ledger=self.ledger,
            scaled=recipe.update.scaled(),
            after_backward=self.wide.absorb if self.wide is not None else None,
        )
        if self.mark is not None:
            self.mark()

    def _share(self, witness: Witness | None) -> Share:
        model, objective = self.recipe.model, self.recipe.objective
        if witness is None and isinstance(objective, Compared):
            quick = objective.quick_share(model)
            if quick is not None:
                return quick

        compared = compared_by(objective)
        widths = Widths() if compared is not None and compared.may_widen else None

        def share(micro_batch: tuple[Nest, Nest, int]) -> tuple[Tensor, Terms]:
            nest, host, borrowed = micro_batch
            seen = witness if widths is None else widths.of(host, witness)
            return objective.share(model, nest, host=host, borrowed=borrowed, witness=seen)

        return share

    def whole(self, parts: Sequence[Nest], objective: Whole) -> None:
        """All outputs, the loss of all, and each micro-batch once more."""
        recipe, pool = self.recipe, self.pool
        counts = False

        def encode(nest: Nest, borrowed: int) -> tuple[Nest, Nest]:
            if pool is not None and counts:
                pool.begin(borrowed)
            with recipe.precision.forward():
                result = objective.encode(recipe.model, nest, borrowed)
            if pool is not None and counts:
                pool.end()
            return result

        def loss(outputs: Nest, targets: Nest) -> Tensor:
            with recipe.precision.forward():
                return objective.loss(outputs, targets)

        def begin_counting() -> None:
            nonlocal counts
            counts = True

        accumulate_whole(
            lambda: ((nest, borrowed) for nest, _, borrowed in self._fed(parts)),
            encode,
            loss,
            start=recipe.start,
            random=functools.partial(random_state, recipe.generators),
            ledger=self.ledger,
            scaled=recipe.update.scaled(),
            after_backward=self.wide.absorb if self.wide is not None else None,
            second_pass=begin_counting,
        )

    def _fed(self, parts: Sequence[Nest]) -> Iterator[tuple[Nest, Nest, int]]:
        """The micro-batches, on the device and as they came, with what each of them borrows."""
        recipe, compared = self.recipe, compared_by(self.recipe.objective)
        borrowed = [0] * len(parts)
        if len(parts) > 1 and self._may_borrow(compared) and any(size_of(p) == 1 for p in parts):
            parts, borrowed = _with_neighbours(parts)
        moved = recipe.feed(
            parts,
            targets_are_read=compared is not None and compared.reads_targets,
            more_follow=self.more_follow,
        )
        for place, (host, count) in enumerate(zip(parts, borrowed, strict=True)):
            if place == 1 and self.mark is not None:
                self.mark()
            yield next(moved), host, count

    def _may_borrow(self, compared: Compared | None) -> bool:
        return (
            self.recipe.batch_norm == "micro"
            and (compared is not None or isinstance(self.recipe.objective, Whole))
            and normalises_by_batch(self.recipe.members.batch_norms)
        )


def _with_neighbours(parts: Sequence[Nest]) -> tuple[list[Nest], list[int]]:
    """Put the last example of the part before in front of a part that has only one.

    BatchNorm can do nothing with a single example. Where all have one, it is what fits.
    """
    found, borrowed = list(parts), [0] * len(parts)
    sizes = [size_of(nest) for nest in parts]
    for place, size in enumerate(sizes):
        neighbour = place - 1 if place else 1
        if len(sizes) > 1 and size == 1 < sizes[neighbour]:
            last = part(parts[neighbour], sizes[neighbour] - 1, sizes[neighbour])
            try:
                found[place], borrowed[place] = join([last, parts[place]]), 1
            except ValueError:  # Of another shape: it stays alone.
                continue
    return found, borrowed
