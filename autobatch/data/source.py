"""Data of any kind, opened as a source of batches."""

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

from autobatch.data.normalize import BatchReader
from autobatch.data.tree import BatchTree, from_numpy, size_of, take


class MapStyle(Protocol):
    """A map-style dataset, which need not derive from torch's ``Dataset``."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> object: ...


Array: TypeAlias = Tensor | np.ndarray[Any, Any]
Data: TypeAlias = (
    Dataset[Any]
    | MapStyle
    | DataLoader[Any]
    | tuple[Array, ...]
    | Mapping[str, Array]
    | Iterable[BatchTree]
)

_ACCEPTED_DATA: Final = (
    "data must be a Dataset, a DataLoader, a tuple or mapping of tensors or arrays, "
    "or an iterable of batches"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Data that was opened for reading, as batches of any size.

    Attributes:
        batches: An iterable of batches; one iteration is one epoch.
        examples: Examples per epoch; None if the data does not report the number.
        one_pass: Whether the data can be iterated only once.
        owner: The user's object, which may hold random generators of its own; None for tensors.
        fresh: Whether each batch has memory of its own, which no later batch overwrites.
    """

    batches: Iterable[BatchTree]
    examples: int | None
    one_pass: bool
    owner: object
    fresh: bool

    def epoch(self) -> Iterator[BatchTree]:
        """Return an iterator over the normalized batches of one epoch."""
        batches = map(BatchReader(), self.batches)
        return FreshBatches(batches) if self.fresh else batches


class FreshBatches(Iterator[BatchTree]):
    """Batches with memory of their own, which reading the next batch does not overwrite."""

    def __init__(self, batches: Iterator[BatchTree]) -> None:
        self._batches = batches

    def __next__(self) -> BatchTree:
        return next(self._batches)


def open_source(data: Data, *, batch_size: int) -> Source:
    """Return ``data`` as a source of batches, without reading any batch.

    A DataLoader and an iterable of batches keep their own batches. A map-style dataset, tensors and
    arrays are shuffled anew in each epoch and read in batches of ``batch_size`` examples. Only a
    list of batches is read at once, to count its examples.

    Args:
        data: Any of ``Data``. An object with a length and ``__getitem__`` but without ``__iter__``
            is a map-style dataset.
        batch_size: Examples per batch, where the data has no batches of its own.

    Raises:
        TypeError: If batches cannot be read from ``data``.
        ValueError: If ``data`` is empty, or its tensors differ in length along dimension 0.
    """
    if isinstance(data, DataLoader):
        return _loaded(data, examples=_loader_examples(data), owner=data)
    if isinstance(data, Dataset) or _is_map_style(data):
        return _dataset(data, batch_size)
    if isinstance(data, tuple | Mapping):
        return _in_memory(data, batch_size)
    if isinstance(data, str | bytes | Tensor | np.ndarray) or not isinstance(data, Iterable):
        raise TypeError(f"{_ACCEPTED_DATA}, got {type(data).__name__}")
    if isinstance(data, Sized) and len(data) == 0:
        raise ValueError(f"data is empty: {data!r} holds no batch")
    examples = sum(map(size_of, map(BatchReader(), data))) if isinstance(data, list) else None
    if examples == 0:
        raise ValueError("data is empty: it holds no example")
    return Source(
        batches=data, examples=examples, one_pass=_is_one_pass(data), owner=data, fresh=False
    )


class _InMemory:
    """Tensors that each iteration shuffles anew."""

    def __init__(self, data: BatchTree, batch_size: int) -> None:
        self._data = data
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[BatchTree]:
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
    tensors = from_numpy(data)
    examples = size_of(tensors)
    if examples == 0:
        raise ValueError("data is empty: its tensors have length 0 along dimension 0")
    return Source(
        batches=_InMemory(tensors, batch_size),
        examples=examples,
        one_pass=False,
        owner=None,
        fresh=True,
    )


def _is_map_style(data: object) -> "TypeGuard[Dataset[Any]]":
    """Return whether this is a map-style dataset by its methods, and no iterable of batches."""
    return (
        isinstance(data, Sized)
        and hasattr(type(data), "__getitem__")
        and not isinstance(data, Iterable)
    )


def _dataset(dataset: "Dataset[Any]", batch_size: int) -> Source:
    if isinstance(dataset, IterableDataset):
        return _loaded(DataLoader(dataset, batch_size=batch_size), examples=None, owner=dataset)
    if not isinstance(dataset, Sized):
        raise TypeError(
            f"a Dataset must have a length, got {type(dataset).__name__} without __len__; "
            "make it an IterableDataset or pass a DataLoader"
        )
    if len(dataset) == 0:
        raise ValueError(f"data is empty: {type(dataset).__name__} has length 0")
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    return _loaded(loader, examples=len(dataset), owner=dataset)


def _loaded(loader: "DataLoader[Any]", *, examples: int | None, owner: object) -> Source:
    return Source(
        batches=loader,
        examples=examples,
        one_pass=_is_loader_one_pass(loader),
        owner=owner,
        fresh=_is_loader_fresh(loader),
    )


def _is_loader_one_pass(loader: "DataLoader[Any]") -> bool:
    if not isinstance(loader.dataset, IterableDataset):
        samplers = (loader.sampler, loader.batch_sampler)
        return any(isinstance(sampler, Iterator) for sampler in samplers)
    if loader.num_workers and not loader.persistent_workers:
        return False  # The workers of each epoch start with a copy of the dataset.
    return _is_one_pass(loader.dataset)


def _is_loader_fresh(loader: "DataLoader[Any]") -> bool:
    """Return whether each batch is certainly new memory: from torch, or from a worker process.

    A collate function of the user may return memory that the dataset overwrites later.
    """
    if type(loader).__iter__ is not DataLoader.__iter__:
        return False
    return loader.collate_fn is default_collate or loader.num_workers > 0


def _is_one_pass(data: Iterable[object]) -> bool:
    """Return whether all iterations share one iterator. Reads nothing."""
    if isinstance(data, Iterator):
        return True
    if inspect.isgeneratorfunction(type(data).__iter__):
        return False  # Each call makes a new generator.
    if any(isinstance(held, DataLoader) for held in getattr(data, "__dict__", {}).values()):
        return False  # Calling iter() would start the loader's workers.
    with _preserved_random_state():  # Calling iter() may draw a random order at once.
        return iter(data) is iter(data)


@contextmanager
def _preserved_random_state() -> Iterator[None]:
    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def _loader_examples(loader: "DataLoader[Any]") -> int | None:
    """Examples in all batches of the loader; None if its sampler does not report the number."""
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
