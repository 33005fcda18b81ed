"""A window's outputs, a bounded part of them, kept for the loss check."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from autobatch.data.micro_batches import pieces_of, put_together
from autobatch.data.tree import BatchTree, describe, map_tensors, part, size_of, tensors
from autobatch.devices.base import HOST
from autobatch.errors import InexactStepError
from autobatch.training.losses.loss import Loss
from autobatch.training.losses.objective import Move, Record, Verifier
from autobatch.training.losses.split_check import check_splits

CHECKED_BYTES: Final = 4 * 2**20  # The loss check keeps at most so many bytes of a window,
LARGEST_ROW_BYTES: Final = 2**29  # and one example of the first two micro-batches if not larger.


@dataclass(slots=True)
class SplitCheck(Verifier):
    """Gathers outputs and targets, and holds the loss to the law.

    Attributes:
        loss: That was not recognised.
        move: Brings them back to the device.
        micro_batches: How many the window has.
        verified: Called when the loss was shown to be exact in parts.
    """

    loss: Loss
    move: Move
    micro_batches: int
    verified: Callable[[], None]
    outputs: list[BatchTree] = field(default_factory=list)
    targets: list[BatchTree] = field(default_factory=list)

    def record(self, outputs: BatchTree, targets: BatchTree) -> None:
        """Keep the first rows of one micro-batch on the host, and off the device's meter."""
        examples = _common_length(outputs, targets)
        row_bytes = sum(t.nbytes for t in (*tensors(outputs), *tensors(targets))) / examples
        rows = int(CHECKED_BYTES / self.micro_batches / max(row_bytes, 1))
        if len(self.outputs) < 2 and row_bytes <= LARGEST_ROW_BYTES:
            rows = max(rows, 1)
        if rows:
            with _disable_current_modes():  # Cut as one: there may be no targets.
                kept = _on_host(part((outputs, targets), 0, min(rows, examples)))
            assert isinstance(kept, tuple), "a part of a pair is a pair"
            self.outputs.append(kept[0])
            self.targets.append(kept[1])

    def finish(self) -> None:
        """Judge the loss, when the activations are gone: no search has rehearsed this.

        Raises:
            InexactStepError: If splitting changes the loss.
        """
        if self._agrees():
            self.verified()

    def _agrees(self) -> bool:
        """True if the loss was shown to be exact in parts, False if it could not be judged."""
        if len(self.outputs) < 2:
            return False
        try:
            outputs = list(map(self.move, self.outputs))
            targets = list(map(self.move, self.targets))
        except (torch.OutOfMemoryError, MemoryError):
            return False
        try:
            # Ragged pieces of text stay apart: the law is asked of the largest one.
            together = put_together(list(zip(outputs, targets, strict=True)))
        except ValueError:
            return check_splits(self.loss, outputs, targets)  # Which says what is wrong.
        pieces = pieces_of(together)
        if len(pieces) > 1 and self.loss.is_mean:
            raise InexactStepError(
                f"the rows that this loss takes the mean of differ in shape between batches, as "
                f"{' and '.join(map(describe, pieces[:2]))}: it may be over examples or over what "
                "they hold, such as tokens, and nothing tells which; return (sum, terms)"
            )
        pair = max(pieces, key=size_of)
        assert isinstance(pair, tuple), "outputs and targets were put together as pairs"
        return check_splits(self.loss, [pair[0]], [pair[1]])


class TargetShapeCheck:
    """Holds what ``forward=`` compares to one width, for each width of what it is given.

    A model that pads its outputs to the longest of a micro-batch (``pad_packed_sequence``) pads
    them to the longest of all where nothing is cut: a mean over their elements is another one then.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[torch.Size, ...], torch.Size] = {}

    def of(self, host: BatchTree, record: Record | None) -> Record:
        """Return what looks at one micro-batch's targets, and then passes them to ``record``."""

        def looked(outputs: BatchTree, targets: BatchTree) -> None:
            self._look(host, targets)
            if record is not None:
                record(outputs, targets)

        return looked

    def _look(self, host: BatchTree, targets: BatchTree) -> None:
        # Integers are classes, of which some are ignored.
        if not isinstance(targets, Tensor) or not targets.is_floating_point():
            return
        given = tuple(tensor.shape[1:] for tensor in tensors(host))
        width = targets.shape[1:]
        before = self._seen.setdefault(given, width)
        if before != width:
            raise InexactStepError(
                "the targets that forward= returns differ in shape between micro-batches, "
                f"{list(before)} and {list(width)} an example, and the loss is a mean over their "
                "elements: undivided, all would have the widest; return one shape, or pass a loss "
                "that returns (sum, terms) of what is valid"
            )


def refuse_partly_finite(finite: Sequence[bool]) -> None:
    """Refuse an unknown loss that is a number for some micro-batches only.

    Raises:
        InexactStepError: With how many.
    """
    if any(finite) and not all(finite):
        raise InexactStepError(
            f"the loss is not finite for {len(finite) - sum(finite)} of {len(finite)} "
            "micro-batches, as a mean over valid terms is where a micro-batch has none; return "
            "(sum, terms)"
        )


def _common_length(outputs: BatchTree, targets: BatchTree) -> int:
    try:
        return size_of((outputs, targets))
    except ValueError:
        raise InexactStepError(
            "a loss that autobatch does not know can be split only where outputs and targets hold "
            "one row an example along dimension 0, got outputs "
            f"{describe(outputs)} and targets {describe(targets)}; return such outputs from the "
            "model or from forward=, or use a loss of torch"
        ) from None


def _on_host(nest: BatchTree) -> BatchTree:
    return map_tensors(lambda t: t.detach().to(HOST, copy=True), nest)
