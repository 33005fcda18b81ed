"""The objective where no loss is given: the model's own, or the one that the targets suggest."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from autobatch.data.micro_batches import pieces_of
from autobatch.data.tree import BatchTree, part
from autobatch.devices.oom import verdict_of
from autobatch.results.verdict import Verdict
from autobatch.training.losses.forward import targets_of
from autobatch.training.losses.loss import Terms
from autobatch.training.losses.model_loss import ModelLoss, call_with_labels, model_loss_of
from autobatch.training.losses.objective import MicroBatch, Move, Objective, Passes, Record
from autobatch.training.losses.supervised import SupervisedObjective
from autobatch.training.model_state.evaluation_mode import undisturbed


@dataclass(slots=True, kw_only=True)
class InferredObjective(Objective):
    """Finds out once whether the model returns a loss of its own.

    Attributes:
        otherwise: What is made smaller if it does not.
    """

    otherwise: SupervisedObjective
    _own: ModelLoss | None = field(default=None, init=False)
    _known: bool = field(default=False, init=False)

    @property
    def takes_context(self) -> bool:
        """True where the model returns no loss of its own."""
        return self._own is None and self.otherwise.takes_context

    @property
    def only_reads_targets(self) -> bool:
        """True where the model returns no loss of its own."""
        return self._own is None and self.otherwise.only_reads_targets

    def for_evaluation(self) -> "InferredObjective":
        """Return another objective that knows the same."""
        other = InferredObjective(otherwise=self.otherwise.for_evaluation())
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, object]:
        """Return what is known of the model's own loss, if it has one."""
        return {"own": None if self._own is None else self._own.state_dict(), "known": self._known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._known = bool(state["known"])
        self._own = None if state["own"] is None else ModelLoss()
        if self._own is not None:
            self._own.load_state_dict(state["own"])

    def prepare(self, model: nn.Module, batch: BatchTree, move: Move, *, cut: bool) -> None:
        """Try the model once, with one example, and find out what its mean counts."""
        if not self._known:
            self._own = _own_loss(model, batch, move)
            self._known = True
        if self._own is None:
            self.otherwise.prepare(model, batch, move, cut=cut)
        elif cut:
            self._own.settle(model, batch, move)

    def denominator(self, batch: BatchTree) -> float:
        """Return the terms of a logical batch."""
        if self._own is not None:
            return self._own.denominator(batch)
        return self.otherwise.denominator(batch)

    def run(self, passes: Passes, model: nn.Module, record: Record | None = None) -> None:
        """Run each micro-batch by itself: the model's own loss, or that of its outputs."""
        if self._own is None:
            self.otherwise.run(passes, model, record)
            return
        own = self._own

        def loss_of(micro_batch: MicroBatch) -> tuple[Tensor, Terms]:
            outputs = call_with_labels(model, micro_batch.batch)
            if record is not None:
                record(outputs, targets_of(micro_batch.batch))
            return own.summed(outputs, micro_batch.host)

        passes.one_by_one(loss_of)

    def notes(self, *, cut: bool) -> Iterator[str]:
        """Yield what was inferred from floating targets."""
        if self._own is None:
            yield from self.otherwise.notes(cut=cut)


def _own_loss(model: nn.Module, batch: BatchTree, move: Move) -> ModelLoss | None:
    """The loss that the model, called with the whole mapping, returns; None if it returns none."""
    first = pieces_of(batch)[0]
    if not isinstance(first, Mapping) or not _takes(model, first):
        return None

    def returns_one(*, training: bool) -> bool:
        with undisturbed(model, training=training):
            return model_loss_of(call_with_labels(model, move(part(first, 0, 1)))) is not None

    try:
        if returns_one(training=False):
            return ModelLoss()
    except TypeError:  # It hands all keywords on to one that does not take labels.
        return None
    try:
        return ModelLoss(training=True) if returns_one(training=True) else None
    except Exception as error:  # It takes labels, and cannot be trained with them.
        if verdict_of(error) is Verdict.OUT_OF_MEMORY:
            raise
        return None


def _takes(model: nn.Module, batch: Mapping[str, BatchTree]) -> bool:
    """Whether the model can be called with these keywords; what it makes of them is not asked."""
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return True
