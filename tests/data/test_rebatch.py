import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import (
    Counted,
    MapStyle,
    Refilled,
    Stream,
    batches_of,
    desired_sizes,
    drawn,
    loader_sizes,
    numbers,
    rows,
    ten,
)
from torch import Tensor
from torch.utils.data import (
    DataLoader,
)

from autobatch.data.micro_batches import pieces_of
from autobatch.data.rebatch import logical_batches
from autobatch.data.source import Source, open_source
from autobatch.data.tree import BatchTree, describe, size_of


@drawn
@given(sizes=loader_sizes, desired=desired_sizes)
def test_the_windows_are_of_the_desired_size_and_hold_all_examples_in_order(
    sizes: list[int], desired: int
) -> None:
    windows = list(logical_batches(batches_of(sizes), desired))
    assert rows(windows) == rows(batches_of(sizes))
    whole, rest = divmod(sum(sizes), desired)
    assert [size_of(window) for window in windows] == [desired] * whole + [rest] * bool(rest)


@drawn
@given(sizes=loader_sizes, desired=desired_sizes)
def test_a_short_last_window_can_be_dropped_and_nothing_else_is(
    sizes: list[int], desired: int
) -> None:
    every = list(logical_batches(batches_of(sizes), desired))
    kept = list(logical_batches(batches_of(sizes), desired, drop_last=True))
    assert rows(kept) == rows([window for window in every if size_of(window) == desired])


@drawn
@given(sizes=loader_sizes, desired=desired_sizes)
def test_no_batch_is_read_before_it_is_needed(sizes: list[int], desired: int) -> None:
    source = Counted(sizes)
    windows = logical_batches(source, desired)
    assert source.pulled == 0
    for taken in range(1, sum(sizes) // desired + 1):
        next(windows)
        needed = next(
            count
            for count, total in enumerate(itertools.accumulate(sizes), start=1)
            if total >= taken * desired
        )
        assert source.pulled == needed


def test_the_control_reads_ahead_and_is_seen() -> None:
    source = Counted([4, 4, 4])
    next(logical_batches(list(source), 4))
    assert source.pulled == 3


def test_a_batch_that_is_a_window_is_handed_on_as_it_is() -> None:
    batches = batches_of([4, 4])
    assert all(map(lambda *pair: pair[0] is pair[1], logical_batches(batches, 4), batches))


def test_a_window_inside_one_batch_is_a_view_of_it() -> None:
    (batch,) = batches_of([6])
    memory = batch["x"]
    assert isinstance(memory, Tensor)
    windows = list(logical_batches([batch], 2))
    pointers = [window["x"].untyped_storage().data_ptr() for window in windows]  # type: ignore[index]  # A dict.
    assert pointers == [memory.untyped_storage().data_ptr()] * 3


def refilling_arrays(sizes: Sequence[int]) -> Iterator[BatchTree]:
    refilled = Refilled(sizes)
    for row in range(len(sizes)):
        yield {"x": refilled[row], "inside": [refilled[row][:, None]]}


def refilling_tensors(sizes: Sequence[int]) -> Iterator[BatchTree]:
    refilled = Refilled(sizes)
    for row in range(len(sizes)):
        batch = torch.from_numpy(refilled[row])
        yield {"x": batch, "inside": [batch[:, None]]}


@drawn
@pytest.mark.parametrize("read", [refilling_arrays, refilling_tensors])
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), desired=desired_sizes)
def test_memory_that_is_filled_anew_for_each_batch_is_read_right(
    read: Callable[[Sequence[int]], Iterator[BatchTree]], sizes: list[int], desired: int
) -> None:
    seen: list[int] = []
    for window in logical_batches(open_source(read(sizes), batch_size=1).epoch(), desired):
        assert isinstance(window, dict)
        assert torch.equal(window["inside"][0][:, 0], window["x"])
        seen += window["x"].tolist()  # While the window is the latest, as training reads it.
    assert seen == list(range(sum(sizes)))


def test_a_container_that_is_filled_anew_is_read_right() -> None:
    def read() -> Iterator[BatchTree]:
        batch: dict[str, object] = {}
        for row in range(4):
            batch["x"] = torch.tensor([row])
            batch["scale"] = torch.tensor(2.0)
            yield batch

    windows = logical_batches(open_source(read(), batch_size=1).epoch(), 2)
    assert [window["x"].tolist() for window in windows] == [[0, 1], [2, 3]]  # type: ignore[index]  # Dicts.


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Refilled([3, 3, 3]), batch_size=None),
        DataLoader(Refilled([3, 3, 3]), collate_fn=lambda batches: batches[0]),
    ],
    ids=["no batching", "no collating"],
)
def test_a_loader_that_hands_on_what_the_dataset_made_is_read_right(
    loader: DataLoader[Any],
) -> None:
    windows = logical_batches(open_source(loader, batch_size=1).epoch(), 4)
    assert [numbers(window) for window in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_a_loader_whose_iteration_is_its_own_is_read_right() -> None:
    class Prefetching(DataLoader[Any]):
        def __iter__(self) -> Any:
            return refilling_tensors([3, 3])

    windows = logical_batches(open_source(Prefetching(ten()), batch_size=1).epoch(), 2)
    assert [window["x"].tolist() for window in windows] == [[0, 1], [2, 3], [4, 5]]  # type: ignore[index]  # Dicts.


@pytest.mark.parametrize(
    ("data", "copied"),
    [
        (DataLoader(ten(), batch_size=4), False),
        (DataLoader(ten(), batch_size=4, collate_fn=list, num_workers=1), False),
        (ten(), False),
        (MapStyle(), False),
        (Stream(3), False),
        ((torch.arange(10),), False),
        ([torch.arange(10)], True),
        (Counted([4]), True),
        (iter([torch.arange(10)]), True),
        (DataLoader(ten(), batch_size=4, collate_fn=list), True),
        (DataLoader(ten(), batch_size=None), True),
    ],
)
def test_what_is_held_is_copied_where_its_memory_may_be_filled_anew(
    data: Any, copied: bool
) -> None:
    assert open_source(data, batch_size=2).fresh is not copied


@pytest.mark.parametrize("fresh", [True, False])
def test_nothing_is_copied_that_is_new_memory_anyway(fresh: bool) -> None:
    rows = torch.arange(3)
    source = Source(batches=[rows], examples=None, one_pass=False, owner=None, fresh=fresh)
    (window,) = logical_batches(source.epoch(), 4)
    assert isinstance(window, Tensor)
    assert (window.data_ptr() == rows.data_ptr()) is fresh


def test_ragged_batches_are_kept_in_pieces_where_a_window_would_join_them() -> None:
    ragged = [torch.zeros(4, 5), torch.zeros(4, 7)]
    assert (
        list(map(describe, logical_batches(ragged, 2)))
        == ["float32[2, 5]"] * 2 + ["float32[2, 7]"] * 2
    )
    assert list(map(describe, logical_batches(ragged, 3))) == [
        "float32[3, 5]",
        "RaggedBatch(float32[1, 5], float32[2, 7])",
        "float32[2, 7]",
    ]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (torch.zeros(4, 7).double(), "agree in number of dimensions and dtype too"),
        (torch.zeros(4), "agree in number of dimensions and dtype too"),
        ((torch.zeros(4, 7),), "agree in number of dimensions and dtype too"),
    ],
)
def test_batches_that_differ_in_kind_are_no_pieces(other: BatchTree, text: str) -> None:
    for batches in ([torch.zeros(2, 5), other], [torch.zeros(2, 5), torch.zeros(1, 6), other]):
        with pytest.raises(ValueError, match=text):
            list(logical_batches(batches, 4))


def refilling_ragged(lengths: Sequence[int]) -> Iterator[BatchTree]:
    """Batches of two, each as wide as it says, all of them in the same memory."""
    memory = torch.zeros(2 * max(lengths))
    for number, length in enumerate(lengths):
        batch = memory[: 2 * length].view(2, length)
        batch.copy_(torch.tensor([[2.0 * number], [2.0 * number + 1]]).expand(2, length))
        yield batch


@drawn
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=8), desired=desired_sizes)
def test_ragged_memory_that_is_filled_anew_is_read_right(lengths: list[int], desired: int) -> None:
    seen: list[float] = []
    batches = open_source(refilling_ragged(lengths), batch_size=1).epoch()
    for window in logical_batches(batches, desired):
        for piece in pieces_of(window):
            assert isinstance(piece, Tensor)
            seen += [number for (number,) in map(set, piece.tolist())]
    assert seen == list(range(2 * len(lengths)))


def test_a_loaders_own_drop_last_stays() -> None:
    loader = DataLoader(ten(), batch_size=4, drop_last=True)
    source = open_source(loader, batch_size=3)
    windows = list(logical_batches(source.epoch(), 3))
    assert [numbers(window) for window in windows] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert source.examples == 8


def test_a_loader_keeps_its_order_its_sampler_and_its_collate_function() -> None:
    def doubled(examples: list[tuple[Tensor]]) -> Tensor:
        return 2 * torch.stack([example[0] for example in examples])

    loader = DataLoader(ten(), batch_size=4, sampler=range(9, 4, -1), collate_fn=doubled)
    source = open_source(loader, batch_size=3)
    windows = list(logical_batches(source.epoch(), 3))
    assert [numbers(window) for window in windows] == [[18, 16, 14], [12, 10]]
    assert source.examples == 5
    assert source.owner is loader
