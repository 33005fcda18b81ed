"""Assemble logical batches from batches, and cut logical batches into micro-batches."""

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from autobatch.data.markers import RaggedBatch
from autobatch.data.tree import BatchTree, RaggedError, cut, join, per_example, size_of, tensors
from autobatch.results.plan import even_sizes


def put_together(batches: Sequence[BatchTree]) -> BatchTree:
    """Return one logical batch with the examples of all batches, in order.

    Batches whose shapes agree beyond dimension 0 are joined. The others become the pieces of a
    ``RaggedBatch``.

    Raises:
        ValueError: If the batches differ in more than their shapes beyond dimension 0.
    """
    try:
        return join(batches)
    except RaggedError:
        pass
    return RaggedBatch(tuple(join(list(alike)) for _, alike in groupby(batches, _row_shapes)))


def pieces_of(batch: BatchTree) -> Sequence[BatchTree]:
    """Return the pieces of a ragged batch; any other batch is its own only piece."""
    return batch.pieces if isinstance(batch, RaggedBatch) else (batch,)


def cut_to(
    batch: BatchTree, tolerable: int, multiple_of: int = 1
) -> tuple[list[BatchTree], tuple[int, ...]]:
    """Return the micro-batches of a logical batch, and their sizes.

    Each piece is cut evenly into as few micro-batches as possible.

    Args:
        batch: At least one example, on any device; the micro-batches are views of it.
        tolerable: The most examples in a micro-batch.
        multiple_of: Every size but the last of each piece is a multiple of this.
    """
    micro_batches: list[BatchTree] = []
    sizes: tuple[int, ...] = ()
    for piece in pieces_of(batch):
        evenly = even_sizes(size_of(piece), tolerable, multiple_of)
        micro_batches += cut(piece, evenly)
        sizes += evenly
    return micro_batches, sizes


def largest_piece(batch: BatchTree) -> BatchTree:
    """Return the piece with the most bytes per example."""
    return max(pieces_of(batch), key=example_bytes)


def _row_shapes(batch: BatchTree) -> list[tuple[int, ...]]:
    return [tuple(item.shape[1:]) for item in per_example(batch) if isinstance(item, Tensor)]


def example_bytes(batch: BatchTree) -> float:
    """Return the mean number of bytes per example, without ``Shared`` values."""
    held = sum(tensor.nbytes for item in per_example(batch) for tensor in tensors(item))
    return held / size_of(batch)
