"""The objective that a function of the user computes: ``(model, batch) -> (sum, terms)``."""

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from autobatch.data.micro_batches import largest_piece, pieces_of
from autobatch.data.tree import BatchTree, describe, part, size_of
from autobatch.devices.base import HOST
from autobatch.devices.oom import MEMORY_VERDICTS, verdict_of
from autobatch.errors import InexactStepError
from autobatch.training.losses.callable import read_pair
from autobatch.training.losses.forward import Forward
from autobatch.training.losses.loss import Terms
from autobatch.training.losses.objective import MicroBatch, Move, Objective, Passes, Record
from autobatch.training.losses.pair_probe import (
    DoublingSchedule,
    alone_and_together,
    first_and_last,
)
from autobatch.training.model_state.evaluation_mode import undisturbed

BatchLossFunction = Callable[[nn.Module, Any], object]  # The batch has the user's own structure.
CountTerms = Callable[[Any], object]

_TOLERANCE: Final = 1e-3  # Of float32 sums; a mean, or a loss that couples, is off by far more.
_COARSE: Final = 5e-2  # Of 16 bits.
_EXACT: Final = 1e-9  # Of counts in float64.
_ROUNDED: Final = 1e-6  # Of counts in float32.


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """A loss ``(model, batch) -> (sum, terms)``, for a training step that no ``forward`` describes.

    The function runs the model itself, on a micro-batch at a time. The loss of a logical batch is
    the sum over its micro-batches of what the function returns first, divided by the sum of what it
    returns second: examples, valid tokens, boxes::

        def squared(model, batch):
            inputs, targets = batch
            return (model(inputs) - targets).square().sum(), len(targets)

        data = (torch.randn(32, 4), torch.randn(32, 1))
        loss = BatchLoss(squared, terms=lambda batch: len(batch[1]))
        find_and_train(nn.Linear(4, 1), data, 16, loss=loss)

    Args:
        function: Returns the loss summed over the micro-batch, a tensor without dimensions, and the
            number of terms in that sum, a number or a tensor without dimensions.
        terms: ``batch -> number`` returns the same number of terms from a batch on the host,
            without the model. Then the sum of a logical batch is divided by its terms from the
            first micro-batch on; a batch without terms runs no forward pass. None takes the
            function's own numbers, and rescales the gradient at the end.

    Raises:
        TypeError: ``function`` or ``terms`` cannot be called.
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
        """None: the loss has no parameters that the function does not find itself."""

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
    """The objective of a ``BatchLoss``, whose sums and terms are checked on two examples.

    The check runs the function on two examples alone and together, in the logical batches 1, 2, 4,
    8 and so on that are cut.

    Attributes:
        batch_loss: The user's function, with its terms.
    """

    batch_loss: BatchLoss
    _schedule: DoublingSchedule = field(default_factory=DoublingSchedule, init=False)

    @property
    def shows_outputs(self) -> bool:
        """False: the function keeps outputs and targets to itself."""
        return False

    def for_evaluation(self) -> "BatchLossObjective":
        """Return an objective with the same function, which is checked anew."""
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
            InexactStepError: If the sums or the terms do not add up, or ``terms=`` counts otherwise
                than the function.
        """
        if not cut or self.batch_loss.count_terms(batch) == 0:  # No step follows without terms.
            return
        self._schedule.seen += 1
        pair = first_and_last(batch) if self._schedule.is_due else None
        if pair is None:
            return
        self._check_halves(largest_piece(batch))
        one, other, both, again = self._probed(model, pair, move)
        tolerance = max(_tolerance(parameter) for parameter in model.parameters())
        for name, first, second, whole, repeated in zip(
            ("sum", "number of terms"), one, other, both, again, strict=True
        ):
            if not _add_up(whole, 0.0, repeated, _ROUNDED):
                continue  # A function that draws random numbers, as diffusion does, proves nothing.
            if not _add_up(first, second, whole, tolerance):
                raise InexactStepError(
                    f"the {name} that batch_loss returns does not add up over examples: it is "
                    f"{first:.9g} and {second:.9g} for two of them alone, and {whole:.9g} for both "
                    "together. Return the sum, not the mean, and the number of terms that its mean "
                    "is over; for a loss that compares examples pass loss=WholeBatch(...)"
                )
        self._schedule.passed += 1

    def denominator(self, batch: BatchTree) -> float:
        """Return what ``terms=`` counts; without it the examples, which are rescaled at the end."""
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
                "batch_loss is a function of yours: its sums and terms were seen to add up for two "
                "examples in the logical batches 1, 2, 4, 8 and so on that were cut, unless it "
                "draws random numbers"
            )

    def _loss_of(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Terms]:
        """The function's sum, and its terms where ``terms=`` does not count them before.

        Raises:
            InexactStepError: If ``terms=`` counts otherwise than the function. A count that lies on
                another device than the CPU is not waited for here, but compared in ``prepare``.
        """
        loss_sum, terms = self._pair(model, micro_batch.batch)
        counted = self.batch_loss.count_terms(micro_batch.host)
        if counted is None:
            return loss_sum, terms
        if not isinstance(terms, Tensor) or terms.device == HOST:
            _refuse_difference(terms, counted)
        return loss_sum, None

    def _pair(self, model: nn.Module, batch: BatchTree) -> tuple[Tensor, Tensor | float]:
        """The sum and the terms that the user's function returns."""
        result = self.batch_loss.function(model, batch)
        if not isinstance(result, tuple):
            raise TypeError(
                f"batch_loss must return (sum, terms), got {describe(result)}; the sum over the "
                "micro-batch, and the number of terms that its mean would be over"
            )
        return read_pair(result)

    def _check_halves(self, piece: BatchTree) -> None:
        """Refuse ``terms=`` that does not add up over the halves of a batch."""
        half, size = size_of(piece) // 2, size_of(piece)
        whole = self.batch_loss.count_terms(piece)
        halves = [
            self.batch_loss.count_terms(part(piece, *ends)) for ends in ((0, half), (half, size))
        ]
        one, other = (count or 0.0 for count in halves)
        if whole is not None and not _add_up(one, other, whole, _EXACT):
            raise InexactStepError(
                f"terms= does not add up over examples: it counts {one:.9g} and {other:.9g} in the "
                f"halves of a batch, and {whole:.9g} in all of it. Return the number of terms of "
                "the batch that it is called with"
            )

    def _probed(
        self, model: nn.Module, pair: BatchTree, move: Move
    ) -> Sequence[tuple[float, float]]:
        """Sum and terms of the first example, the second, both, and both again."""
        parts = alone_and_together(pair)

        def probe(*, training: bool) -> Sequence[tuple[float, float]]:
            # The function may call torch.autograd.grad itself.
            with undisturbed(model, training=training), torch.enable_grad():
                return [self._numbers(model, nest, move) for nest in parts]

        try:
            return probe(training=False)
        except Exception as error:
            if isinstance(error, InexactStepError) or verdict_of(error) in MEMORY_VERDICTS:
                raise
        try:  # A detector returns its losses in training mode alone.
            return probe(training=True)
        except Exception as error:
            error.add_note("batch_loss was called for two examples, alone and together: a check")
            raise

    def _numbers(self, model: nn.Module, nest: BatchTree, move: Move) -> tuple[float, float]:
        loss_sum, terms = self._pair(model, move(nest))
        counted = self.batch_loss.count_terms(nest)
        if counted is not None:
            _refuse_difference(terms, counted)
        return float(loss_sum.detach()), float(terms)


def _refuse_difference(terms: Tensor | float, counted: float) -> None:
    """Refuse a function that returns other terms than ``terms=`` counts, rounding apart."""
    is_rounded = isinstance(terms, Tensor) and terms.is_floating_point() and terms.itemsize < 8
    if not math.isclose(float(terms), counted, rel_tol=_ROUNDED if is_rounded else _EXACT):
        raise InexactStepError(
            f"the function of BatchLoss returns {float(terms):.9g} terms for a batch in which "
            f"terms= counts {counted:.9g}, so that the gradient would be divided by the wrong "
            "number. Make both count the same terms, or leave out terms="
        )


def _tolerance(parameter: Tensor) -> float:
    return _COARSE if parameter.dtype.itemsize <= 2 else _TOLERANCE


def _add_up(one: float, other: float, both: float, tolerance: float) -> bool:
    """Whether two numbers add up to a third; True where one of the three is not finite."""
    if not all(map(math.isfinite, (one, other, both))):
        return True
    scale = max(abs(one), abs(other), abs(both))
    return math.isclose(one + other, both, rel_tol=0, abs_tol=tolerance * scale)
