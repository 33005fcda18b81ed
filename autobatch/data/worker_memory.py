"""How much of the host's memory a loader's workers fill with batches that nobody has asked for."""

from torch.utils.data import DataLoader

from autobatch.data.micro_batches import example_bytes, largest_piece
from autobatch.data.tree import BatchTree
from autobatch.units import count, format_bytes


def crowded(batches: object, first: BatchTree, available_bytes: int) -> str:
    """Return a warning where a loader's workers may fill what memory the host has left, or ``""``.

    Each worker loads batches ahead of the training, ``prefetch_factor`` of them; pinned or not,
    they lie in the host's memory.

    Args:
        batches: What is read: only of a ``DataLoader`` it is known.
        first: Examples of it.
        available_bytes: What the host has left.
    """
    if not isinstance(batches, DataLoader) or batches.batch_size is None:
        return ""
    ahead = batches.num_workers * (batches.prefetch_factor or 0)
    each_bytes = int(batches.batch_size * example_bytes(largest_piece(first)))
    if ahead * each_bytes <= available_bytes:
        return ""
    return (
        f"{count(batches.num_workers, 'worker')} of the loader may hold {ahead} batches of "
        f"{batches.batch_size} examples ahead, {format_bytes(ahead * each_bytes)} in all, and the "
        f"host has {format_bytes(available_bytes)} left: lower its num_workers, prefetch_factor or "
        "batch_size; desired examples are joined from any batch_size"
    )
