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
    normalises_by_batch,
    updating_layers,
)
from autobatch.training.batchnorm.pooling import StatisticsPool, pooled_statistics
from autobatch.training.batchnorm.statistics import RunningStatistics
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
    """Everything that the gradient of a logical batch depends on. A trial uses the same object.

    Attributes:
        model: In training mode.
        objective: What is minimized.
        device: The device of the model.
        precision: The precision of forward passes.
        batch_norm: How BatchNorm normalizes a micro-batch.
        gradient_dtype: The dtype in which 16-bit gradients are summed; None is their own dtype.
        scaler: Scales the gradient that a backward pass starts with, or None.
        prefetcher: Copies micro-batches to the device.
        generators: The model's own random generators.
        parameter_cache: The modules and parameters, looked up once a step.
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
        """Let the objective prepare for a logical batch, and return the batch's denominator.

        Args:
            batch: On the host or on any device.
            cut: True if the batch will run in several micro-batches.

        Returns:
            The number that the summed loss is divided by; 0 if no term is valid.
        """
        try:
            self.objective.prepare(self.model, batch, self.prefetcher.move, cut=cut)
        except Exception as error:
            # No search has tried these checks. The batch itself may still fit.
            if verdict_of(error) is not Verdict.OUT_OF_MEMORY:
                raise
            out_of_memory = True
        else:
            out_of_memory = False
        if out_of_memory:
            self.device.release_cached()
        return self.objective.denominator(batch)

    def begin(self) -> None:
        """Look up the model's modules and parameters, and clear every gradient."""
        self.parameter_cache.refresh()
        self.clear()

    def clear(self) -> None:
        """Set every ``.grad`` to None."""
        for parameter in self.parameter_cache.parameters:
            parameter.grad = None

    def snapshot(self) -> WindowSnapshot:
        """Copy what the forward and backward passes of a logical batch may change."""
        cache = self.parameter_cache
        layers = updating_layers(cache.batch_norms) if self.batch_norm == "micro" else []
        statistics = RunningStatistics(layers) if layers else None
        return window_snapshot(cache.modules, self.generators, self.scaler, statistics)

    def run(
        self,
        micro_batches: Sequence[BatchTree],
        denominator: float,
        before: WindowSnapshot,
        *,
        record: Record | None = None,
        finish: Finish = lambda: None,
        more_follow: bool = False,
        end_phase: Callable[[], None] = lambda: None,
    ) -> LossRecord:
        """Leave the gradient of the logical batch in ``.grad``, which must be empty.

        Nothing here waits for the device.

        Args:
            micro_batches: On the host or on any device.
            denominator: The number that the summed loss of the logical batch is divided by.
            before: From ``snapshot``, taken just now.
            record: Called with the outputs and targets of each micro-batch.
            finish: Called with the finished gradient in ``.grad``; may return its norm.
            more_follow: True if these are the first micro-batches of a longer logical batch.
            end_phase: Called before the second micro-batch and after the last one.

        Returns:
            The losses, and the gradient's norm if ``finish`` returned it.
        """
        losses = LossRecord(len(micro_batches), self.device)
        cache = self.parameter_cache
        dtype = self.gradient_dtype
        buffer = None if dtype is None else GradientBuffer(cache.parameters, dtype)
        normalizes = self.batch_norm == "micro" and normalises_by_batch(cache.batch_norms)
        with self.precision.window(), self._statistics(len(micro_batches), before) as pool:
            loop = MicroBatchLoop(
                micro_batches=micro_batches,
                denominator=denominator,
                losses=losses,
                prefetcher=self.prefetcher,
                precision=self.precision,
                snapshot=self.snapshot,
                generators=self.generators,
                scaler=self.scaler,
                pool=pool,
                buffer=buffer,
                adds_context=normalizes and self.objective.takes_context,
                only_reads_targets=self.objective.only_reads_targets,
                more_follow=more_follow,
                end_phase=end_phase,
            )
            self.objective.run(loop, self.model, record)
        self._rescale(losses.terms, denominator, buffer)
        if buffer is not None:
            buffer.write_gradients()
        norm = finish()
        if norm is not None:
            losses.add_norm(norm)
        return losses

    def _rescale(
        self, terms: Tensor | float | None, denominator: float, buffer: GradientBuffer | None
    ) -> None:
        """Divide by the terms that the loss has counted, instead of by ``denominator``."""
        if terms is None or (not isinstance(terms, Tensor) and terms in (0.0, denominator)):
            return
        # A number of 0 on a GPU is not read here; the step will be skipped because of it.
        parameters = self.parameter_cache.parameters
        gradients = [p.grad for p in parameters if p.grad is not None]
        gradients += buffer.sums if buffer is not None else []
        rescale(gradients, denominator / terms)

    def _statistics(
        self, micro_batches: int, before: WindowSnapshot
    ) -> AbstractContextManager[StatisticsPool | None]:
        """Return the context that freezes or pools the statistics of BatchNorm, or does nothing."""
        if self.batch_norm == "frozen":
            return frozen_statistics(self.model)
        if micro_batches == 1 or before.statistics is None:
            return nullcontext()
        return pooled_statistics(before.statistics)
