"""One attempt at the gradient of a logical batch, from given micro-batches."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from autobatch.data.tree import BatchTree
from autobatch.devices.base import MemoryDevice
from autobatch.devices.oom import verdict_of
from autobatch.results.verdict import Verdict
from autobatch.training.batchnorm.modes import (
    BatchNormMode,
    frozen_statistics,
    moving_layers,
    normalises_by_batch,
)
from autobatch.training.batchnorm.pooling import StatisticsPool, pooled_statistics
from autobatch.training.batchnorm.statistics import Statistics
from autobatch.training.engine.accumulate import rescale
from autobatch.training.engine.gradient_buffer import GradientBuffer
from autobatch.training.engine.loss_record import LossRecord
from autobatch.training.engine.micro_batch_loop import MicroBatchLoop
from autobatch.training.engine.precision import Precision
from autobatch.training.engine.prefetch import Prefetcher
from autobatch.training.losses.objective import Objective, Record
from autobatch.training.model_state.parameter_cache import ParameterCache
from autobatch.training.model_state.window_snapshot import WindowSnapshot, window_snapshot

Finish = Callable[[], Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientPass:
    """Everything that the gradient of a logical batch is made with. A trial uses the same one.

    Attributes:
        model: In training mode.
        objective: What is minimized.
        device: Where the model is.
        precision: What forward passes compute in.
        batch_norm: What BatchNorm does with a micro-batch.
        gradient_dtype: What 16-bit gradients are summed in; None is their own type.
        scaler: Multiplies the first gradient of each backward pass, or None.
        prefetcher: Brings micro-batches to the device.
        generators: The model's own random number generators.
        parameter_cache: Modules and parameters, as they are in this step.
    """

    model: nn.Module
    objective: Objective
    device: MemoryDevice
    precision: Precision
    batch_norm: BatchNormMode
    gradient_dtype: torch.dtype | None
    scaler: GradScaler | None
    prefetcher: Prefetcher
    generators: Sequence[object]
    parameter_cache: ParameterCache

    def prepare(self, batch: BatchTree, *, cut: bool) -> float:
        """Find out what has to be known of a logical batch, and return its denominator.

        Args:
            batch: On the host, or wherever it is.
            cut: Whether it will run in several micro-batches.

        Returns:
            What the summed loss is divided by. 0 means that no term is valid.
        """
        try:
            self.objective.prepare(self.model, batch, self.prefetcher.move, cut=cut)
        except Exception as error:
            # No search has rehearsed two examples side by side; the batch itself may fit.
            if verdict_of(error) is not Verdict.OUT_OF_MEMORY:
                raise
            ran_out = True
        else:
            ran_out = False
        if ran_out:
            self.device.release_cached()
        return self.objective.denominator(batch)

    def begin(self) -> None:
        """Look up the model's modules and parameters, and drop every gradient."""
        self.parameter_cache.refresh()
        self.clear()

    def clear(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameter_cache.parameters:
            parameter.grad = None

    def snapshot(self) -> WindowSnapshot:
        """Take what a logical batch may change before the optimizer's step."""
        layers = (
            moving_layers(self.parameter_cache.batch_norms) if self.batch_norm == "micro" else []
        )
        return window_snapshot(
            self.parameter_cache.modules,
            self.generators,
            self.scaler,
            Statistics(layers) if layers else None,
        )

    def run(
        self,
        parts: Sequence[BatchTree],
        denominator: float,
        before: WindowSnapshot,
        *,
        record: Record | None = None,
        finish: Finish = lambda: None,
        more_follow: bool = False,
        mark: Callable[[], None] = lambda: None,
    ) -> LossRecord:
        """Leave the logical batch's gradient in ``.grad``, which must be empty.

        Nothing here waits for the device.

        Args:
            parts: The micro-batches, on the host.
            denominator: The logical batch's.
            before: What the logical batch may change, as it is now.
            record: Takes each micro-batch's outputs and targets.
            finish: Called with the finished gradient in place; may return its norm.
            more_follow: Whether the parts stand for a longer logical batch.
            mark: Called before the second micro-batch and after the last one.

        Returns:
            The losses, and the gradient's norm where ``finish`` gave one.
        """
        losses = LossRecord(len(parts), self.device)
        parameters = self.parameter_cache.parameters
        sums = GradientBuffer(parameters, self.gradient_dtype) if self.gradient_dtype else None
        normalizes = self.batch_norm == "micro" and normalises_by_batch(
            self.parameter_cache.batch_norms
        )
        with self.precision.window(), self._statistics(len(parts), before) as pool:
            passes = MicroBatchLoop(
                parts=parts,
                denominator=denominator,
                record=losses,
                prefetcher=self.prefetcher,
                precision=self.precision,
                snapshot=self.snapshot,
                generators=self.generators,
                scaler=self.scaler,
                pool=pool,
                sums=sums,
                lends_context=normalizes and self.objective.takes_context,
                only_reads_targets=self.objective.only_reads_targets,
                more_follow=more_follow,
                mark=mark,
            )
            self.objective.run(passes, self.model, record)
        self._rescale(losses.terms, denominator, sums)
        if sums is not None:
            sums.give_back()
        norm = finish()
        if norm is not None:
            losses.note_norm(norm)
        return losses

    def _rescale(
        self, terms: Tensor | float | None, denominator: float, sums: GradientBuffer | None
    ) -> None:
        """Divide by the terms that only the loss could count, in the place of the examples."""
        if terms is None or (not isinstance(terms, Tensor) and terms in (0.0, denominator)):
            return
        # On a GPU nobody looks at the number: where there are no terms, no step is taken.
        gradients = [p.grad for p in self.parameter_cache.parameters if p.grad is not None]
        gradients += sums.sums if sums is not None else []
        rescale(gradients, denominator / terms)

    def _statistics(
        self, micro_batches: int, before: WindowSnapshot
    ) -> AbstractContextManager[StatisticsPool | None]:
        if self.batch_norm == "frozen":
            return frozen_statistics(self.model)
        if micro_batches == 1 or before.statistics is None:
            return nullcontext()
        return pooled_statistics(before.statistics)
