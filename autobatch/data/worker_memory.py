"""Estimate the host memory that the workers of a DataLoader fill with prefetched batches."""

from torch.utils.data import DataLoader

from autobatch.data.micro_batches import example_bytes, largest_piece
from autobatch.data.tree import BatchTree
from autobatch.units import count, format_bytes


def worker_memory_warning(batches: object, first: BatchTree, available_bytes: int) -> str:
    """Return a warning if prefetched batches may fill the free memory of the host, else ``""``.

    Each worker loads ``prefetch_factor`` batches ahead of the training. The batches take host
    memory, pinned or not.

    Args:
        batches: The iterable that training reads; only a ``DataLoader`` has known workers.
        first: A batch of it, for the bytes per example.
        available_bytes: Free memory of the host.
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
