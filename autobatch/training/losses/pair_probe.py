"""When a check is due, and the two examples that a check compares alone and together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autobatch.data.micro_batches import largest_piece
from autobatch.data.tree import BatchTree, part, size_of, take


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
        """True if the batch that was seen last has to be checked."""
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


def alone_and_together(pair: BatchTree) -> tuple[BatchTree, BatchTree, BatchTree, BatchTree]:
    """Return the first of two examples, the second, both, and both once more.

    The two last ones tell code that draws random numbers from code that mixes examples.
    """
    return part(pair, 0, 1), part(pair, 1, 2), pair, pair
