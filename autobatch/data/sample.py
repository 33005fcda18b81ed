"""The batch of a trial: real examples, repeated to any size."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from autobatch.data.micro_batches import largest_piece
from autobatch.data.normalize import BatchReader
from autobatch.data.source import Source
from autobatch.data.tree import BatchTree, size_of, take


def read_sample(source: Source) -> BatchTree:
    """Return the source's first batch that holds an example.

    Errors of the data itself pass through. The caller restores random generators; the workers
    that a DataLoader keeps are not touched.

    Raises:
        ValueError: If the source ends before.
    """
    for batch in _begin(source):
        if size_of(batch):
            return batch
    raise ValueError("data is empty: it holds no example")


def repeated(sample: BatchTree, size: int) -> BatchTree:
    """Return ``size`` examples: the sample's, over and over, copied.

    Of a sample in pieces only the one with the most bytes an example is repeated.
    """
    piece = largest_piece(sample)
    length = size_of(piece)
    return take(piece, [row % length for row in range(size)])


def _begin(source: Source) -> Iterator[BatchTree]:
    loader = source.batches
    if type(loader) is DataLoader and loader.persistent_workers and loader.num_workers:
        # iter() would start, or reset, the workers that the user's own iteration goes on with.
        # This is the method that iter() calls without persistent_workers.
        own: Iterator[Any] = loader._get_iterator()
        return map(BatchReader(), own)
    return source.epoch()
