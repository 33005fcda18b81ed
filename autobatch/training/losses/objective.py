"""What training minimizes, and what a split of its batch has to respect."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from autobatch.data.tree import BatchTree
from autobatch.training.losses.loss import Terms

Move = Callable[[BatchTree], BatchTree]
Record = Callable[[BatchTree, BatchTree], None]


class MicroBatch(NamedTuple):
    """One micro-batch as a forward pass takes it.

    Attributes:
        batch: Examples on the device.
        host: The same examples on the host, where a count does not wait for the device.
        context: How many examples at the beginning belong to another micro-batch. A layer that
            normalizes by the batch needs them; the loss does not include them.
    """

    batch: BatchTree
    host: BatchTree
    context: int = 0


MicroBatchLoss = Callable[[MicroBatch], tuple[Tensor, Terms]]
Encode = Callable[[MicroBatch], tuple[BatchTree, BatchTree]]
FullBatchLoss = Callable[[BatchTree, BatchTree], Tensor]


class Passes(Protocol):
    """The two ways to run a logical batch in micro-batches.

    Training, evaluation and the check of kernels each implement both, and an objective picks one.
    """

    def one_by_one(self, loss: MicroBatchLoss) -> None:
        """Run each micro-batch by itself.

        Args:
            loss: Returns the summed loss of a micro-batch, and its terms where only the loss can
                count them.
        """

    def outputs_first(self, encode: Encode, loss: FullBatchLoss) -> None:
        """Compute the outputs of all micro-batches, then one loss over all of them.

        Args:
            encode: Returns outputs and targets of a micro-batch, one row an example.
            loss: Takes all outputs and all targets, and returns a scalar.
        """


class Verifier(Protocol):
    """Verifies that user code is additive, on the outputs and targets of one logical batch."""

    def record(self, outputs: BatchTree, targets: BatchTree) -> None:
        """Take the outputs and targets of one micro-batch."""

    def finish(self) -> None:
        """Verify the loss on what was recorded, after the last backward pass.

        Raises:
            InexactStepError: If a split changes the loss.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CutBatch:
    """A logical batch that is about to run in several micro-batches.

    Attributes:
        number: Counts the logical batches that were cut, from 1.
        micro_batches: The number of micro-batches.
        ragged: Whether examples differ in shape, so that the batch holds several tensors for one.
        move: Returns a copy of a batch on the device.
    """

    number: int
    micro_batches: int
    ragged: bool
    move: Move


class Objective(Protocol):
    """What training minimizes, and everything that other modules need to know about it.

    No module asks for the class of an objective. A new kind of loss derives from this protocol,
    overrides what differs from these defaults, and is complete.
    """

    @property
    def needs_full_batch(self) -> bool:
        """True if the outputs of all micro-batches are in memory at the same time."""
        return False

    @property
    def shows_outputs(self) -> bool:
        """True if outputs and targets are visible, so that metrics can be measured on them."""
        return True

    @property
    def takes_context(self) -> bool:
        """True if a single example may run together with others, because BatchNorm needs more."""
        return False

    @property
    def only_reads_targets(self) -> bool:
        """True if nothing writes to the targets, so that targets on the device need no copy."""
        return False

    @property
    def divides(self) -> bool:
        """True if the summed loss is divided by something; False for ``reduction="sum"``."""
        return True

    @property
    def ignored_class(self) -> int:
        """The class index that neither the mean of the loss nor accuracy counts."""
        return -100

    @property
    def forward(self) -> Callable[[nn.Module, Any], object] | None:
        """The user's function that runs the model on a batch; None for the standard one."""
        return None

    def for_evaluation(self) -> "Objective":
        """Return an objective for evaluation, which does not change the state of this one."""
        return self

    def state_dict(self) -> dict[str, object]:
        """Return what was found out about the loss, as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: ARG002  # No state here.
        """Continue from what ``state_dict`` returned."""
        return

    def prepare(self, model: nn.Module, batch: BatchTree, move: Move, *, cut: bool) -> None:  # noqa: ARG002
        """Check the model and the loss before the first backward pass over a logical batch.

        Args:
            model: On the device.
            batch: The logical batch, on the host or on the device.
            move: Returns a copy of a batch on the device.
            cut: Whether the batch will run in several micro-batches.

        Raises:
            InexactStepError: If a split would change the step.
        """
        return

    def denominator(self, batch: BatchTree) -> float:
        """Return what the summed loss of a logical batch is divided by; 0 if no term is valid.

        Where only the loss can count its terms, this is the number of examples, and the finished
        gradient is rescaled.
        """

    def run(self, passes: Passes, model: nn.Module, record: Record | None = None) -> None:
        """Run one logical batch.

        Args:
            passes: Runs the micro-batches in one of two ways.
            model: On the device.
            record: Takes the outputs and targets of each micro-batch, where there are some.
        """

    def verifier(self, cut: CutBatch) -> Verifier | None:  # noqa: ARG002  # Nothing to verify.
        """Return a check of the loss in this logical batch, or None if no check is due."""
        return None

    def check_finite(self, finite: Sequence[bool]) -> None:  # noqa: ARG002  # All of one kind.
        """Refuse a loss that is finite for the whole batch, but not for some micro-batches.

        Args:
            finite: For each micro-batch, whether its loss is finite.

        Raises:
            InexactStepError: If the loss is of this kind.
        """
        return

    def notes(self, *, cut: bool) -> Iterator[str]:  # noqa: ARG002  # Nothing to say.
        """Yield a sentence for each thing about the loss that a user should know.

        Args:
            cut: Whether logical batches ran in several micro-batches.
        """
        yield from ()
