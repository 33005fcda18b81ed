"""Datasets and streams of batches for the tests of data sources and of logical batches."""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
)

from autobatch.data.tree import BatchTree

drawn = settings(deadline=None, max_examples=60, derandomize=True)
loader_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8)
desired_sizes = st.integers(1, 12)


def batches_of(sizes: Sequence[int]) -> list[dict[str, object]]:
    """Batches of these sizes; every example has a number and a text of its own."""
    starts = itertools.accumulate(sizes, initial=0)
    return [
        {
            "x": torch.arange(start, start + size),
            "text": [f"text {row}" for row in range(start, start + size)],
        }
        for start, size in zip(starts, sizes, strict=False)
    ]


def rows(windows: Sequence[BatchTree]) -> tuple[list[int], list[str]]:
    """The examples of all windows, in order."""
    numbers: list[int] = []
    texts: list[str] = []
    for window in windows:
        assert isinstance(window, dict)
        numbers += window["x"].tolist()
        texts += window["text"]
    return numbers, texts


def numbers(batch: BatchTree) -> list[int]:
    """The examples of a batch that is a tensor, or begins with one."""
    found = batch[0] if isinstance(batch, list | tuple) else batch
    assert isinstance(found, Tensor)
    return found.flatten().tolist()


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


class Counted:
    """Batches that count how many were pulled."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.pulled = 0
        self._sizes = sizes

    def __iter__(self) -> Iterator[BatchTree]:
        for batch in batches_of(self._sizes):
            self.pulled += 1
            yield batch


class Stream(IterableDataset[Tensor]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(self.length)


class OnePassStream(Stream):
    """An IterableDataset that is its own iterator."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._rows: Iterator[Tensor] = iter(torch.arange(length))

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return next(self._rows)


class HeldStream(Stream):
    """An IterableDataset that hands out one iterator again and again."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.held: Iterator[Tensor] = iter(torch.arange(length))

    def __iter__(self) -> Iterator[Tensor]:
        return self.held


class FreshStream(Stream):
    """One whose new iterators are no generators, and draw random numbers at once."""

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.length)
        np.random.rand()
        random.random()
        rows: Iterator[Tensor] = iter(order)
        return rows


class Held:
    """Batches that can be read once, behind what looks like a list."""

    def __init__(self, batches: Iterable[BatchTree]) -> None:
        self.held = iter(batches)

    def __iter__(self) -> Iterator[BatchTree]:
        return self.held


class MapStyle:
    """A dataset of somebody who did not derive it from torch's."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> tuple[Tensor, float]:
        return torch.tensor(row), float(row)


class Refilled(Dataset[Any]):
    """Ready batches in one array, which is filled anew for each."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.memory = np.zeros(max(sizes), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> Any:
        if not row < len(self.sizes):
            raise IndexError(row)
        start, size = sum(self.sizes[:row]), self.sizes[row]
        self.memory[:size] = range(start, start + size)
        return self.memory[:size]


class WithoutLength(Dataset[Tensor]):
    def __getitem__(self, row: int) -> Tensor:
        return torch.tensor(row)


class Endless(Sampler[int]):
    """A sampler that does not know how long it is."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


class Broken(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> Tensor:
        if row >= 4:
            raise KeyError("the user's own error")
        return torch.tensor(row)


def ten() -> TensorDataset:
    return TensorDataset(torch.arange(10))
