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
        micro_batches: On the host, or on any device.
        denominator: The number that the summed loss of the logical batch is divided by.
        losses: Records the losses.
        prefetcher: Copies micro-batches to the device.
        precision: The precision of forward passes.
        snapshot: Copies what a forward pass changes, so that it can be restored.
        generators: The model's own random generators.
        scaler: Scales the gradient that a backward pass starts with, or None.
        pool: Pools the running statistics of BatchNorm, or None.
        buffer: Sums gradients in a wider dtype, or None.
        adds_context: True if a single example runs together with an example of its neighbor.
        only_reads_targets: True if nothing writes to the targets.
        more_follow: True if these are the first micro-batches of a longer logical batch.
        end_phase: Called before the second micro-batch and after the last one: a trial then reads
            the memory. Not called if outputs are computed first, because their memory belongs to
            no single micro-batch.
    """

    micro_batches: Sequence[BatchTree]
    denominator: float
    losses: LossRecord
    prefetcher: Prefetcher
    precision: Precision
    snapshot: Callable[[], WindowSnapshot]
    generators: Sequence[object]
    scaler: GradScaler | None = None
    pool: StatisticsPool | None = None
    buffer: GradientBuffer | None = None
    adds_context: bool = False
    only_reads_targets: bool = False
    more_follow: bool = False
    end_phase: Callable[[], None] = field(default=lambda: None)

    def one_by_one(self, loss: MicroBatchLoss) -> None:
        """Run each micro-batch forward and backward, and release it before the next."""

        def loss_of(micro_batch: MicroBatch) -> tuple[Tensor, Terms]:
            self._begin_statistics(micro_batch)
            with self.precision.forward():
                result = loss(micro_batch)
            self._end_statistics()
            return result

        accumulate(
            self._on_device(self.end_phase),
            loss_of,
            denominator=self.denominator,
            losses=self.losses,
            scale=self._scale,
            after_backward=self._after_backward,
        )
        self.end_phase()

    def outputs_first(self, encode: Encode, loss: FullBatchLoss) -> None:
        """Run all micro-batches without a graph, compute the loss, and run each again."""
        if len(self.micro_batches) == 1:
            self.one_by_one(lambda micro_batch: (loss(*encode(micro_batch)), None))
            return
        is_second_pass = False  # Only the second pass counts for BatchNorm's statistics.

        def outputs_of(micro_batch: MicroBatch) -> tuple[BatchTree, BatchTree]:
            if is_second_pass:
                self._begin_statistics(micro_batch)
            with self.precision.forward():
                result = encode(micro_batch)
            if is_second_pass:
                self._end_statistics()
            return result

        def loss_of(outputs: BatchTree, targets: BatchTree) -> Tensor:
            with self.precision.forward():
                return loss(outputs, targets)

        def begin_second_pass() -> None:
            nonlocal is_second_pass
            is_second_pass = True

        accumulate_cached(
            lambda: self._on_device(lambda: None),
            outputs_of,
            loss_of,
            snapshot=self.snapshot,
            random_state=functools.partial(random_state, self.generators),
            losses=self.losses,
            scale=self._scale,
            after_backward=self._after_backward,
            before_second_pass=begin_second_pass,
        )

    def _on_device(self, before_second: Callable[[], None]) -> Iterator[MicroBatch]:
        """Yield each micro-batch, on the device and on the host."""
        micro_batches, context = self.micro_batches, [0] * len(self.micro_batches)
        if self.adds_context and any(size_of(one) == 1 for one in micro_batches):
            micro_batches, context = _with_neighbors(micro_batches)
        on_device = self.prefetcher(
            micro_batches,
            only_reads_targets=self.only_reads_targets,
            more_follow=self.more_follow,
        )
        for index, (host, count) in enumerate(zip(micro_batches, context, strict=True)):
            if index == 1:
                before_second()
            yield MicroBatch(next(on_device), host, count)

    def _begin_statistics(self, micro_batch: MicroBatch) -> None:
        if self.pool is not None:
            self.pool.begin(micro_batch.context)

    def _end_statistics(self) -> None:
        if self.pool is not None:
            self.pool.end()

    @property
    def _scale(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.scaler is None else self.scaler.scale

    @property
    def _after_backward(self) -> Callable[[], None] | None:
        return None if self.buffer is None else self.buffer.add_gradients


def _with_neighbors(micro_batches: Sequence[BatchTree]) -> tuple[list[BatchTree], list[int]]:
    """Put one example of a neighbor in front of each micro-batch that has a single example.

    BatchNorm cannot normalize a single example. If the neighbor has one example too, the
    micro-batch stays as it is: nothing larger fits.

    Returns:
        The micro-batches, and how many examples each has from its neighbor: 0 or 1.
    """
    extended, context = list(micro_batches), [0] * len(micro_batches)
    sizes = [size_of(micro_batch) for micro_batch in micro_batches]
    for index, size in enumerate(sizes):
        neighbor = index - 1 if index else 1
        if len(sizes) > 1 and size == 1 < sizes[neighbor]:
            last = part(micro_batches[neighbor], sizes[neighbor] - 1, sizes[neighbor])
            try:
                extended[index], context[index] = join([last, micro_batches[index]]), 1
            except ValueError:  # The neighbor's examples have another shape.
                continue
    return extended, context
