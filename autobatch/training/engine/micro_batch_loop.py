"""Forward and backward passes over the micro-batches of one logical batch."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.amp import GradScaler

from autobatch.data.tree import BatchTree, join, part, size_of
from autobatch.state.rng import random_state
from autobatch.training.batchnorm.pooling import StatisticsPool
from autobatch.training.engine.accumulate import accumulate
from autobatch.training.engine.grad_cache import accumulate_cached
from autobatch.training.engine.gradient_buffer import GradientBuffer
from autobatch.training.engine.loss_record import LossRecord
from autobatch.training.engine.precision import Precision
from autobatch.training.engine.prefetch import Prefetcher
from autobatch.training.losses.loss import Terms
from autobatch.training.losses.objective import (
    Encode,
    FullBatchLoss,
    MicroBatch,
    MicroBatchLoss,
    Passes,
)
from autobatch.training.model_state.window_snapshot import WindowSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLoop(Passes):
    """Runs the micro-batches of one logical batch, forward and backward.

    Attributes:
        parts: The micro-batches, on the host.
        denominator: What the summed loss of the logical batch is divided by.
        record: Keeps the losses.
        prefetcher: Brings micro-batches to the device.
        precision: What forward passes compute in.
        snapshot: Takes what a forward pass changes, so that it can be put back.
        generators: The model's own random number generators.
        scaler: Multiplies the first gradient of each backward pass, or None.
        pool: Pools the running statistics of BatchNorm, or None.
        sums: Adds up gradients in a wider type, or None.
        lends_context: Whether a single example runs beside its neighbor.
        only_reads_targets: Whether nothing writes to the targets.
        more_follow: Whether these micro-batches stand for a longer logical batch.
        mark: Called before the second micro-batch and after the last one. Not called where outputs
            are computed first: their memory belongs to no single micro-batch.
    """

    parts: Sequence[BatchTree]
    denominator: float
    record: LossRecord
    prefetcher: Prefetcher
    precision: Precision
    snapshot: Callable[[], WindowSnapshot]
    generators: Sequence[object]
    scaler: GradScaler | None = None
    pool: StatisticsPool | None = None
    sums: GradientBuffer | None = None
    lends_context: bool = False
    only_reads_targets: bool = False
    more_follow: bool = False
    mark: Callable[[], None] = field(default=lambda: None)

    def one_by_one(self, loss: MicroBatchLoss) -> None:
        """Run each micro-batch forward and backward, and let go of it before the next."""

        def loss_of(micro_batch: MicroBatch) -> tuple[Tensor, Terms]:
            self._begin_statistics(micro_batch)
            with self.precision.forward():
                result = loss(micro_batch)
            self._end_statistics()
            return result

        accumulate(
            self._micro_batches(self.mark),
            loss_of,
            denominator=self.denominator,
            ledger=self.record,
            scaled=self._scaled,
            after_backward=self._absorb,
        )
        self.mark()

    def outputs_first(self, encode: Encode, loss: FullBatchLoss) -> None:
        """Run forward without a graph, take the loss of all outputs, and run each part again."""
        if len(self.parts) == 1:
            self.one_by_one(lambda micro_batch: (loss(*encode(micro_batch)), None))
            return
        counts = False

        def outputs_of(micro_batch: MicroBatch) -> tuple[BatchTree, BatchTree]:
            if counts:
                self._begin_statistics(micro_batch)
            with self.precision.forward():
                result = encode(micro_batch)
            if counts:
                self._end_statistics()
            return result

        def loss_of(outputs: BatchTree, targets: BatchTree) -> Tensor:
            with self.precision.forward():
                return loss(outputs, targets)

        def begin_second_pass() -> None:
            nonlocal counts
            counts = True

        accumulate_cached(
            lambda: self._micro_batches(lambda: None),
            outputs_of,
            loss_of,
            start=self.snapshot,
            random=functools.partial(random_state, self.generators),
            ledger=self.record,
            scaled=self._scaled,
            after_backward=self._absorb,
            second_pass=begin_second_pass,
        )

    def _micro_batches(self, before_second: Callable[[], None]) -> Iterator[MicroBatch]:
        """The micro-batches on the device, and the same on the host."""
        parts, context = self.parts, [0] * len(self.parts)
        if self.lends_context and len(parts) > 1 and any(size_of(p) == 1 for p in parts):
            parts, context = _with_neighbors(parts)
        on_device = self.prefetcher(
            parts, targets_are_read=self.only_reads_targets, more_follow=self.more_follow
        )
        for place, (host, count) in enumerate(zip(parts, context, strict=True)):
            if place == 1:
                before_second()
            yield MicroBatch(next(on_device), host, count)

    def _begin_statistics(self, micro_batch: MicroBatch) -> None:
        if self.pool is not None:
            self.pool.begin(micro_batch.context)

    def _end_statistics(self) -> None:
        if self.pool is not None:
            self.pool.end()

    @property
    def _scaled(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.scaler is None else self.scaler.scale

    @property
    def _absorb(self) -> Callable[[], None] | None:
        return None if self.sums is None else self.sums.absorb


def _with_neighbors(parts: Sequence[BatchTree]) -> tuple[list[BatchTree], list[int]]:
    """Put the last example of the part before in front of each part that has only one example.

    BatchNorm cannot normalize a single example. Where all parts have one, nothing larger fits.
    """
    found, context = list(parts), [0] * len(parts)
    sizes = [size_of(nest) for nest in parts]
    for place, size in enumerate(sizes):
        neighbor = place - 1 if place else 1
        if len(sizes) > 1 and size == 1 < sizes[neighbor]:
            last = part(parts[neighbor], sizes[neighbor] - 1, sizes[neighbor])
            try:
                found[place], context[place] = join([last, parts[place]]), 1
            except ValueError:  # The neighbor has another shape: the example stays alone.
                continue
    return found, context
