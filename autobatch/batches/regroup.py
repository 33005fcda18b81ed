"""Any data to a stream of logical batches."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from autobatch.batches.nest import Nest, from_numpy, join, part, size_of, take

Array: TypeAlias = Tensor | np.ndarray[Any, Any]
Data: TypeAlias = (
    Dataset[Any] | DataLoader[Any] | tuple[Array, ...] | Mapping[str, Array] | Iterable[Nest]
)

_WHAT_DATA_IS: Final = (
    "data must be a Dataset, a DataLoader, a tuple or mapping of tensors or arrays, "
    "or an iterable of batches"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Data, read as batches of any size.

    Attributes:
        batches: Iterating it once is one epoch.
        examples: How many an epoch holds, None where the data does not say.
        one_pass: Whether it can be iterated only once.
        owner: What the user handed over; its own random generators belong to it.
    """

    batches: Iterable[Nest]
    examples: int | None
    one_pass: bool
    owner: object

    def epoch(self) -> Iterator[Nest]:
        """Begin an epoch: batches as tensors."""
        return map(from_numpy, self.batches)


def open_source(data: Data, *, batch_size: int) -> Source:
    """Return ``data`` as a source; nothing is read yet.

    A DataLoader and an iterable keep the batches they make. A Dataset, and tensors or arrays, are
    shuffled anew each epoch and read ``batch_size`` at a time.

    Raises:
        TypeError: If it is nothing that batches can be read from.
        ValueError: If it is empty, or its tensors disagree in length.
    """
    if isinstance(data, DataLoader):
        return Source(batches=data, examples=_loader_examples(data), one_pass=False, owner=data)
    if isinstance(data, Dataset):
        return _dataset(data, batch_size)
    if isinstance(data, tuple | Mapping):
        return _in_memory(data, batch_size)
    if isinstance(data, str | bytes | Tensor | np.ndarray) or not isinstance(data, Iterable):
        raise TypeError(f"{_WHAT_DATA_IS}, got {type(data).__name__}")
    if isinstance(data, Sized) and len(data) == 0:
        raise ValueError(f"data is empty: {data!r} holds no batch")
    one_pass = isinstance(data, Iterator)
    return Source(batches=data, examples=None, one_pass=one_pass, owner=data)


def logical_batches(
    batches: Iterable[Nest], desired: int, *, drop_last: bool = False
) -> Iterator[Nest]:
    """Cut and join ``batches`` of any sizes to ``desired`` examples each, in order.

    Reads no batch before it is needed, so random augmentations are drawn when a plain loop over
    undivided batches would draw them. The last one may be shorter, unless ``drop_last``.
    """
    held: list[Nest] = []
    missing = desired
    for batch in batches:
        size, start = size_of(batch), 0
        while size - start >= missing:
            held.append(part(batch, start, start + missing) if missing < size else batch)
            start += missing
            yield join(held)
            held, missing = [], desired
        if start < size:
            held.append(part(batch, start, size) if start else batch)
            missing -= size - start
    if held and not drop_last:
        yield join(held)


class _InMemory:
    """Tensors that are shuffled anew at each iteration."""

    def __init__(self, data: Nest, batch_size: int) -> None:
        self._data = data
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Nest]:
        order = torch.randperm(size_of(self._data))
        for rows in order.split(self._batch_size):
            yield take(self._data, rows.tolist())


def _in_memory(data: tuple[Array, ...] | Mapping[str, Array], batch_size: int) -> Source:
    members: list[object] = list(data.values() if isinstance(data, Mapping) else data)
    odd = [
        type(member).__name__ for member in members if not isinstance(member, Tensor | np.ndarray)
    ]
    if odd or not members:
        raise TypeError(
            f"a {type(data).__name__} of data must hold tensors or arrays, got {odd or 'nothing'}; "
            "put batches into a list or a DataLoader"
        )
    nest = from_numpy(data)
    examples = size_of(nest)
    if examples == 0:
        raise ValueError("data is empty: its tensors have length 0 along dimension 0")
    return Source(
        batches=_InMemory(nest, batch_size), examples=examples, one_pass=False, owner=None
    )


def _dataset(dataset: "Dataset[Any]", batch_size: int) -> Source:
    if isinstance(dataset, IterableDataset):
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size)
        one_pass = isinstance(dataset, Iterator)
        return Source(batches=loader, examples=None, one_pass=one_pass, owner=dataset)
    if not isinstance(dataset, Sized):
        raise TypeError(
            f"a Dataset must have a length, got {type(dataset).__name__} without __len__; "
            "make it an IterableDataset or pass a DataLoader"
        )
    if len(dataset) == 0:
        raise ValueError(f"data is empty: {type(dataset).__name__} has length 0")
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    return Source(batches=loader, examples=len(dataset), one_pass=False, owner=dataset)


def _loader_examples(loader: "DataLoader[Any]") -> int | None:
    """How many examples the loader's own batches hold, where its kind says."""
    sampler = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or type(sampler) is not BatchSampler:
        return None
    if not isinstance(sampler.sampler, Sized):
        return None
    examples = len(sampler.sampler)
    kept = examples - examples % sampler.batch_size if sampler.drop_last else examples
    if kept == 0:
        raise ValueError(
            f"data is empty: the DataLoader has {examples} examples for batches of "
            f"{sampler.batch_size}" + (" and drop_last=True" if sampler.drop_last else "")
        )
    return kept
