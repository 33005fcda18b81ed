"""The objective without a given loss: the model's own loss, or one that fits the targets."""

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
    """Finds out once whether the model returns its own loss, and minimizes that loss or another.

    Attributes:
        otherwise: The objective if the model returns no loss.
    """

    otherwise: SupervisedObjective
    _own: ModelLoss | None = field(default=None, init=False)
    _known: bool = field(default=False, init=False)

    @property
    def takes_context(self) -> bool:
        """True if the model returns no loss and the other objective takes context examples."""
        return self._own is None and self.otherwise.takes_context

    @property
    def only_reads_targets(self) -> bool:
        """True if the model returns no loss and the other objective only reads targets."""
        return self._own is None and self.otherwise.only_reads_targets

    def for_evaluation(self) -> "InferredObjective":
        """Return a copy that finds out more without changing this objective."""
        other = InferredObjective(otherwise=self.otherwise.for_evaluation())
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, object]:
        """Return what was found out about the model's own loss."""
        return {"own": None if self._own is None else self._own.state_dict(), "known": self._known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._known = bool(state["known"])
        self._own = None if state["own"] is None else ModelLoss()
        if self._own is not None:
            self._own.load_state_dict(state["own"])

    def prepare(self, model: nn.Module, batch: BatchTree, move: Move, *, cut: bool) -> None:
        """Find out once if the model returns a loss, and what the mean of that loss counts."""
        if not self._known:
            self._own = _own_loss(model, batch, move)
            self._known = True
        if self._own is None:
            self.otherwise.prepare(model, batch, move, cut=cut)
        elif cut:
            self._own.prepare(model, batch, move)

    def denominator(self, batch: BatchTree) -> float:
        """Return the terms of a logical batch."""
        if self._own is not None:
            return self._own.denominator(batch)
        return self.otherwise.denominator(batch)

    def run(self, passes: Passes, model: nn.Module, record: Record | None = None) -> None:
        """Run each micro-batch by itself, with the model's own loss or a loss of its outputs."""
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
        """Yield the notes of the other objective if the model returns no loss."""
        if self._own is None:
            yield from self.otherwise.notes(cut=cut)


def _own_loss(model: nn.Module, batch: BatchTree, move: Move) -> ModelLoss | None:
    """Return the model's own loss, if the model returns one for a whole mapping; otherwise None."""
    first = pieces_of(batch)[0]
    if not isinstance(first, Mapping) or not _accepts(model, first):
        return None

    def returns_loss(*, training: bool) -> bool:
        with undisturbed(model, training=training):
            return model_loss_of(call_with_labels(model, move(part(first, 0, 1)))) is not None

    try:
        if returns_loss(training=False):
            return ModelLoss()
    except TypeError:  # The model passes its keywords on to a function without labels.
        return None
    try:
        return ModelLoss(training=True) if returns_loss(training=True) else None
    except Exception as error:  # The model takes labels and cannot be trained with them.
        if verdict_of(error) is Verdict.OUT_OF_MEMORY:
            raise
        return None


def _accepts(model: nn.Module, batch: Mapping[str, BatchTree]) -> bool:
    """Whether the signature of the model's forward accepts these keywords."""
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return True
