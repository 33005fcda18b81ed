"""Choose the examples that trials repeat: the longest ones found in a sample of the data."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeGuard

import numpy as np
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from autobatch.data.micro_batches import example_bytes, largest_piece
from autobatch.data.normalize import as_batch
from autobatch.data.source import Source
from autobatch.data.tree import BatchTree, describe, size_of

WorstCase = Literal["longest", "first"] | BatchTree

_MOST_READ: Final = 256  # Examples, spread over the data.
_ALIKE: Final = 16  # If the first 16 have one length, all are assumed to have it.
_SECONDS: Final = 1.0  # No example is read later.


def check_worst_case(worst_case: WorstCase) -> None:
    """Raise unless ``worst_case`` is ``"longest"``, ``"first"`` or a batch of examples.

    Raises:
        TypeError, ValueError: With the invalid value.
    """
    if isinstance(worst_case, str):
        if worst_case not in ("longest", "first"):
            raise ValueError(
                f'worst_case must be "longest", "first" or a batch, got {worst_case!r}'
            )
    elif size_of(as_batch(worst_case)) == 0:
        raise ValueError(f"worst_case must hold an example, got {describe(worst_case)}")


def worst_case_of(
    source: Source, sample: BatchTree, worst_case: WorstCase
) -> tuple[BatchTree, str]:
    """Return the batch whose examples trials repeat, and a description of it.

    ``"longest"`` reads up to 256 examples spread over the dataset, for at most a second, and stops
    after 16 examples of one length. It reads only a dataset that a DataLoader reads in this
    process; worker processes would inherit files that the dataset opens here.

    Args:
        source: The data. The caller restores its random generators.
        sample: The first batch of the data.
        worst_case: ``"longest"``, ``"first"``, or a batch to use instead.
    """
    if not isinstance(worst_case, str):
        return as_batch(worst_case), "the batch given as worst_case"
    if worst_case == "first" or not _is_readable(source.batches):
        return sample, "the first batch"
    loader = source.batches
    longest, seen = _longest(loader.dataset)
    if longest is None:
        return sample, f"the first batch; {seen} examples read have one size"
    try:
        batch = as_batch(loader.collate_fn([longest]))
        is_longer = example_bytes(batch) > example_bytes(largest_piece(sample))
    except Exception as error:  # noqa: BLE001  # The collate function may need a whole batch.
        reason = f"the longest of {seen} examples cannot be collated alone: {error!r:.200}"
        return sample, f"the first batch; {reason}"
    if not is_longer:
        return sample, f"the first batch; none of {seen} examples read is longer"
    return batch, f"the longest of {seen} examples read: {describe(batch)}"


def _is_readable(batches: object) -> "TypeGuard[DataLoader[Any]]":
    """Return whether this process can read any row of the dataset as the loader would read it."""
    return (
        type(batches) is DataLoader
        and not isinstance(batches.dataset, IterableDataset)
        and batches.num_workers == 0
        and type(batches.batch_sampler) is BatchSampler
        and type(batches.sampler) in (RandomSampler, SequentialSampler)
        and len(batches.sampler) == len(batches.dataset)  # type: ignore[arg-type]  # Map-style.
    )


def _longest(dataset: Any) -> tuple[object | None, int]:
    """The example with the most bytes, or None if all are alike; and how many were read."""
    longest: object | None = None
    sizes: list[int] = []
    began = time.monotonic()
    for row in _spread(len(dataset), _MOST_READ):
        example = dataset[row]
        sizes.append(_extent(example))
        if sizes[-1] == max(sizes):
            longest = example
        alike = len(sizes) == _ALIKE and len(set(sizes)) == 1
        if alike or time.monotonic() - began > _SECONDS:
            break
    return (None if len(set(sizes)) == 1 else longest), len(sizes)


def _extent(example: object) -> int:
    """The length of an example before collation: its bytes, or 8 for each number in a list."""
    if isinstance(example, Tensor | np.ndarray):
        return int(example.nbytes)
    if isinstance(example, str | bytes):
        return len(example)
    if isinstance(example, Mapping):
        return sum(map(_extent, example.values()))
    if isinstance(example, list | tuple):
        return sum(_extent(item) or 8 for item in example)
    return 0


def _spread(examples: int, most: int) -> Sequence[int]:
    """Rows spread evenly over the data, in an order whose start already covers all parts."""
    count = min(examples, most)
    rows = [place * examples // count for place in range(count)]
    return [rows[place] for first in range(_ALIKE) for place in range(first, count, _ALIKE)]
