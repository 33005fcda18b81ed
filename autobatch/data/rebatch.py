"""Regroup batches of any sizes into logical batches of one size."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from autobatch.data.micro_batches import put_together
from autobatch.data.source import FreshBatches
from autobatch.data.tree import BatchTree, map_tensors, part, size_of


def logical_batches(
    batches: Iterable[BatchTree], desired: int, *, drop_last: bool = False
) -> Iterator[BatchTree]:
    """Yield logical batches of ``desired`` examples, cut and joined from ``batches`` in order.

    Each batch is read only when it is needed, so random augmentations are drawn at the same moment
    as in a plain loop over batches of ``desired`` examples. A logical batch is a ``RaggedBatch`` if
    its batches have different shapes and cannot be joined.

    Args:
        batches: Batches of any sizes. A part that waits for the next batch is copied, because an
            iterable may overwrite its memory; a part of ``FreshBatches`` is not copied.
        desired: Examples per logical batch.
        drop_last: Whether to drop a last logical batch with fewer examples.
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
