"""Logical batches, of one piece or several: put together, cut into micro-batches."""

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from autobatch.data.markers import RaggedBatch
from autobatch.data.tree import BatchTree, RaggedError, counted, cut, join, size_of, tensors
from autobatch.results.plan import even_sizes


def put_together(batches: Sequence[BatchTree]) -> BatchTree:
    """Return one logical batch of all examples, in order, in as few pieces as can be.

    Ragged batches stay apart, and only they; a single piece is an ordinary batch.

    Raises:
        ValueError: If they differ in another way than in shape beyond dimension 0.
    """
    try:
        return join(batches)
    except RaggedError:
        pass
    return RaggedBatch(tuple(join(list(alike)) for _, alike in groupby(batches, _row_shapes)))


def pieces_of(batch: BatchTree) -> Sequence[BatchTree]:
    """Return the pieces of a logical batch; of an ordinary one that is itself."""
    return batch.pieces if isinstance(batch, RaggedBatch) else (batch,)


def cut_to(
    batch: BatchTree, tolerable: int, multiple_of: int = 1
) -> tuple[list[BatchTree], tuple[int, ...]]:
    """Return the micro-batches of a logical batch, and their sizes.

    Each piece is cut evenly into as few as can be, so ragged pieces need more than one batch does.

    Args:
        batch: At least one example, on the host or wherever it is; the parts are views.
        tolerable: The most examples of a micro-batch.
        multiple_of: What those of a piece, but the last, are multiples of.
    """
    micro_batches: list[BatchTree] = []
    sizes: tuple[int, ...] = ()
    for piece in pieces_of(batch):
        evenly = even_sizes(size_of(piece), tolerable, multiple_of)
        micro_batches += cut(piece, evenly)
        sizes += evenly
    return micro_batches, sizes


def largest_piece(batch: BatchTree) -> BatchTree:
    """Return the piece with the most bytes an example: what a trial repeats."""
    return max(pieces_of(batch), key=example_bytes)


def _row_shapes(batch: BatchTree) -> list[tuple[int, ...]]:
    return [tuple(item.shape[1:]) for item in counted(batch) if isinstance(item, Tensor)]


def example_bytes(batch: BatchTree) -> float:
    """Return the bytes of an example, on average.

    What is shared is left out: it is the same in all pieces, however few examples they hold.
    """
    held = sum(tensor.nbytes for item in counted(batch) for tensor in tensors(item))
    return held / size_of(batch)
