import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from streams import (
    Broken,
    Counted,
    Endless,
    FreshStream,
    Held,
    HeldStream,
    MapStyle,
    OnePassStream,
    Stream,
    WithoutLength,
    batches_of,
    drawn,
    flat,
    loader_sizes,
    numbers,
    ten,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from autobatch.data.rebatch import logical_batches
from autobatch.data.source import open_source
from autobatch.data.tree import BatchTree, join, size_of

LOADERS: list[tuple[str, Callable[[], DataLoader[Any]], int | None]] = [
    ("plain", lambda: DataLoader(ten(), batch_size=3), 10),
    ("drop_last", lambda: DataLoader(ten(), batch_size=3, drop_last=True), 9),
    ("shuffle", lambda: DataLoader(ten(), batch_size=3, shuffle=True), 10),
    ("sampler", lambda: DataLoader(ten(), batch_size=3, sampler=range(4)), 4),
    (
        "more than there are",
        lambda: DataLoader(
            ten(), batch_size=4, sampler=RandomSampler(ten(), replacement=True, num_samples=25)
        ),
        25,
    ),
    ("subset", lambda: DataLoader(Subset(ten(), [1, 3, 5]), batch_size=2), 3),
    (
        "batch sampler",
        lambda: DataLoader(ten(), batch_sampler=BatchSampler(range(7), 2, drop_last=True)),
        6,
    ),
    (
        "batches by hand",
        lambda: DataLoader(ten(), batch_sampler=[[0, 1], [2]]),
        None,
    ),
    ("sampler without length", lambda: DataLoader(ten(), batch_size=3, sampler=Endless()), None),
    ("batches of the dataset", lambda: DataLoader(ten(), batch_size=None), None),
    ("iterable", lambda: DataLoader(Stream(10), batch_size=3), None),
]


@pytest.mark.parametrize(
    ("make", "examples"), [row[1:] for row in LOADERS], ids=[row[0] for row in LOADERS]
)
def test_a_loader_says_how_many_examples_it_holds_where_its_kind_tells(
    make: Callable[[], DataLoader[Any]], examples: int | None
) -> None:
    source = open_source(make(), batch_size=5)
    assert source.examples == examples
    assert not source.one_pass
    if examples is not None:
        assert sum(len(numbers(batch)) for batch in source.epoch()) == examples


def test_a_dataset_is_shuffled_anew_each_epoch_and_read_at_the_batch_size() -> None:
    torch.manual_seed(0)
    dataset = ten()
    source = open_source(dataset, batch_size=4)
    first, second = ([numbers(batch) for batch in source.epoch()] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(10))
    assert first != second
    assert (source.examples, source.one_pass, source.owner) == (10, False, dataset)


def test_an_iterable_dataset_keeps_its_order() -> None:
    dataset = Stream(10)
    source = open_source(dataset, batch_size=4)
    assert [len(numbers(batch)) for batch in source.epoch()] == [4, 4, 2]
    assert flat(map(numbers, source.epoch())) == list(range(10))
    assert (source.examples, source.one_pass, source.owner) == (None, False, dataset)


@pytest.mark.parametrize(
    "data",
    [
        (torch.arange(10), np.arange(10.0)),
        {"x": torch.arange(10), "y": np.arange(10.0)},
    ],
    ids=["tuple", "mapping"],
)
@pytest.mark.parametrize("batch_size", [1, 4, 10, 99])
def test_data_in_memory_is_shuffled_by_a_permutation_that_a_seed_repeats(
    data: Any, batch_size: int
) -> None:
    def epoch(seed: int) -> list[BatchTree]:
        torch.manual_seed(seed)
        return list(open_source(data, batch_size=batch_size).epoch())

    def columns(batches: list[BatchTree]) -> list[list[int]]:
        whole = join(batches)
        members = whole.values() if isinstance(whole, dict) else whole
        return [member.tolist() for member in members]  # type: ignore[attr-defined]  # Tensors.

    first, second = columns(epoch(1))
    assert sorted(first) == list(range(10))
    assert second == first, "the members were shuffled apart"
    assert first != list(range(10))
    assert columns(epoch(1)) == [first, second]
    assert columns(epoch(2)) != [first, second]
    assert {type(batch) for batch in epoch(1)} == {type(data)}
    assert [size_of(batch) for batch in epoch(1)][:-1] == [batch_size] * (-(-10 // batch_size) - 1)
    source = open_source(data, batch_size=batch_size)
    assert (source.examples, source.one_pass, source.owner) == (10, False, None)


def test_each_epoch_of_data_in_memory_has_another_order() -> None:
    torch.manual_seed(0)
    source = open_source((torch.arange(50),), batch_size=50)
    assert numbers(next(source.epoch())) != numbers(next(source.epoch()))


def test_opening_data_reads_nothing_and_draws_nothing() -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    def seed() -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)

    seed()
    expected = drawn()
    seed()
    counted = Counted([2])
    every: list[Any] = [counted, ten(), Stream(3), FreshStream(3), (torch.arange(3),)]
    for data in (*every, DataLoader(ten(), shuffle=True), DataLoader(FreshStream(3))):
        open_source(data, batch_size=2)
    assert counted.pulled == 0
    assert drawn() == expected


def test_a_list_of_batches_is_read_as_it_is_with_arrays_as_tensors() -> None:
    batches = [(np.arange(3), ["a", "b", "c"]), (np.arange(2), ["d", "e"])]
    source = open_source(batches, batch_size=99)
    assert [numbers(batch) for batch in source.epoch()] == [[0, 1, 2], [0, 1]]
    assert (source.examples, source.one_pass, source.owner) == (5, False, batches)


@drawn
@given(sizes=loader_sizes)
def test_a_list_of_batches_holds_as_many_examples_as_they_have(sizes: list[int]) -> None:
    if sum(sizes):
        assert open_source(batches_of(sizes), batch_size=99).examples == sum(sizes)


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([torch.ones(3), "text"], "a batch must hold a tensor with a batch dimension, got str; "),
        ([(torch.ones(3), torch.ones(4))], "the tensors of a batch must agree in length"),
        ([torch.ones(0), torch.ones(0, 3)], "data is empty: it holds no example"),
    ],
)
def test_a_list_with_a_bad_batch_is_refused_at_once(batches: Any, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(text)}"):
        open_source(batches, batch_size=2)


def test_an_object_with_rows_and_a_length_is_a_dataset() -> None:
    torch.manual_seed(0)
    data = MapStyle()
    source = open_source(data, batch_size=4)
    first, second = ([numbers(batch) for batch in source.epoch()] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(flat(first)) == list(range(10))
    assert first != second
    assert (source.examples, source.one_pass, source.owner) == (10, False, data)


def test_an_object_with_rows_and_an_iteration_of_its_own_is_an_iterable_of_batches() -> None:
    class Both(MapStyle):
        def __iter__(self) -> Iterator[BatchTree]:
            yield torch.arange(3)

    source = open_source(Both(), batch_size=4)
    assert [numbers(batch) for batch in source.epoch()] == [[0, 1, 2]]
    assert source.examples is None


ONE_PASS: list[tuple[str, Callable[[], Any], bool]] = [
    ("iterator", lambda: iter([torch.ones(2)]), True),
    ("generator", lambda: (batch for batch in [torch.ones(2)]), True),
    ("holds an iterator", lambda: Held([torch.ones(2)]), True),
    ("stream that is its own iterator", lambda: OnePassStream(3), True),
    ("stream that holds an iterator", lambda: HeldStream(3), True),
    ("loader of an own iterator", lambda: DataLoader(OnePassStream(3), batch_size=2), True),
    ("loader of a held iterator", lambda: DataLoader(HeldStream(3), batch_size=2), True),
    ("loader of ready batches", lambda: DataLoader(HeldStream(3), batch_size=None), True),
    ("loader with an iterator of rows", lambda: DataLoader(ten(), sampler=iter(range(3))), True),
    (
        "loader with an iterator of batches",
        lambda: DataLoader(ten(), batch_sampler=iter([[0], [1]])),
        True,
    ),
    (
        "workers that stay",
        lambda: DataLoader(HeldStream(3), num_workers=1, persistent_workers=True),
        True,
    ),
    # Each epoch's workers begin with a copy of what the dataset holds.
    ("new workers", lambda: DataLoader(HeldStream(3), num_workers=1), False),
    ("list", lambda: [torch.ones(2)], False),
    ("generator function", lambda: Counted([2]), False),
    ("stream", lambda: Stream(3), False),
    ("stream with new iterators", lambda: FreshStream(3), False),
    ("loader of a stream", lambda: DataLoader(Stream(3)), False),
    ("loader of new iterators", lambda: DataLoader(FreshStream(3)), False),
    ("loader", lambda: DataLoader(ten()), False),
    ("dataset", ten, False),
    ("rows", MapStyle, False),
]


@pytest.mark.parametrize(
    ("make", "one_pass"), [row[1:] for row in ONE_PASS], ids=[row[0] for row in ONE_PASS]
)
def test_what_can_be_read_only_once_is_known(make: Callable[[], Any], one_pass: bool) -> None:
    assert open_source(make(), batch_size=1).one_pass is one_pass


@pytest.mark.parametrize("wrap", [lambda stream: stream, DataLoader])
def test_asking_whether_data_can_be_read_again_consumes_nothing(wrap: Any) -> None:
    for stream in (OnePassStream(3), HeldStream(3)):
        source = open_source(wrap(stream), batch_size=1)
        assert flat(map(numbers, source.epoch())) == [0, 1, 2]
    held = Held([torch.tensor([0, 1])])
    assert [numbers(batch) for batch in open_source(held, batch_size=1).epoch()] == [[0, 1]]


def test_a_loader_inside_an_iterable_is_not_started_to_ask() -> None:
    class Wrapped:
        def __init__(self, loader: DataLoader[Any]) -> None:
            self.loader = loader

        def __iter__(self) -> Iterator[BatchTree]:
            return iter(self.loader)

    loader = DataLoader(ten(), num_workers=1, persistent_workers=True)
    assert not open_source(Wrapped(loader), batch_size=1).one_pass
    assert loader._iterator is None


EMPTY: list[tuple[Any, str]] = [
    ((torch.ones(0, 3), torch.ones(0)), "data is empty: its tensors have length 0"),
    ({"x": np.ones((0, 3))}, "data is empty: its tensors have length 0"),
    (TensorDataset(torch.ones(0)), "data is empty: TensorDataset has length 0"),
    (MapStyle(0), "data is empty: MapStyle has length 0"),
    ([], "data is empty: [] holds no batch"),
    (
        DataLoader(TensorDataset(torch.ones(0)), batch_size=4),
        "data is empty: the DataLoader has 0 examples for batches of 4",
    ),
    (
        DataLoader(TensorDataset(torch.ones(3)), batch_size=4, drop_last=True),
        "data is empty: the DataLoader has 3 examples for batches of 4 and drop_last=True",
    ),
]


@pytest.mark.parametrize(("data", "text"), EMPTY, ids=[row[1] for row in EMPTY])
def test_empty_data_is_refused_before_anything_is_read(data: Any, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(text)}"):
        open_source(data, batch_size=2)


@pytest.mark.parametrize("data", [iter([]), Stream(0), DataLoader(Stream(0)), Counted([])])
def test_data_that_turns_out_empty_gives_no_window(data: Any) -> None:
    assert list(logical_batches(open_source(data, batch_size=2).epoch(), 4)) == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (torch.ones(4), "data must be a Dataset, a DataLoader, .*, got Tensor$"),
        (np.ones(4), "data must be .*, got ndarray$"),
        ("batches", "data must be .*, got str$"),
        (b"batches", "data must be .*, got bytes$"),
        (5, "data must be .*, got int$"),
        (None, "data must be .*, got NoneType$"),
        (WithoutLength(), "must have a length, got WithoutLength without __len__; make it an"),
        ((), "a tuple of data must hold tensors or arrays, got nothing; put batches into a list"),
        ({}, "a dict of data must hold tensors or arrays, got nothing"),
        ((torch.ones(2), [1, 2]), r"a tuple of data must hold .*, got \['list'\]; put batches"),
        ({"x": torch.ones(2), "y": "text"}, r"a dict of data must hold .*, got \['str'\]"),
    ],
)
def test_what_is_no_data_is_a_bad_type_with_the_way_out(data: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        open_source(data, batch_size=2)


def test_tensors_in_memory_must_agree_in_length() -> None:
    with pytest.raises(ValueError, match=r"agree in length .*, got shapes \(3, 2\), \(4,\)$"):
        open_source((torch.ones(3, 2), torch.ones(4)), batch_size=2)


def test_errors_of_the_data_pass_through() -> None:
    loader = DataLoader(Broken(), batch_size=2)
    windows = logical_batches(open_source(loader, batch_size=1).epoch(), 4)
    assert numbers(next(windows)) == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="the user's own error"):
        next(windows)


def test_errors_of_a_worker_pass_through() -> None:
    batches = iter(DataLoader(Broken(), batch_size=2, num_workers=1))
    assert isinstance(batches, _MultiProcessingDataLoaderIter)
    windows = logical_batches(open_source(batches, batch_size=1).epoch(), 4)
    assert numbers(next(windows)) == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="the user's own error"):
        next(windows)
    batches._shutdown_workers()  # Left to the garbage collector it takes 5 seconds.


def test_a_sequential_sampler_over_part_of_the_data_counts_that_part() -> None:
    part = SequentialSampler(range(3))
    assert open_source(DataLoader(ten(), batch_size=2, sampler=part), batch_size=1).examples == 3
