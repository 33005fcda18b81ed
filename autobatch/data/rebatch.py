"""Regroup batches of any sizes into logical batches of one size."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from autobatch.data.micro_batches import put_together
from autobatch.data.source import FreshBatches
from autobatch.data.tree import BatchTree, map_tensors, part, size_of


def logical_batches(
    batches: Iterable[BatchTree], desired: int, *, drop_last: bool = False
) -> Iterator[BatchTree]:
    """Cut and join ``batches`` of any sizes to ``desired`` examples each, in order.

    Reads no batch before it is needed, so random augmentations are drawn when a plain loop over
    undivided batches would draw them. The last one may be shorter, unless ``drop_last``. Where
    batches are ragged, so that they cannot be joined, a logical batch is one in ``RaggedBatch``.

    A part that waits for the next batch is copied, for an iterable may fill the same memory anew;
    only where ``batches`` is an epoch of a source that is known to be fresh, it is not.
    """
    fresh = isinstance(batches, FreshBatches)
    held: list[BatchTree] = []
    missing = desired
    for batch in batches:
        size, start = size_of(batch), 0
        while size - start >= missing:
            held.append(part(batch, start, start + missing) if missing < size else batch)
            start += missing
            yield put_together(held)
            held, missing = [], desired
        if start < size:
            rest = part(batch, start, size) if start else batch
            held.append(rest if fresh else map_tensors(Tensor.clone, rest))
            missing -= size - start
    if held and not drop_last:
        yield put_together(held)
