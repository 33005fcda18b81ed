"""Compare what a model gives for two examples, each alone and both together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from autobatch.data.micro_batches import largest_piece
from autobatch.data.tree import BatchTree, size_of, take
from autobatch.devices.oom import verdict_of
from autobatch.errors import InexactStepError
from autobatch.results.verdict import Verdict
from autobatch.training.model_state.evaluation_mode import undisturbed

Probed = TypeVar("Probed")


@dataclass(slots=True)
class DoublingSchedule:
    """Makes a check due in the 1st, 2nd, 4th, 8th, ... logical batch, as long as each one passes.

    Attributes:
        seen: Logical batches so far.
        passed: Checks that gave an answer.
    """

    seen: int = 0
    passed: int = 0

    @property
    def is_due(self) -> bool:
        """True if the latest batch has to be checked."""
        return self.seen >= 1 << self.passed

    def state_dict(self) -> dict[str, object]:
        """Return both counts."""
        return {"seen": self.seen, "passed": self.passed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self.seen, self.passed = int(state["seen"]), int(state["passed"])


def first_and_last(batch: BatchTree) -> BatchTree | None:
    """Return the first and the last example of the largest piece of a batch, as a batch of two.

    Returns:
        None if the piece holds a single example.
    """
    piece = largest_piece(batch)
    examples = size_of(piece)
    return take(piece, [0, examples - 1]) if examples > 1 else None


def alone_and_together(pair: BatchTree) -> tuple[BatchTree, BatchTree, BatchTree]:
    """Return the first of two examples, the second, and both."""
    return take(pair, [0]), take(pair, [1]), pair


def probe_pair(
    model: nn.Module,
    value_of: Callable[[BatchTree], Probed],
    pair: BatchTree,
    *,
    training: bool = False,
) -> tuple[Probed, Probed, Probed, Probed]:
    """Return the values of the first of two examples, the second, both, and both once more.

    The last two values are equal unless ``value_of`` draws random numbers. The model runs in
    evaluation mode without gradients; afterwards everything is as before.

    Args:
        model: In any mode.
        value_of: Runs the model on a batch.
        pair: A batch of two examples.
        training: Run in training mode, without dropout and batch statistics.
    """
    with undisturbed(model, training=training):
        first, second, both = map(value_of, alone_and_together(pair))
        return first, second, both, value_of(pair)


def probe_pair_in_either_mode(
    model: nn.Module, value_of: Callable[[BatchTree], Probed], pair: BatchTree
) -> tuple[Probed, Probed, Probed, Probed]:
    """Do the same in evaluation mode, or in training mode if the model fails in evaluation mode.

    A detector, for example, returns its losses in training mode only.

    Raises:
        Exception: If memory runs out, the step is not exact, or the model fails in both modes.
    """
    try:
        return probe_pair(model, value_of, pair)
    except Exception as error:
        if must_propagate(error):
            raise
    try:
        return probe_pair(model, value_of, pair, training=True)
    except Exception as error:
        error.add_note("a check ran the model on two examples, alone and together")
        raise


def must_propagate(error: Exception) -> bool:
    """Return True for an error that a check may not swallow: no memory, or an inexact step."""
    return isinstance(error, InexactStepError) or verdict_of(error) is Verdict.OUT_OF_MEMORY
