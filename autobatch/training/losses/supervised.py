"""The objective that compares a model's outputs with targets by a loss."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from autobatch.data.micro_batches import pieces_of
from autobatch.data.tree import BatchTree, size_of
from autobatch.training.losses.batch_independence import BatchIndependenceCheck
from autobatch.training.losses.forward import Forward, own_rows, run_forward, targets_of
from autobatch.training.losses.loss import Loss, Terms
from autobatch.training.losses.objective import (
    CutBatch,
    MicroBatch,
    Move,
    Objective,
    Passes,
    Record,
)
from autobatch.training.losses.output_recorder import (
    SplitCheck,
    TargetShapeCheck,
    refuse_partly_finite,
)
from autobatch.training.losses.pair_probe import DoublingSchedule


@dataclass(slots=True, kw_only=True)
class SupervisedObjective(Objective):
    """Minimizes a loss of the model's outputs and targets.

    Attributes:
        loss: A loss of torch, an inferred loss, or any callable.
        forward: The user's ``(model, batch) -> (outputs, targets)``, or None for the standard one.
        independence: Checks that the model treats each example by itself; None skips the check.
    """

    loss: Loss
    forward: Forward | None
    independence: BatchIndependenceCheck | None = field(default_factory=BatchIndependenceCheck)
    _schedule: DoublingSchedule = field(default_factory=DoublingSchedule, init=False)
    _ragged_verified: bool = field(default=False, init=False)

    @property
    def takes_context(self) -> bool:
        """True: the rows of context examples can be removed from outputs and targets."""
        return True

    @property
    def only_reads_targets(self) -> bool:
        """True if a loss of torch receives the batch's own targets."""
        return self.forward is None and not self.loss.checked

    @property
    def divides(self) -> bool:
        """True unless the loss has ``reduction="sum"``."""
        return self.loss.divides

    @property
    def ignored_class(self) -> int:
        """The loss's ``ignore_index``."""
        return self.loss.ignored_class

    def for_evaluation(self) -> "SupervisedObjective":
        """Return an objective with the same loss that does not check the model."""
        return SupervisedObjective(loss=self.loss, forward=self.forward, independence=None)

    def state_dict(self) -> dict[str, object]:
        """Return how often the loss was verified."""
        return {"schedule": self._schedule.state_dict(), "ragged": self._ragged_verified}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._schedule.load_state_dict(state["schedule"])
        self._ragged_verified = bool(state["ragged"])

    def prepare(self, model: nn.Module, batch: BatchTree, move: Move, *, cut: bool) -> None:
        """Check that the model treats each example by itself, if the batch is cut."""
        if not cut or self.independence is None:
            return
        self.independence.check(
            model, lambda pair: run_forward(self.forward, model, move(pair))[0], batch
        )

    def denominator(self, batch: BatchTree) -> float:
        """Return the terms of the targets; with ``forward``, the number of examples."""
        if not self.loss.divides:
            return 1
        if self.forward is not None:
            return size_of(batch)
        pieces = pieces_of(batch)
        return sum(self.loss.denominator(targets_of(piece), size_of(piece)) for piece in pieces)

    def run(self, passes: Passes, model: nn.Module, record: Record | None = None) -> None:
        """Run each micro-batch by itself."""
        # A mean of torch over elements that forward= returns needs elements of one shape.
        if self.forward is not None and not self.loss.checked and self.loss.divides:
            widths = TargetShapeCheck()
            passes.one_by_one(lambda mb: self._loss_of(model, mb, widths.of(mb.host, record)))
        else:
            passes.one_by_one(lambda mb: self._loss_of(model, mb, record))

    def verifier(self, cut: CutBatch) -> SplitCheck | None:
        """Return a check of a loss that was not recognized, in batches 1, 2, 4, 8 and so on.

        A mean over tokens equals a mean over examples as long as all examples have the same number
        of tokens. For this reason the first ragged batch is checked as well.
        """
        if not self.loss.checked:
            return None
        self._schedule.seen = cut.number
        if not self._schedule.is_due and (self._ragged_verified or not cut.ragged):
            return None

        def verified() -> None:
            self._schedule.passed += 1
            self._ragged_verified |= cut.ragged

        return SplitCheck(self.loss, cut.move, cut.micro_batches, verified)

    def check_finite(self, finite: Sequence[bool]) -> None:
        """Refuse an unknown loss that is finite for some micro-batches only."""
        if self.loss.checked:
            refuse_partly_finite(finite)

    def notes(self, *, cut: bool) -> Iterator[str]:
        """Yield what was inferred, and how a loss that autobatch does not know was verified."""
        yield from self.loss.notes()
        if not self.loss.checked or not cut:
            return
        if self._schedule.passed:
            yield (
                "autobatch does not know this loss. It compared the loss of whole batches with the "
                f"loss of their parts {self._schedule.passed} times, and both were equal: the loss "
                "is a mean over examples, or a sum and its number of terms"
            )
        else:
            yield (
                "autobatch does not know this loss and could not check it: it is taken to be a "
                "mean over examples"
            )

    def _loss_of(
        self, model: nn.Module, micro_batch: MicroBatch, record: Record | None
    ) -> tuple[Tensor, Terms]:
        """Return the summed loss, and its terms where only the loss can count them."""
        batch, host, context = micro_batch
        outputs, targets = own_rows(self.forward, model, batch, context)
        # A loss of torch needs no count here: the logical batch's targets have been counted.
        examples = 0 if self.only_reads_targets else size_of(host) - context
        if self.forward is not None and self.loss.checked:
            examples = _rows(outputs, targets, examples)
        if record is not None:
            record(outputs, targets)
        loss_sum, terms = self.loss.summed(outputs, targets, examples)
        if self.forward is not None and terms is None and self.loss.divides:
            terms = self.loss.terms(targets, examples)
        return loss_sum, terms


def _rows(outputs: BatchTree, targets: BatchTree, examples: int) -> int:
    """Return the number of rows that a ``forward`` returns; the examples if nothing has rows.

    Rows need not be examples: ``outputs[mask]`` has one row for each valid token.
    """
    try:
        return size_of((outputs, targets))
    except ValueError:
        return examples
