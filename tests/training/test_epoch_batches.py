"""The logical batches of each epoch, from wherever a training stands."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from autobatch import CheckpointError
from autobatch.data.source import open_source
from autobatch.data.tree import BatchTree
from autobatch.training.epoch_batches import Epochs, keeps_workers
from autobatch.training.progress import DataPosition

Random = dict[str, object]


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def opened(
    data: Any, desired: int = 4, *, last: int = 2, position: DataPosition | None = None
) -> Epochs:
    return Epochs(
        source=open_source(data, batch_size=desired),
        desired=desired,
        drop_last=False,
        last=last,
        position=position or DataPosition(),
        random_state=lambda: {"torch": torch.get_rng_state()},
    )


def put_back(state: Random) -> None:
    torch.set_rng_state(cast("Tensor", state["torch"]))


def rows_of(batch: BatchTree) -> list[int]:
    [rows] = cast("list[Tensor]", batch)
    return rows.tolist()


def walk(epochs: Epochs, most: int = 99) -> list[list[int]]:
    """Go through the logical batches as training does; each draws a random number."""
    seen: list[list[int]] = []
    for position, batches in epochs:
        for batch in batches:
            seen.append([position.epoch, *rows_of(batch), int(torch.randint(1000, ()))])
            position.next_batch()
            if len(seen) == most:
                return seen
        position.next_epoch()
    return seen


def loader(workers: int = 0) -> DataLoader[Any]:
    kept = workers > 0
    return DataLoader(numbers(10), 3, shuffle=True, num_workers=workers, persistent_workers=kept)


def test_it_yields_each_epoch_in_its_turn() -> None:
    torch.manual_seed(0)
    epochs = opened(loader())
    epochs.open()
    seen = walk(epochs)
    assert [row[0] for row in seen] == [1, 1, 1, 2, 2, 2]
    for epoch in (1, 2):
        rows = [number for row in seen if row[0] == epoch for number in row[1:-1]]
        assert sorted(rows) == list(range(10))


def test_none_is_opened_before_its_turn() -> None:
    begun: list[int] = []

    class Counted:
        def __iter__(self) -> Iterator[list[Tensor]]:
            begun.append(1)
            return iter([[torch.arange(4)], [torch.arange(4)]])

    epochs = opened(Counted(), last=3)
    begun.clear()  # Opening the source has looked whether it is one-pass.
    epochs.open()
    assert len(begun) == 1
    for position, batches in epochs:
        assert len(begun) == max(1, position.epoch - 1)
        list(batches)
        assert len(begun) == position.epoch
        position.next_epoch()


def test_what_was_read_to_search_is_trained_on() -> None:
    epochs = opened([[torch.arange(5)], [torch.arange(5, 9)]], last=1)
    first = epochs.open()
    assert first is not None
    assert rows_of(first) == [0, 1, 2, 3]
    assert [row[1:-1] for row in walk(epochs)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_it_goes_on_where_it_stopped(stop: int, workers: int) -> None:
    torch.manual_seed(0)
    whole = opened(loader(workers))
    whole.open()
    expected = walk(whole)

    torch.manual_seed(0)
    position = DataPosition()
    epochs = opened(loader(workers), position=position)
    epochs.open()
    before = walk(epochs, stop)
    stopped: Random = {"torch": torch.get_rng_state()}

    torch.manual_seed(99)
    again = opened(loader(workers), position=DataPosition(**position.state_dict()))  # type: ignore[arg-type]
    again.open(stopped, put_back)
    assert before + walk(again) == expected


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 8))
def test_it_goes_on_at_the_beginning_of_any_epoch(desired: int, batch: int, done: int) -> None:
    data = DataLoader(numbers(7), batch, shuffle=True)
    torch.manual_seed(0)
    whole = opened(data, desired, last=done + 1)
    whole.open()
    expected = walk(whole)

    torch.manual_seed(0)
    position = DataPosition()
    stopped: Random = {"torch": torch.get_rng_state()}
    if done:
        epochs = opened(data, desired, last=done, position=position)
        epochs.open()
        walk(epochs)
        stopped = {"torch": torch.get_rng_state()}
    assert position == DataPosition(epoch=done + 1)

    torch.manual_seed(99)
    again = opened(data, desired, last=done + 1, position=position)
    again.open(stopped, put_back)
    assert walk(again) == [row for row in expected if row[0] == done + 1]


def test_an_epoch_that_was_at_its_end_has_no_more_batches() -> None:
    torch.manual_seed(0)
    position = DataPosition()
    epochs = opened(loader(), position=position)
    epochs.open()
    walk(epochs, 3)
    again = opened(loader(), position=position)
    assert again.open({"torch": torch.get_rng_state()}, put_back) is None


def test_fewer_batches_than_were_seen_are_refused() -> None:
    position = DataPosition(windows=3, random={"torch": torch.get_rng_state()})
    epochs = opened(numbers(8), position=position)
    with pytest.raises(CheckpointError, match=r"3 logical batches of epoch 1 .* holds 2"):
        epochs.open({"torch": torch.get_rng_state()}, put_back)


def test_where_random_generators_were_is_noted_before_each_epoch() -> None:
    torch.manual_seed(0)
    position = DataPosition()
    before = torch.get_rng_state()
    epochs = opened(loader(), position=position)
    epochs.open()
    assert position.random is not None
    assert torch.equal(cast("Tensor", position.random["torch"]), before)
    for _, batches in epochs:
        list(batches)
        before = torch.get_rng_state()
        position.next_epoch()
        break
    next(iter(epochs))[1].__next__()
    assert torch.equal(cast("Tensor", position.random["torch"]), before)


def test_persistent_workers_are_known() -> None:
    assert keeps_workers(loader(1))
    assert not keeps_workers(loader())
    assert not keeps_workers([torch.zeros(1)])
