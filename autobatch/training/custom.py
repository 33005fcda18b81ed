"""The objective that is a function of the user's: ``(model, batch) -> (sum, terms)``."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from autobatch.batches.nest import Nest, describe, size_of
from autobatch.devices.failures import verdict_of
from autobatch.errors import InexactStepError
from autobatch.results import Verdict
from autobatch.training.accumulate import Terms
from autobatch.training.losses import read_pair
from autobatch.training.objective import Move, Objective, Passes, Record
from autobatch.training.undisturbed import undisturbed
from autobatch.training.verification import (
    DoublingSchedule,
    alone_and_together,
    first_and_last,
)

BatchLoss = Callable[[nn.Module, Any], object]  # The batch is the user's own structure.

_TOLERANCE: Final = 1e-3  # Of float32 sums; a mean, or a loss that couples, is off by far more.
_COARSE: Final = 5e-2  # Of 16 bits.
_TOO_MUCH: Final = (Verdict.OUT_OF_MEMORY, Verdict.TOO_LARGE)


@dataclass(slots=True, kw_only=True)
class Custom(Objective):
    """Trusted after two examples, alone and together, have given the same sum and terms.

    Checked in the logical batches 1, 2, 4, 8 and so on that are cut.

    Attributes:
        batch_loss: The function.
    """

    batch_loss: BatchLoss
    _schedule: DoublingSchedule = field(default_factory=DoublingSchedule, init=False)

    @property
    def shows_outputs(self) -> bool:
        """False: the function keeps outputs and targets to itself."""
        return False

    def for_evaluation(self) -> "Custom":
        """Return an objective with the same function, which is checked anew."""
        return Custom(batch_loss=self.batch_loss)

    def state_dict(self) -> dict[str, object]:
        """Return how often the function was checked."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._schedule.load_state_dict(state)

    def prepare(self, model: nn.Module, batch: Nest, move: Move, *, cut: bool) -> None:
        """Check with the first and the last example that sums and terms add up.

        The model is in evaluation mode for this, or if that fails in training mode without what is
        random or sees the batch. Everything is put back.

        Raises:
            InexactStepError: If the sums or the terms do not add up.
        """
        if not cut:
            return
        self._schedule.seen += 1
        pair = first_and_last(batch) if self._schedule.is_due else None
        if pair is None:
            return
        one, other, both, again = self._probed(model, pair, move)
        tolerance = max(_tolerance(parameter) for parameter in model.parameters())
        for name, first, second, whole, repeated in zip(
            ("sum", "number of terms"), one, other, both, again, strict=True
        ):
            if not _add_up(whole, 0.0, repeated, 1e-6):
                continue  # It draws random numbers, as diffusion does, and cannot be held to it.
            if not _add_up(first, second, whole, tolerance):
                raise InexactStepError(
                    f"the {name} that batch_loss returns does not add up over examples: it is "
                    f"{first:.9g} and {second:.9g} for two of them alone, and {whole:.9g} for both "
                    "together. Return the sum, not the mean, and the number of terms that its mean "
                    "is over; for a loss that compares examples pass loss=WholeBatch(...)"
                )
        self._schedule.passed += 1

    def denominator(self, batch: Nest) -> float:
        """Return the examples: not the last word."""
        return size_of(batch)

    def run(
        self,
        passes: Passes,
        model: nn.Module,
        record: Record | None = None,  # noqa: ARG002  # There are no outputs to record.
    ) -> None:
        """Run each micro-batch by itself."""
        passes.one_by_one(lambda micro_batch: self._loss_of(model, micro_batch.batch))

    def notes(self, *, cut: bool) -> Iterator[str]:
        """Yield what was verified of the function."""
        if cut:
            yield (
                "batch_loss is a function of yours: its sums and terms were seen to add up for two "
                "examples in the logical batches 1, 2, 4, 8 and so on that were cut, unless it "
                "draws random numbers"
            )

    def _loss_of(self, model: nn.Module, batch: Nest) -> tuple[Tensor, Terms]:
        """The sum and the terms that the function returns."""
        result = self.batch_loss(model, batch)
        if not isinstance(result, tuple):
            raise TypeError(
                f"batch_loss must return (sum, terms), got {describe(result)}; the sum over the "
                "micro-batch, and the number of terms that its mean would be over"
            )
        return read_pair(result)

    def _probed(self, model: nn.Module, pair: Nest, move: Move) -> Sequence[tuple[float, float]]:
        """Sum and terms of either of two examples, of both, and of both once more."""
        parts = alone_and_together(pair)

        def probe(*, training: bool) -> Sequence[tuple[float, float]]:
            # It may take gradients of its own.
            with undisturbed(model, training=training), torch.enable_grad():
                return [self._numbers(model, move(nest)) for nest in parts]

        try:
            return probe(training=False)
        except Exception as error:
            if isinstance(error, InexactStepError) or verdict_of(error) in _TOO_MUCH:
                raise
        try:  # A detector returns its losses in training mode alone.
            return probe(training=True)
        except Exception as error:
            error.add_note("batch_loss was asked for two examples, alone and together: a check")
            raise

    def _numbers(self, model: nn.Module, nest: Nest) -> tuple[float, float]:
        loss_sum, terms = self._loss_of(model, nest)
        return float(loss_sum.detach()), float(terms or 0.0)


def _tolerance(parameter: Tensor) -> float:
    return _COARSE if parameter.dtype.itemsize <= 2 else _TOLERANCE


def _add_up(one: float, other: float, both: float, tolerance: float) -> bool:
    """Whether two numbers make a third; what is not finite cannot tell."""
    if not all(map(math.isfinite, (one, other, both))):
        return True
    scale = max(abs(one), abs(other), abs(both))
    return math.isclose(one + other, both, rel_tol=0, abs_tol=tolerance * scale)
