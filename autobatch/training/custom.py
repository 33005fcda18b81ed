"""The objective that is a function of the user's: ``(model, batch) -> (sum, terms)``."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from autobatch.batches.nest import Nest, describe, part, size_of, take
from autobatch.batches.pieces import largest_piece
from autobatch.devices.oom import MEMORY_VERDICTS, verdict_of
from autobatch.errors import InexactStepError
from autobatch.training.accumulate import Terms
from autobatch.training.losses import read_pair
from autobatch.training.objective import Move, Witness
from autobatch.training.undisturbed import undisturbed

BatchLoss = Callable[[nn.Module, Any], object]  # The batch is the user's own structure.

_TOLERANCE: Final = 1e-3  # Of float32 sums; a mean, or a loss that couples, is off by far more.
_COARSE: Final = 5e-2  # Of 16 bits.


@dataclass(slots=True, kw_only=True)
class Custom:
    """Believed after two examples, alone and together, have given the same sum and terms.

    Asked in the windows 1, 2, 4, 8 and so on that are cut.

    Attributes:
        batch_loss: The function.
    """

    batch_loss: BatchLoss
    _windows: int = field(default=0, init=False)
    _agreed: int = field(default=0, init=False)

    def apart(self) -> "Custom":
        """Return another with the same function."""
        return Custom(batch_loss=self.batch_loss)

    def learnt(self) -> dict[str, object]:
        """Return how often it was asked, and agreed."""
        return {"windows": self._windows, "agreed": self._agreed}

    def relearn(self, learnt: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._windows, self._agreed = int(learnt["windows"]), int(learnt["agreed"])

    def settle(self, model: nn.Module, batch: Nest, move: Move, *, cut: bool) -> None:
        """Hold the function to the law with the first and the last example.

        The model is in evaluation mode for this, or if that fails in training mode without what is
        random or sees the batch. Everything is put back.

        Raises:
            InexactStepError: If the sums or the terms do not add up.
        """
        if not cut:
            return
        self._windows += 1
        piece = largest_piece(batch)
        if self._windows < 1 << self._agreed or size_of(piece) < 2:
            return
        pair = take(piece, [0, size_of(piece) - 1])
        one, other, both, again = self._asked(model, pair, move)
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
        self._agreed += 1

    def denominator(self, batch: Nest) -> float:
        """Return the examples: not the last word."""
        return size_of(batch)

    def share(
        self,
        model: nn.Module,
        micro_batch: Nest,
        *,
        host: Nest,  # noqa: ARG002  # The protocol's, and there are no outputs to show.
        borrowed: int,
        witness: Witness | None,  # noqa: ARG002
    ) -> tuple[Tensor, Terms]:
        """Return what the function says."""
        assert not borrowed, "no rows can be left out of a sum"
        result = self.batch_loss(model, micro_batch)
        if not isinstance(result, tuple):
            raise TypeError(
                f"batch_loss must return (sum, terms), got {describe(result)}; the sum over the "
                "micro-batch, and the number of terms that its mean would be over"
            )
        return read_pair(result)

    def _asked(self, model: nn.Module, pair: Nest, move: Move) -> Sequence[tuple[float, float]]:
        """Sum and terms of either of two examples, of both, and of both once more."""
        parts = [part(pair, 0, 1), part(pair, 1, 2), pair, pair]

        def ask(*, training: bool) -> Sequence[tuple[float, float]]:
            # It may take gradients of its own.
            with undisturbed(model, training=training), torch.enable_grad():
                return [self._numbers(model, move(nest)) for nest in parts]

        try:
            return ask(training=False)
        except Exception as error:
            if isinstance(error, InexactStepError) or verdict_of(error) in MEMORY_VERDICTS:
                raise
        try:  # A detector returns its losses in training mode alone.
            return ask(training=True)
        except Exception as error:
            error.add_note("batch_loss was asked for two examples, alone and together: a check")
            raise

    def _numbers(self, model: nn.Module, nest: Nest) -> tuple[float, float]:
        loss_sum, terms = self.share(model, nest, host=nest, borrowed=0, witness=None)
        return float(loss_sum.detach()), float(terms or 0.0)


def _tolerance(parameter: Tensor) -> float:
    return _COARSE if parameter.dtype.itemsize <= 2 else _TOLERANCE


def _add_up(one: float, other: float, both: float, tolerance: float) -> bool:
    """Whether two numbers make a third; what is not finite cannot tell."""
    if not all(map(math.isfinite, (one, other, both))):
        return True
    scale = max(abs(one), abs(other), abs(both))
    return math.isclose(one + other, both, rel_tol=0, abs_tol=tolerance * scale)
