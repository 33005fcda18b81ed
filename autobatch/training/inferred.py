"""The objective where no loss is given: the model's own, or the one that the targets suggest."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from autobatch.batches.nest import Nest, part
from autobatch.batches.pieces import pieces_of
from autobatch.devices.oom import verdict_of
from autobatch.results import Verdict
from autobatch.training.accumulate import Terms
from autobatch.training.forward import targets_of
from autobatch.training.objective import Compared, Move, Witness
from autobatch.training.own_loss import OwnLoss, call_with_labels, own_loss_of
from autobatch.training.undisturbed import undisturbed


@dataclass(slots=True, kw_only=True)
class Inferred:
    """Asks the model once whether it returns a loss of its own.

    Attributes:
        otherwise: What is made smaller if it does not.
    """

    otherwise: Compared
    _own: OwnLoss | None = field(default=None, init=False)
    _asked: bool = field(default=False, init=False)

    @property
    def chosen(self) -> Compared | None:
        """What compares outputs and targets; None where the model does that itself."""
        return None if self._own is not None else self.otherwise

    def apart(self) -> "Inferred":
        """Return another that knows the same."""
        other = Inferred(otherwise=self.otherwise.apart())
        other._own = None if self._own is None else self._own.apart()
        other._asked = self._asked
        return other

    def learnt(self) -> dict[str, object]:
        """Return what is known of the model's own loss, if it has one."""
        return {"own": None if self._own is None else self._own.state_dict(), "asked": self._asked}

    def relearn(self, learnt: Mapping[str, Any]) -> None:
        """Know it again."""
        self._asked = bool(learnt["asked"])
        self._own = None if learnt["own"] is None else OwnLoss()
        if self._own is not None:
            self._own.load_state_dict(learnt["own"])

    def settle(self, model: nn.Module, batch: Nest, move: Move, *, cut: bool) -> None:
        """Ask the model, with one example, and find out what its mean counts."""
        if not self._asked:
            self._own = _own_loss(model, batch, move)
            self._asked = True
        if self._own is None:
            self.otherwise.settle(model, batch, move, cut=cut)
        elif cut:
            self._own.settle(model, batch, move)

    def denominator(self, batch: Nest) -> float:
        """Return the terms of a logical batch."""
        if self._own is not None:
            return self._own.denominator(batch)
        return self.otherwise.denominator(batch)

    def share(
        self,
        model: nn.Module,
        micro_batch: Nest,
        *,
        host: Nest,
        borrowed: int,
        witness: Witness | None,
    ) -> tuple[Tensor, Terms]:
        """Return the model's own loss times its terms, or that of its outputs."""
        if self._own is None:
            return self.otherwise.share(
                model, micro_batch, host=host, borrowed=borrowed, witness=witness
            )
        outputs = call_with_labels(model, micro_batch)
        if witness is not None:
            witness(outputs, targets_of(micro_batch))
        return self._own.summed(outputs, host)


def compared_by(objective: object) -> Compared | None:
    """Return what compares outputs and targets here, if something does."""
    chosen = objective.chosen if isinstance(objective, Inferred) else objective
    return chosen if isinstance(chosen, Compared) else None


def _own_loss(model: nn.Module, batch: Nest, move: Move) -> OwnLoss | None:
    """The loss that the model, called with the whole mapping, returns; None if it returns none."""
    first = pieces_of(batch)[0]
    if not isinstance(first, Mapping) or not _takes(model, first):
        return None

    def returns_one(*, training: bool) -> bool:
        with undisturbed(model, training=training):
            return own_loss_of(call_with_labels(model, move(part(first, 0, 1)))) is not None

    try:
        if returns_one(training=False):
            return OwnLoss()
    except TypeError:  # It hands all keywords on to one that does not take labels.
        return None
    try:
        return OwnLoss(training=True) if returns_one(training=True) else None
    except Exception as error:  # It takes labels, and cannot be trained with them.
        if verdict_of(error) is Verdict.OUT_OF_MEMORY:
            raise
        return None


def _takes(model: nn.Module, batch: Mapping[str, Nest]) -> bool:
    """Whether the model can be called with these keywords; what it makes of them is not asked."""
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return True
