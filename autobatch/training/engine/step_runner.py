"""Take one optimizer step for each logical batch, or skip it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from autobatch.data.tree import BatchTree, size_of
from autobatch.errors import StepInterruptedError
from autobatch.results.plan import BatchPlan
from autobatch.results.training import StepResult
from autobatch.training.engine.batch_gradient import BatchGradient, ComputedGradient
from autobatch.training.engine.lr_schedule import Schedule
from autobatch.training.engine.nonfinite import NonFinitePolicy, NonFiniteReason
from autobatch.training.engine.optimizer_step import OptimizerStep

SkipReason = NonFiniteReason | Literal["no valid term"]


@dataclass(slots=True, kw_only=True)
class StepRunner:
    """Takes one optimizer step for each logical batch, or skips it.

    Attributes:
        gradient: Computes the gradient of a logical batch.
        optimizer_step: Turns the gradient into a step.
        nonfinite: Decides about steps that are not finite.
        schedule: Steps the learning-rate scheduler.
        steps: Optimizer steps taken.
    """

    gradient: BatchGradient
    optimizer_step: OptimizerStep
    nonfinite: NonFinitePolicy
    schedule: Schedule
    steps: int = 0

    def step(self, batch: BatchTree) -> StepResult:
        """Take one optimizer step for one logical batch, or skip it; leave no gradient behind."""
        try:
            computed = self.gradient.compute(
                batch, finish=self.optimizer_step.finish_gradient, step=self.steps + 1
            )
            if computed is None:
                return _without_terms(size_of(batch))
            reason = self._skip_reason(computed)
            if reason == "no valid term":
                computed.snapshot.restore()  # The scaler has unscaled, and buffers have changed.
                return _without_terms(size_of(batch))
            if reason:
                self._skip(computed, reason)
            else:
                self._take(computed)
            torch.clear_autocast_cache()  # Under the caller's autocast it holds the old weights.
            return self._result(computed, size_of(batch), reason)
        finally:
            self.gradient.clear()

    def plan(self, desired: int) -> BatchPlan:
        """Return how a logical batch of ``desired`` examples is cut now."""
        tolerable = min(self.gradient.micro_batch_size.size or desired, desired)
        return BatchPlan(
            desired=desired, tolerable=tolerable, multiple_of=self.gradient.multiple_of
        )

    def state_dict(self) -> dict[str, object]:
        """Return the counts and the micro-batch size, as plain values."""
        return {
            **self.gradient.state_dict(),
            "steps": self.steps,
            "skipped": self.nonfinite.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self.gradient.load_state_dict(state)
        self.steps, self.nonfinite.skipped = int(state["steps"]), int(state["skipped"])

    def _reads_numbers(self, computed: ComputedGradient) -> bool:
        """Return whether the losses must be read before the step."""
        return self.nonfinite.reads_numbers or computed.losses.has_terms

    def _skip_reason(self, computed: ComputedGradient) -> SkipReason:
        """Return why the step must be skipped, or ``""``; restore everything if that raises."""
        if not self._reads_numbers(computed):
            return ""
        try:
            numbers = computed.losses.read()  # The only wait for the device before the step.
            if numbers.terms == 0:
                return "no valid term"
            finite = list(map(math.isfinite, numbers.losses))
            self.gradient.gradient_pass.objective.check_finite(finite)
            terms = computed.read_terms()
            return self.nonfinite.judge(numbers, step=self.steps + 1, terms=terms)
        except BaseException:
            computed.snapshot.restore()
            raise

    def _skip(self, computed: ComputedGradient, reason: SkipReason) -> None:
        if reason == "not finite":  # The running statistics may not be finite either.
            computed.snapshot.restore_model()
        self.optimizer_step.skip()

    def _take(self, computed: ComputedGradient) -> None:
        self.optimizer_step.check_gradient()
        self.nonfinite.step_taken()
        try:
            with self.gradient.limited():
                self.optimizer_step.take()
        except StepInterruptedError:
            computed.snapshot.restore()  # A resumed training runs this logical batch again.
            raise
        self.steps += 1
        self.schedule.after_step()

    def _result(self, computed: ComputedGradient, examples: int, reason: SkipReason) -> StepResult:
        losses, known = computed.losses, self._reads_numbers(computed)
        terms = computed.read_terms()
        if not known:
            losses.start_reading()

        # A result may be kept for long: it must hold the losses, but not ``computed``.
        def loss() -> float:
            return losses.read().loss_sum / terms

        def norm() -> float | None:
            return losses.read().norm

        return StepResult(
            loss=loss() if known else loss,
            terms=terms,
            examples=examples,
            grad_norm=norm() if known else norm,
            micro_batch_sizes=computed.micro_batch_sizes,
            replays=computed.retries,
            skipped=bool(reason),
            reason=reason,
        )


def _without_terms(examples: int) -> StepResult:
    return StepResult(
        loss=float("nan"),
        terms=0,
        examples=examples,
        grad_norm=None,
        micro_batch_sizes=(),
        skipped=True,
        reason="no valid term",
    )
