"""Which examples a trial repeats: the longest that can be found without reading all the data."""

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

_LOOKED_AT: Final = 256  # Examples, spread over the data.
_ALIKE: Final = 16  # So many of one length, and all are taken to be.
_SECONDS: Final = 1.0  # After which no further example is read.


def check_worst_case(worst_case: WorstCase) -> None:
    """Refuse what is neither one of the two words nor a batch.

    Raises:
        TypeError, ValueError: With the value that came.
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
    """Return what a trial repeats, and what that is, in words.

    Where a DataLoader reads its dataset in this process, up to 256 examples spread over it are
    looked at, for a second at most; 16 of one length are enough to know that there is only one.
    A dataset that workers read is left alone: what it opens here they would inherit.

    Args:
        source: The data. Its generators are put back by the caller.
        sample: Its first batch.
        worst_case: ``"longest"``, ``"first"``, or a batch to use instead.
    """
    if not isinstance(worst_case, str):
        return as_batch(worst_case), "the batch given as worst_case"
    if worst_case == "first" or not _is_readable(source.batches):
        return sample, "the first batch"
    loader = source.batches
    longest, seen = _longest(loader.dataset)
    if longest is None:
        return sample, f"the first batch; {seen} examples looked at are alike"
    try:
        batch = as_batch(loader.collate_fn([longest]))
        is_longer = example_bytes(batch) > example_bytes(largest_piece(sample))
    except Exception as error:  # noqa: BLE001  # It was written for batches: it makes pairs, say.
        return sample, f"the first batch; the longest of {seen} is none alone: {error!r:.200}"
    if not is_longer:
        return sample, f"the first batch; none of {seen} examples looked at is longer"
    return batch, f"the longest of {seen} examples looked at: {describe(batch)}"


def _is_readable(batches: object) -> "TypeGuard[DataLoader[Any]]":
    """Whether rows can be read here as the loader itself reads them, and any row may be."""
    return (
        type(batches) is DataLoader
        and not isinstance(batches.dataset, IterableDataset)
        and batches.num_workers == 0
        and type(batches.batch_sampler) is BatchSampler
        and type(batches.sampler) in (RandomSampler, SequentialSampler)
        and len(batches.sampler) == len(batches.dataset)  # type: ignore[arg-type]  # Map-style.
    )


def _longest(dataset: Any) -> tuple[object | None, int]:
    """The example with the most bytes, or None where those first seen are alike; and how many."""
    longest: object | None = None
    sizes: list[int] = []
    began = time.monotonic()
    for row in _spread(len(dataset), _LOOKED_AT):
        example = dataset[row]
        sizes.append(_extent(example))
        if sizes[-1] == max(sizes):
            longest = example
        alike = len(sizes) == _ALIKE and len(set(sizes)) == 1
        if alike or time.monotonic() - began > _SECONDS:
            break
    return (None if len(set(sizes)) == 1 else longest), len(sizes)


def _extent(example: object) -> int:
    """How long an example is, before it is collated: bytes, or 8 for each item of a list."""
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
    """Rows spread evenly over the data, in an order that soon has seen all parts of it."""
    count = min(examples, most)
    rows = [place * examples // count for place in range(count)]
    return [rows[place] for first in range(_ALIKE) for place in range(first, count, _ALIKE)]
