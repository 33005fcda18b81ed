"""Batches for trials: real examples, repeated to any size."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from autobatch.data.micro_batches import largest_piece
from autobatch.data.normalize import BatchReader
from autobatch.data.source import Source
from autobatch.data.tree import BatchTree, size_of, take


def read_sample(source: Source) -> BatchTree:
    """Return the first batch of the source that holds an example.

    Errors that the data raises pass through. The caller restores random generators. The persistent
    workers of a DataLoader are neither started nor reset.

    Raises:
        ValueError: If no batch holds an example.
    """
    for batch in _begin(source):
        if size_of(batch):
            return batch
    raise ValueError("data is empty: it holds no example")


def repeated(sample: BatchTree, size: int) -> BatchTree:
    """Return a new batch of ``size`` examples: those of the sample, repeated in order.

    Only the piece with the most bytes per example is repeated if the sample is a ``RaggedBatch``.
    """
    piece = largest_piece(sample)
    length = size_of(piece)
    return take(piece, [row % length for row in range(size)])


def _begin(source: Source) -> Iterator[BatchTree]:
    loader = source.batches
    if type(loader) is DataLoader and loader.persistent_workers and loader.num_workers:
        # iter() would start or reset the persistent workers, which the user's loop may be using.
        # Without persistent_workers, iter() calls this method.
        own: Iterator[Any] = loader._get_iterator()
        return map(BatchReader(), own)
    return source.epoch()
