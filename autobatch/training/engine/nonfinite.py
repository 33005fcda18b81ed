"""Decide what happens to a step whose loss or gradient is not finite."""

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from autobatch.errors import NonFiniteLossError
from autobatch.training.engine.loss_record import StepNumbers

NonFinite = Literal["raise", "skip", "ignore"]
NonFiniteReason = Literal["", "not finite", "overflow"]

MOST_SKIPPED: Final = 100  # Steps in a row.


def check_nonfinite(mode: object) -> None:
    """Raise unless ``mode`` is one of the three modes.

    Raises:
        ValueError: With the value that was passed.
    """
    if mode not in get_args(NonFinite):
        raise ValueError(f"nonfinite must be one of {get_args(NonFinite)}, got {mode!r}")


@dataclass(slots=True, kw_only=True)
class NonFinitePolicy:
    """Raises, skips or ignores steps that are not finite, and counts skipped steps in a row.

    Attributes:
        mode: ``"raise"``, ``"skip"`` or ``"ignore"``, as the user chose.
        uses_scaler: True if a GradScaler is in use. It makes gradients overflow to find the largest
            possible scale, so such a step is skipped in every mode.
        skipped: Skipped steps since the last one that was taken.
    """

    mode: NonFinite
    uses_scaler: bool
    skipped: int = 0

    @property
    def reads_numbers(self) -> bool:
        """True if loss and norm are read before each step, which waits for the device."""
        return self.mode != "ignore" or self.uses_scaler

    def judge(self, numbers: StepNumbers, *, step: int, terms: float) -> NonFiniteReason:
        """Return why the step must be skipped, or ``""`` if it is to be taken.

        Args:
            numbers: The losses of the micro-batches, and the gradient's norm.
            step: The number of the step, counted from 1.
            terms: The number of loss terms of the logical batch.

        Raises:
            NonFiniteLossError: If ``mode`` is ``"raise"``, or too many steps in a row were skipped.
        """
        reason = self._reason(numbers)
        if not reason:
            return ""
        if reason == "overflow" or self.mode == "skip":
            self.skipped += 1
            if self.skipped <= MOST_SKIPPED:
                return reason
        finite = [math.isfinite(loss) for loss in numbers.losses]
        first = None if all(finite) else finite.index(False) + 1
        raise NonFiniteLossError(step, numbers.loss_sum / terms, terms, first, len(finite))

    def step_taken(self) -> None:
        """Record that a step was taken: no step in a row is skipped any more."""
        self.skipped = 0

    def _reason(self, numbers: StepNumbers) -> NonFiniteReason:
        losses_are_finite = all(map(math.isfinite, numbers.losses))
        gradient_is_finite = numbers.norm is None or math.isfinite(numbers.norm)
        if losses_are_finite and gradient_is_finite:
            return ""
        overflow = self.uses_scaler and not gradient_is_finite
        if overflow and (losses_are_finite or self.mode == "ignore"):
            return "overflow"
        return "" if self.mode == "ignore" else "not finite"
