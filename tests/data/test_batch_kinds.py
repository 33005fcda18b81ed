"""Batches of any shape through the whole engine: ragged text, lists of examples, shared tensors."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, assert_same_parameters, sgd, token_model, twin
from torch import Tensor, nn

from autobatch import Accumulator, Shared, find_and_train

LOSS = nn.CrossEntropyLoss(ignore_index=-100)


def ragged(lengths: list[list[int]], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """One batch for each list of lengths, padded to its own longest."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows in lengths:
        x = torch.randint(0, 7, (len(rows), max(rows)), generator=generator)
        y = torch.randint(0, 4, x.shape, generator=generator)
        for row, length in enumerate(rows):
            y[row, length:] = -100
        batches.append((x, y))
    return batches


def padded(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All rows as one batch."""
    width = max(x.shape[1] for x, _ in batches)
    return (
        torch.cat([F.pad(x, (0, width - x.shape[1])) for x, _ in batches]),
        torch.cat([F.pad(y, (0, width - y.shape[1]), value=-100) for _, y in batches]),
    )


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=6),
    desired=st.integers(1, 9),
)
def test_ragged_batches_that_cannot_be_joined_take_the_undivided_steps(
    lengths: list[list[int]], desired: int
) -> None:
    ours, whole = token_model(), token_model()
    batches = ragged(lengths)
    result = find_and_train(
        ours,
        batches,
        desired,
        loss=LOSS,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        progress=False,
    )
    optimizer, losses = sgd(whole), []
    x, y = padded(batches)
    for rows in torch.arange(len(x)).split(desired):
        optimizer.zero_grad()
        loss = LOSS(whole(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_exact(list(result.losses), losses)
    assert_same_parameters(ours, whole)


def test_the_mean_of_the_pieces_means_is_something_else() -> None:
    model = token_model()
    batches = ragged([[6, 2], [1]])
    means = torch.stack([LOSS(model(x), y) for x, y in batches])
    x, y = padded(batches)
    assert abs((means.mean() - LOSS(model(x), y)).item()) > 1e-3


class Detector(nn.Module):
    """Takes a list of images of any size, gives a score for each class, for each image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.stack([self.head(self.body(image).mean((1, 2))) for image in images])


def pictures(sizes: list[int]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, n, n + 1, generator=generator).double() for n in sizes]
    return images, [{"label": torch.tensor(n % 5), "boxes": torch.rand(n, 4)} for n in sizes]


def seen(
    model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]
) -> tuple[Tensor, Tensor]:
    images, targets = batch
    assert len(images) == len(targets)
    return model(images), torch.stack([target["label"] for target in targets])


@pytest.mark.parametrize("micro_batch", [7, 3, 1])
def test_images_of_unequal_shape_are_cut_image_by_image(micro_batch: int) -> None:
    ours = Detector().double()
    whole = twin(ours)
    batch = pictures([4, 6, 5, 4, 9, 5, 4])
    step = Accumulator(
        ours,
        sgd(ours),
        nn.CrossEntropyLoss(),
        forward=seen,
        micro_batch=micro_batch,
    ).step(batch)
    outputs, targets = seen(whole, batch)
    loss = F.cross_entropy(outputs, targets)
    loss.backward()
    sgd(whole).step()
    assert step.examples == 7
    assert max(step.micro_batch_sizes) == micro_batch
    assert_exact(step.loss, loss.item())
    assert_same_parameters(ours, whole)


def test_a_loader_of_such_lists_trains_with_a_search() -> None:
    ours = Detector().double()
    result = find_and_train(
        ours,
        [pictures([4, 6, 5]), pictures([7, 4, 4, 5])],
        6,
        loss=nn.CrossEntropyLoss(),
        forward=seen,
        progress=False,
        max_steps=2,
    )
    assert (result.steps, result.examples) == (2, 7)


class Graph(nn.Module):
    """Mixes features with a matrix that belongs to the batch as a whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)

    def forward(self, features: Tensor, matrix: Tensor) -> Tensor:
        return self.layer(features @ matrix)  # type: ignore[no-any-return]


def test_a_shared_tensor_goes_whole_to_every_micro_batch() -> None:
    ours = Graph().double()
    whole = twin(ours)
    torch.manual_seed(1)
    x, y = torch.randn(8, 6).double(), torch.randint(0, 3, (8,))
    matrix = torch.randn(6, 6).double()
    step = Accumulator(ours, sgd(ours), micro_batch=3).step((x, Shared(matrix), y))
    F.cross_entropy(whole(x, matrix), y).backward()
    sgd(whole).step()
    assert step.micro_batch_sizes == (3, 3, 2)
    assert_same_parameters(ours, whole)


def test_without_the_mark_it_is_refused_for_its_length() -> None:
    model = Graph().double()
    batch = torch.randn(8, 6).double(), torch.randn(6, 6).double(), torch.randint(0, 3, (8,))
    with pytest.raises(ValueError, match="must agree in length along dimension 0"):
        Accumulator(model, sgd(model), micro_batch=3).step(batch)


def test_an_endless_stream_ends_after_max_steps_and_reads_no_further() -> None:
    read: list[int] = []

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            read.append(len(read))
            yield ragged([[3, 3, 3, 3]], seed=len(read))[0]

    result = find_and_train(
        token_model(), stream(), 8, loss=LOSS, max_steps=3, memory_limit="1MiB", progress=False
    )
    assert result.steps == 3
    assert len(read) == 6
