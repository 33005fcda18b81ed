"""One optimizer step for each logical batch: gradient, judgment, step or skip."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autobatch.data.tree import BatchTree, size_of
from autobatch.errors import StepInterruptedError
from autobatch.results.plan import BatchPlan
from autobatch.results.training import StepResult
from autobatch.training.engine.batch_gradient import BatchGradient, ComputedGradient
from autobatch.training.engine.lr_schedule import Schedule
from autobatch.training.engine.nonfinite import Fault, NonFinitePolicy
from autobatch.training.engine.optimizer_step import OptimizerStep


@dataclass(slots=True, kw_only=True)
class StepRunner:
    """Takes one optimizer step for each logical batch, or skips it.

    Attributes:
        gradient: Computes the gradient.
        optimizer_step: Makes a step of the gradient.
        nonfinite: Decides about a step that is not finite.
        schedule: The learning rate's.
        steps: Optimizer steps taken.
    """

    gradient: BatchGradient
    optimizer_step: OptimizerStep
    nonfinite: NonFinitePolicy
    schedule: Schedule
    steps: int = 0

    def step(self, batch: BatchTree) -> StepResult:
        """Take one optimizer step for one logical batch, or skip it."""
        try:
            computed = self.gradient.compute(
                batch, finish=self.optimizer_step.finish_gradient, step=self.steps + 1
            )
            if computed is None:
                return _without_terms(size_of(batch))
            fault: Fault = ""
            if self._reads_loss(computed):
                try:
                    has_terms, fault = self._judge(computed)
                except BaseException:
                    computed.before.put_back()
                    raise
                if not has_terms:
                    computed.before.put_back()  # A scaler has unscaled, and buffers have changed.
                    return _without_terms(size_of(batch))
            self._finish(computed, fault)
            return self._result(computed, size_of(batch), fault)
        finally:
            self.gradient.clear()

    def plan(self, desired: int) -> BatchPlan:
        """Return how a full logical batch is cut now."""
        tolerable = min(self.gradient.size.size or desired, desired)
        return BatchPlan(
            desired=desired, tolerable=tolerable, multiple_of=self.gradient.multiple_of
        )

    def state_dict(self) -> dict[str, object]:
        """Return what ``load_state_dict`` takes: plain values."""
        return {
            **self.gradient.state_dict(),
            "steps": self.steps,
            "skipped": self.nonfinite.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self.gradient.load_state_dict(state)
        self.steps, self.nonfinite.skipped = int(state["steps"]), int(state["skipped"])

    def _reads_loss(self, computed: ComputedGradient) -> bool:
        """True if something has to be known before the step."""
        return self.nonfinite.reads_loss or computed.losses.counted

    def _judge(self, computed: ComputedGradient) -> tuple[bool, Fault]:
        """Return whether the batch has terms, and why the step cannot be taken, or ``""``."""
        numbers = computed.losses.read()  # The one wait, before anything is stepped.
        if numbers.terms == 0:
            return False, ""
        self.gradient.gradient_pass.objective.check_finite(list(map(math.isfinite, numbers.losses)))
        terms = numbers.terms or computed.denominator
        return True, self.nonfinite.judge(numbers, step=self.steps + 1, terms=terms)

    def _finish(self, computed: ComputedGradient, fault: Fault) -> None:
        """Take the step, or skip it."""
        if fault:
            if fault == "not finite":  # What is not finite may have spoilt running statistics.
                computed.before.model()
            self.optimizer_step.leave_out()
        else:
            self.optimizer_step.check_gradient()
            self.nonfinite.skipped = 0
            try:
                with self.gradient.limited():
                    self.optimizer_step.take()
            except StepInterruptedError:
                computed.before.put_back()  # Whoever goes on runs this logical batch again.
                raise
            self.steps += 1
            self.schedule.after_step()
        torch.clear_autocast_cache()  # Under the caller's autocast it holds the old weights.

    def _result(self, computed: ComputedGradient, examples: int, fault: Fault) -> StepResult:
        losses, known = computed.losses, self._reads_loss(computed)
        counted = losses.read().terms if known else None
        terms = computed.denominator if counted is None else counted
        if not known:
            losses.send()

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
            skipped=bool(fault),
            reason=fault,
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
