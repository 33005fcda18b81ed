"""A loss that runs the model itself: a function ``(model, batch) -> (sum, terms)``."""

import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from autobatch.data.micro_batches import largest_piece, pieces_of
from autobatch.data.tree import BatchTree, describe, part, size_of
from autobatch.devices.base import HOST
from autobatch.errors import InexactStepError
from autobatch.training.losses.callable import read_pair
from autobatch.training.losses.forward import Forward
from autobatch.training.losses.loss import Terms
from autobatch.training.losses.objective import MicroBatch, Move, Objective, Passes, Record
from autobatch.training.losses.pair_probe import (
    DoublingSchedule,
    first_and_last,
    probe_pair_in_either_mode,
)
from autobatch.training.losses.tolerance import Tolerance

BatchLossFunction = Callable[[nn.Module, Any], object]  # The batch has the user's own structure.
CountTerms = Callable[[Any], object]

# For sums over examples. A mean, or a loss that compares examples, is off by far more.
SUM_TOLERANCE: Final = Tolerance(float64=1e-3, float32=1e-3, float16=5e-2, bfloat16=5e-2)
_EXACT: Final = 1e-9  # For counts of terms in float64 and integers.
_ROUNDED: Final = 1e-6  # For counts of terms in float32.


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """Train with a function ``(model, batch) -> (sum, terms)`` that runs the model itself.

    ``BatchLoss`` is for training steps that ``forward=`` cannot describe: a model that returns
    several losses, an adversarial step, a gradient penalty. The function is called on one
    micro-batch at a time. The loss of a logical batch is the sum of all first values, divided by
    the sum of all second values (examples, valid tokens, boxes).

    Args:
        function: Returns the loss summed over the micro-batch, a tensor without dimensions, and the
            number of terms in that sum, a number or a tensor without dimensions.
        terms: ``batch -> number`` counts the same terms from a batch on the host, without the
            model. Then every backward pass divides by the terms of the logical batch, and a batch
            without terms runs no forward pass. With None, the function's own numbers count, and the
            gradient is rescaled after the last micro-batch.

    Raises:
        TypeError: ``function`` or ``terms`` is not callable.

    Example::

        def squared(model, batch):
            inputs, targets = batch
            return (model(inputs) - targets).square().sum(), len(targets)

        data = (torch.randn(32, 4), torch.randn(32, 1))
        loss = BatchLoss(squared, terms=lambda batch: len(batch[1]))
        find_and_train(nn.Linear(4, 1), data, 16, loss=loss)
    """

    function: BatchLossFunction
    terms: CountTerms | None = None

    def __post_init__(self) -> None:
        if isinstance(self.function, type) or not callable(self.function):
            raise TypeError(
                f"BatchLoss needs a callable (model, batch) -> (sum, terms), got {self.function!r}"
            )
        if self.terms is not None and not callable(self.terms):
            raise TypeError(f"terms must be a callable batch -> number or None, got {self.terms!r}")

    @property
    def module(self) -> None:
        """None: the function finds all parameters of the loss itself."""

    def objective(self, forward: Forward | None) -> "BatchLossObjective":
        """Return what training minimizes.

        Raises:
            TypeError: If there is a ``forward``.
        """
        if forward is not None:
            raise TypeError("BatchLoss takes the place of forward too; pass it without forward")
        return BatchLossObjective(batch_loss=self)

    def count_terms(self, batch: BatchTree) -> float | None:
        """Return how many terms ``terms`` counts in a batch on the host; None without ``terms``.

        Raises:
            TypeError: If ``terms`` returns no number.
            ValueError: If the number is negative, nan or infinite.
        """
        if self.terms is None:
            return None
        total = 0.0
        for piece in pieces_of(batch):
            count = self.terms(piece)
            if not isinstance(count, numbers.Real | Tensor):
                raise TypeError(f"terms must return a number, got {describe(count)}")
            total += float(count)
        if not 0 <= total < math.inf:
            raise ValueError(
                f"terms must return a number that is finite and at least 0, got {total}"
            )
        return total


@dataclass(slots=True, kw_only=True)
class BatchLossObjective(Objective):
    """The objective of a ``BatchLoss``, which checks that sums and terms add up over examples.

    The check runs the function on two examples, alone and together, in the logical batches 1, 2, 4,
    8 and so on that are cut.

    Attributes:
        batch_loss: The user's function, with its terms.
    """

    batch_loss: BatchLoss
    _schedule: DoublingSchedule = field(default_factory=DoublingSchedule, init=False)

    @property
    def shows_outputs(self) -> bool:
        """False: the function does not return outputs and targets."""
        return False

    def for_evaluation(self) -> "BatchLossObjective":
        """Return an objective with the same function, whose checks start again."""
        return BatchLossObjective(batch_loss=self.batch_loss)

    def state_dict(self) -> dict[str, object]:
        """Return how often the function was checked."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._schedule.load_state_dict(state)

    @property
    def forward(self) -> BatchLossFunction:
        """The user's function."""
        return self.batch_loss.function

    def prepare(self, model: nn.Module, batch: BatchTree, move: Move, *, cut: bool) -> None:
        """Check that sums and terms add up over the first and the last example.

        The model runs in evaluation mode. If that fails, it runs in training mode without dropout
        and batch statistics. Everything is restored.

        Raises:
            InexactStepError: If the sums or the terms do not add up, or ``terms=`` and the function
                count different terms.
        """
        if not cut or self.batch_loss.count_terms(batch) == 0:  # No step follows without terms.
            return
        self._schedule.seen += 1
        pair = first_and_last(batch) if self._schedule.is_due else None
        if pair is None:
            return
        self._check_halves(largest_piece(batch))
        runs = probe_pair_in_either_mode(
            model, lambda batch: self._numbers(model, batch, move), pair
        )
        tolerance = SUM_TOLERANCE.of(*(parameter.dtype for parameter in model.parameters()))
        for name, first, second, whole, repeated in zip(
            ("sum", "number of terms"), *runs, strict=True
        ):
            if not _add_up(whole, 0.0, repeated, _ROUNDED):
                continue  # The function draws random numbers, as diffusion does.
            if not _add_up(first, second, whole, tolerance):
                raise InexactStepError(
                    f"the {name} that batch_loss returns does not add up over examples: it is "
                    f"{first:.9g} and {second:.9g} for two examples alone, and {whole:.9g} for "
                    "both together. Return the sum, not the mean, and the number of terms in the "
                    "sum; for a loss that compares examples, pass loss=WholeBatch(...)"
                )
        self._schedule.passed += 1

    def denominator(self, batch: BatchTree) -> float:
        """Return the terms that ``terms=`` counts; without ``terms=``, the number of examples."""
        counted = self.batch_loss.count_terms(batch)
        return size_of(batch) if counted is None else counted

    def run(
        self,
        passes: Passes,
        model: nn.Module,
        record: Record | None = None,  # noqa: ARG002  # There are no outputs to record.
    ) -> None:
        """Run each micro-batch by itself."""
        passes.one_by_one(lambda micro_batch: self._loss_of(model, micro_batch))

    def notes(self, *, cut: bool) -> Iterator[str]:
        """Yield what was verified of the function."""
        if cut:
            yield (
                "autobatch does not know what your batch_loss computes. Its sums and terms added "
                "up for two examples in the logical batches 1, 2, 4, 8 and so on that were cut; a "
                "function that draws random numbers cannot be checked"
            )

    def _loss_of(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Terms]:
        """Return the function's sum, and its terms if ``terms=`` has not counted them.

        Raises:
            InexactStepError: If ``terms=`` and the function count different terms. A count on
                another device than the CPU is compared in ``prepare`` only, because reading it here
                would wait for the device.
        """
        loss_sum, terms = self._pair(model, micro_batch.batch)
        counted = self.batch_loss.count_terms(micro_batch.host)
        if counted is None:
            return loss_sum, terms
        if not isinstance(terms, Tensor) or terms.device == HOST:
            _refuse_difference(terms, counted)
        return loss_sum, None

    def _pair(self, model: nn.Module, batch: BatchTree) -> tuple[Tensor, Tensor | float]:
        """Return the sum and the terms that the user's function returns."""
        result = self.batch_loss.function(model, batch)
        if not isinstance(result, tuple):
            raise TypeError(
                f"batch_loss must return (sum, terms), got {describe(result)}: the loss summed "
                "over the micro-batch, and the number of terms in that sum"
            )
        return read_pair(result)

    def _check_halves(self, piece: BatchTree) -> None:
        """Refuse ``terms=`` whose counts of two halves do not add up to that of the batch."""
        half, size = size_of(piece) // 2, size_of(piece)
        whole = self.batch_loss.count_terms(piece)
        halves = [
            self.batch_loss.count_terms(part(piece, *ends)) for ends in ((0, half), (half, size))
        ]
        one, other = (count or 0.0 for count in halves)
        if whole is not None and not _add_up(one, other, whole, _EXACT):
            raise InexactStepError(
                f"terms= does not add up over examples: it counts {one:.9g} and {other:.9g} in the "
                f"halves of a batch, and {whole:.9g} in the whole batch. Return the number of "
                "terms in the batch that is passed"
            )

    def _numbers(self, model: nn.Module, batch: BatchTree, move: Move) -> tuple[float, float]:
        """Return the sum and the terms of a few examples as plain numbers."""
        with torch.enable_grad():  # The function may call torch.autograd.grad.
            loss_sum, terms = self._pair(model, move(batch))
        counted = self.batch_loss.count_terms(batch)
        if counted is not None:
            _refuse_difference(terms, counted)
        return float(loss_sum.detach()), float(terms)


def _refuse_difference(terms: Tensor | float, counted: float) -> None:
    """Refuse a function that counts other terms than ``terms=`` does; rounding is allowed."""
    is_rounded = isinstance(terms, Tensor) and terms.is_floating_point() and terms.itemsize < 8
    if not math.isclose(float(terms), counted, rel_tol=_ROUNDED if is_rounded else _EXACT):
        raise InexactStepError(
            f"the function of BatchLoss returns {float(terms):.9g} terms for a batch in which "
            f"terms= counts {counted:.9g}, so that the gradient would be divided by the wrong "
            "number. Make both count the same terms, or do not pass terms="
        )


def _add_up(one: float, other: float, both: float, tolerance: float) -> bool:
    """Whether two numbers add up to a third; True if one of the three is not finite."""
    if not all(map(math.isfinite, (one, other, both))):
        return True
    scale = max(abs(one), abs(other), abs(both))
    return math.isclose(one + other, both, rel_tol=0, abs_tol=tolerance * scale)
