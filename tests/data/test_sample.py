import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from autobatch.data.markers import Examples, RaggedBatch
from autobatch.data.sample import read_sample, repeated
from autobatch.data.source import open_source
from autobatch.data.tree import BatchTree, describe, size_of
from autobatch.state.rng import random_state

drawn = settings(deadline=None, max_examples=60, derandomize=True)


class Noisy(Dataset[Tensor]):
    """Every reading is another one."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> Tensor:
        return torch.tensor([float(row), torch.rand(()).item(), random.random()])


def persistent(seed: int = 0) -> DataLoader[Tensor]:
    return DataLoader(
        Noisy(),
        batch_size=4,
        shuffle=True,
        num_workers=1,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(seed),
    )


def as_lists(examples: list[Tensor]) -> tuple[list[Tensor], list[float]]:
    return examples, [float(example[0]) for example in examples]


def as_tensor(tree: BatchTree) -> Tensor:
    assert isinstance(tree, Tensor)
    return tree


@drawn
@given(length=st.integers(1, 7), size=st.integers(1, 40))
def test_a_sample_is_repeated_in_order_to_any_size(length: int, size: int) -> None:
    sample = (torch.arange(length), {"name": [f"row {row}" for row in range(length)]}, "whole")
    rows = [row % length for row in range(size)]
    batch = repeated(sample, size)
    assert isinstance(batch, tuple)
    assert size_of(batch) == size
    assert batch[0].tolist() == rows
    assert batch[1] == {"name": [f"row {row}" for row in rows]}
    assert batch[2] == "whole"


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_repeated_sample_is_a_copy(size: int) -> None:
    sample = torch.zeros(3, 2)
    as_tensor(repeated(sample, size)).fill_(1)
    assert sample.sum() == 0


def test_of_a_sample_in_pieces_the_one_with_the_largest_examples_is_repeated() -> None:
    narrow, wide = torch.zeros(5, 2), torch.arange(6.0).reshape(2, 3)
    batch = as_tensor(repeated(RaggedBatch((narrow, wide, narrow)), 3))
    assert batch.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_a_repeated_list_of_examples_is_a_copy_too() -> None:
    image = torch.zeros(3, 2)
    batch = repeated((Examples([image, "text"]), torch.arange(2)), 3)
    assert isinstance(batch, tuple)
    assert list(map(describe, batch)) == ["Examples(float32[3, 2], str, float32[3, 2])", "int64[3]"]
    as_tensor(batch[0][0]).fill_(1)
    assert image.sum() == batch[0][2].sum() == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_holds_lists_of_examples_as_training_does(workers: int) -> None:
    loader = DataLoader(
        Noisy(),
        batch_size=2,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=as_lists,
    )
    sample = read_sample(open_source(loader, batch_size=1))
    assert describe(sample) == "(Examples(float32[3], float32[3]), Examples(float, float))"


def test_the_sample_is_the_first_batch_that_holds_an_example() -> None:
    batches: list[Any] = [torch.ones(0, 2), np.arange(6.0).reshape(3, 2), torch.ones(1, 2)]
    sample = as_tensor(read_sample(open_source(batches, batch_size=1)))
    assert sample.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_no_more_is_read_than_the_sample() -> None:
    pulled: list[int] = []

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            for size in (0, 2, 3):
                pulled.append(size)
                yield torch.ones(size)

    read_sample(open_source(Batches(), batch_size=1))
    assert pulled == [0, 2]


def test_a_dataset_is_sampled_at_the_batch_size() -> None:
    source = open_source(TensorDataset(torch.arange(10)), batch_size=4)
    assert size_of(read_sample(source)) == 4


@pytest.mark.parametrize("batches", [[torch.ones(0)], iter([])])
def test_data_without_an_example_is_refused(batches: Any) -> None:
    with pytest.raises(ValueError, match=r"^data is empty: it holds no example$"):
        read_sample(open_source(batches, batch_size=1))


def test_errors_of_the_data_pass_through() -> None:
    class Broken:
        def __iter__(self) -> Iterator[Tensor]:
            raise KeyError("the user's own error")

    with pytest.raises(KeyError, match="own error"):
        read_sample(open_source(Broken(), batch_size=1))


def test_workers_that_a_loader_would_keep_are_not_started() -> None:
    loader = persistent()
    assert read_sample(open_source(loader, batch_size=1)) is not None
    assert loader._iterator is None


def test_the_control_starts_them() -> None:
    loader = persistent()
    iterator = iter(loader)
    assert loader._iterator is iterator


def two_epochs(disturb: Callable[[DataLoader[Tensor]], object]) -> list[Tensor]:
    """All batches of two epochs; after the first batch the loader is disturbed."""
    torch.manual_seed(0)
    random.seed(0)
    loader = persistent()
    batches = iter(loader)
    seen = [next(batches)]
    disturb(loader)
    seen += list(batches)
    seen += list(loader)
    return seen


def sample(loader: DataLoader[Tensor]) -> None:
    before = loader._iterator
    assert as_tensor(read_sample(open_source(loader, batch_size=1))).shape == (4, 3)
    assert loader._iterator is before


def sample_and_put_back(loader: DataLoader[Tensor]) -> None:
    put_back = random_state([loader])
    sample(loader)
    put_back()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_an_iteration_that_has_begun_goes_on_bit_by_bit_as_without_the_sample() -> None:
    undisturbed = two_epochs(lambda _: None)
    assert len(undisturbed) == 12
    assert same(two_epochs(sample_and_put_back), undisturbed)


@pytest.mark.parametrize("disturb", [sample, lambda loader: next(iter(loader))])
def test_the_control_disturbs_the_iteration(
    disturb: Callable[[DataLoader[Tensor]], object],
) -> None:
    """Without the generators put back the next epoch differs; by ``iter`` already this one."""
    assert not same(two_epochs(disturb), two_epochs(lambda _: None))
