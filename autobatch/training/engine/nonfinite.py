"""What happens to a step whose loss or gradient is not finite."""

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from autobatch.errors import NonFiniteLossError
from autobatch.training.engine.loss_record import StepNumbers

NonFinite = Literal["raise", "skip", "ignore"]
Fault = Literal["", "not finite", "overflow"]

MOST_SKIPPED: Final = 100  # Steps in a row.


def check_nonfinite(mode: object) -> None:
    """Refuse what is no mode.

    Raises:
        ValueError: With the value that came.
    """
    if mode not in get_args(NonFinite):
        raise ValueError(f"nonfinite must be one of {get_args(NonFinite)}, got {mode!r}")


@dataclass(slots=True, kw_only=True)
class NonFinitePolicy:
    """Raises, skips or ignores, and counts the steps that were skipped in a row.

    Attributes:
        mode: What the user wants.
        scales: Whether a GradScaler is in use, which asks for a smaller scale by an overflow.
        skipped: Steps in a row that were skipped.
    """

    mode: NonFinite
    scales: bool
    skipped: int = 0

    @property
    def reads_loss(self) -> bool:
        """True if the loss has to be read before each step, which waits for the device."""
        return self.mode != "ignore" or self.scales

    def judge(self, numbers: StepNumbers, *, step: int, terms: float) -> Fault:
        """Return why the step is skipped, or ``""`` if it is taken.

        Args:
            numbers: The losses of the micro-batches, and the gradient's norm.
            step: The number of the step, counted from 1.
            terms: What the summed loss is divided by.

        Raises:
            NonFiniteLossError: If the user wants that, or too many steps in a row were skipped.
        """
        fault = self._fault(numbers)
        if not fault:
            return ""
        self.skipped += fault != "raise"
        if fault != "raise" and self.skipped <= MOST_SKIPPED:
            return fault
        finite = [math.isfinite(loss) for loss in numbers.losses]
        first = None if all(finite) else finite.index(False) + 1
        raise NonFiniteLossError(step, numbers.loss_sum / terms, terms, first, len(finite))

    def _fault(self, numbers: StepNumbers) -> Fault | Literal["raise"]:
        losses_are_finite = all(map(math.isfinite, numbers.losses))
        gradient_is_finite = numbers.norm is None or math.isfinite(numbers.norm)
        if losses_are_finite and gradient_is_finite:
            return ""
        scaled = self.scales and not gradient_is_finite
        if scaled and (losses_are_finite or self.mode == "ignore"):
            return "overflow"
        if self.mode == "ignore":
            return ""
        return "raise" if self.mode == "raise" else "not finite"
