"""Record a bounded part of the outputs of a logical batch, to verify the loss on them."""

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

CHECKED_BYTES: Final = 4 * 2**20
"""The most bytes of a logical batch that a check records, if two examples are not larger."""

LARGEST_ROW_BYTES: Final = 2**29
"""The largest example of which the first two micro-batches record one all the same."""


@dataclass(slots=True)
class SplitCheck(Verifier):
    """Records outputs and targets of a logical batch, and verifies that the loss is additive.

    Attributes:
        loss: A loss that autobatch does not know.
        move: Returns a copy of a batch on the device.
        micro_batches: The number of micro-batches of the logical batch.
        verified: Called if splits give the loss of the whole.
    """

    loss: Loss
    move: Move
    micro_batches: int
    verified: Callable[[], None]
    outputs: list[BatchTree] = field(default_factory=list)
    targets: list[BatchTree] = field(default_factory=list)

    def record(self, outputs: BatchTree, targets: BatchTree) -> None:
        """Keep the first rows of one micro-batch on the host."""
        examples = _common_length(outputs, targets)
        row_bytes = sum(t.nbytes for t in (*tensors(outputs), *tensors(targets))) / examples
        rows = int(CHECKED_BYTES / self.micro_batches / max(row_bytes, 1))
        if len(self.outputs) < 2 and row_bytes <= LARGEST_ROW_BYTES:
            rows = max(rows, 1)
        if rows:
            with _disable_current_modes():  # Cut together: there may be no targets.
                kept = _on_host(part((outputs, targets), 0, min(rows, examples)))
            assert isinstance(kept, tuple), "a part of a pair is a pair"
            self.outputs.append(kept[0])
            self.targets.append(kept[1])

    def finish(self) -> None:
        """Verify the loss. No activations are in memory then, since no trial includes this check.

        Raises:
            InexactStepError: If splitting changes the loss.
        """
        if self._is_verified():
            self.verified()

    def _is_verified(self) -> bool:
        """Whether splits give the loss of the whole; False if the outputs allow no answer."""
        if len(self.outputs) < 2:
            return False
        try:
            outputs = list(map(self.move, self.outputs))
            targets = list(map(self.move, self.targets))
        except (torch.OutOfMemoryError, MemoryError):
            return False
        try:
            # Rows of several shapes stay in several pieces, of which the largest is checked.
            together = put_together(list(zip(outputs, targets, strict=True)))
        except ValueError:
            return check_splits(self.loss, outputs, targets)  # The check raises the error.
        pieces = pieces_of(together)
        if len(pieces) > 1 and self.loss.is_mean:
            raise InexactStepError(
                f"the rows that this loss averages differ in shape between batches, as "
                f"{' and '.join(map(describe, pieces[:2]))}: the mean may be over examples or over "
                "their elements, such as tokens, and autobatch cannot tell which; return (sum, "
                "terms)"
            )
        pair = max(pieces, key=size_of)
        assert isinstance(pair, tuple), "outputs and targets were put together as pairs"
        return check_splits(self.loss, [pair[0]], [pair[1]])


class TargetShapeCheck:
    """Refuses targets from ``forward=`` that differ in shape for inputs of the same shape.

    A model that pads its outputs to the longest example (``pad_packed_sequence``) pads them
    differently in a micro-batch and in the undivided batch. A mean over the elements then differs.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[torch.Size, ...], torch.Size] = {}

    def of(self, host: BatchTree, record: Record | None) -> Record:
        """Return a function that checks a micro-batch's targets and then calls ``record``."""

        def checked(outputs: BatchTree, targets: BatchTree) -> None:
            self._check(host, targets)
            if record is not None:
                record(outputs, targets)

        return checked

    def _check(self, host: BatchTree, targets: BatchTree) -> None:
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
                "elements: in the undivided batch all would have the widest shape; return one "
                "shape, or pass a loss that returns (sum, terms) of the valid elements"
            )


def refuse_partly_finite(finite: Sequence[bool]) -> None:
    """Refuse a loss that autobatch does not know and that is finite for some micro-batches only.

    Raises:
        InexactStepError: If so; a mean over valid terms would be finite for the whole batch.
    """
    if any(finite) and not all(finite):
        raise InexactStepError(
            f"the loss is not finite for {len(finite) - sum(finite)} of {len(finite)} "
            "micro-batches. A mean over valid terms is not finite where a micro-batch has no valid "
            "term; return (sum, terms)"
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
