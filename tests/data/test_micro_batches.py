import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autobatch.data.markers import Examples, RaggedBatch, Shared
from autobatch.data.micro_batches import cut_to, largest_piece, pieces_of, put_together
from autobatch.data.rebatch import logical_batches
from autobatch.data.tree import BatchTree, describe, from_numpy, map_tensors, size_of, unwrapped
from autobatch.results.plan import BatchPlan

drawn = settings(deadline=None, max_examples=100, derandomize=True)
texts = st.lists(st.integers(0, 4), min_size=1, max_size=20)  # Their lengths.
sizes = st.integers(1, 7)


def padded(lengths: Sequence[int], loaded: int) -> Iterator[dict[str, Any]]:
    """What a loader of ``loaded`` texts gives, padded to each batch's own longest.

    Every token is the number of its example, from 1 on; the padding is 0.
    """
    for start in range(0, len(lengths), loaded):
        own = lengths[start : start + loaded]
        numbers = torch.arange(start + 1, start + len(own) + 1)
        mask = torch.arange(max(own)) < torch.tensor(own)[:, None]
        yield {
            "input_ids": numbers[:, None] * mask,
            "attention_mask": mask,
            "labels": numbers,
            "names": [f"text {number}" for number in numbers.tolist()],
            "items": Examples(torch.zeros(number) for number in numbers.tolist()),
            "table": Shared(torch.eye(3)),
        }


def rows(batches: Sequence[BatchTree]) -> list[tuple[list[int], int, int, str, int]]:
    """Every example: its tokens as they are padded, length, label, name and item."""
    found: list[tuple[list[int], int, int, str, int]] = []
    for batch in batches:
        assert isinstance(batch, dict)
        columns = batch["input_ids"], batch["attention_mask"], batch["labels"], batch["names"]
        for ids, mask, label, name, item in zip(*columns, batch["items"], strict=True):
            found.append((ids.tolist(), int(mask.sum()), int(label), name, len(item)))
    return found


def every_piece(batches: Sequence[BatchTree]) -> list[BatchTree]:
    return list(itertools.chain.from_iterable(map(pieces_of, batches)))


@drawn
@given(lengths=texts, loaded=sizes, desired=sizes)
def test_the_pieces_of_an_epoch_hold_the_loaders_examples_in_order(
    lengths: list[int], loaded: int, desired: int
) -> None:
    windows = list(logical_batches(padded(lengths, loaded), desired))
    assert rows(every_piece(windows)) == rows(list(padded(lengths, loaded)))
    whole, rest = divmod(len(lengths), desired)
    assert [size_of(window) for window in windows] == [desired] * whole + [rest] * bool(rest)


@drawn
@given(lengths=texts, loaded=sizes, desired=sizes)
def test_what_can_be_joined_is_joined(lengths: list[int], loaded: int, desired: int) -> None:
    widths = [len(ids) for ids, *_ in rows(list(padded(lengths, loaded)))]
    for number, window in enumerate(logical_batches(padded(lengths, loaded), desired)):
        own = widths[number * desired : (number + 1) * desired]
        runs = [len(list(run)) for _, run in itertools.groupby(own)]
        assert list(map(size_of, pieces_of(window))) == runs
        assert isinstance(window, RaggedBatch) is (len(runs) > 1)


@drawn
@given(lengths=texts, loaded=sizes, desired=sizes, tolerable=sizes)
def test_every_piece_is_cut_as_a_plan_of_its_size_cuts_it(
    lengths: list[int], loaded: int, desired: int, tolerable: int
) -> None:
    for window in logical_batches(padded(lengths, loaded), desired):
        micro_batches, found = cut_to(window, tolerable)
        assert tuple(map(size_of, micro_batches)) == found
        assert max(found) <= tolerable
        assert rows(micro_batches) == rows(pieces_of(window))
        plans = [
            BatchPlan(desired=size_of(piece), tolerable=tolerable) for piece in pieces_of(window)
        ]
        assert found == tuple(itertools.chain.from_iterable(p.micro_batch_sizes for p in plans))


def test_the_comparison_can_fail() -> None:
    batches = list(padded([1, 3, 2, 2], 2))
    assert rows(batches) != rows(batches[::-1])
    assert rows(batches) != rows(list(padded([1, 3, 2, 3], 2)))


def test_an_ordinary_batch_is_its_only_piece_and_is_not_copied() -> None:
    batch = (torch.ones(10, 2), torch.ones(10))
    assert pieces_of(batch) == (batch,)
    assert put_together([batch]) is batch
    assert largest_piece(batch) is batch
    assert cut_to(batch, 10)[0][0] is batch
    parts, found = cut_to(batch, 4)
    assert found == (4, 3, 3)
    for part in parts:
        assert isinstance(part, tuple)
        assert part[0].untyped_storage().data_ptr() == batch[0].untyped_storage().data_ptr()


def test_pieces_are_mapped_described_and_unwrapped_one_by_one() -> None:
    pieces = put_together([(torch.zeros(2, width), Shared("text")) for width in (5, 5, 7)])
    assert describe(pieces) == (
        "RaggedBatch((float32[4, 5], Shared(str)), (float32[2, 7], Shared(str)))"
    )
    assert size_of(pieces) == 6
    mapped = map_tensors(lambda tensor: tensor.double() + 1, from_numpy(pieces))
    assert describe(unwrapped(mapped)) == "RaggedBatch((float64[4, 5], str), (float64[2, 7], str))"
    assert describe(pieces).startswith("RaggedBatch((float32"), "it was changed"


def test_pieces_that_disagree_inside_are_refused() -> None:
    with pytest.raises(ValueError, match="must agree in length"):
        size_of(RaggedBatch(((torch.ones(2), torch.ones(3)), (torch.ones(2), torch.ones(2)))))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ((torch.ones(2, 7), torch.ones(2).double()), "number of dimensions and dtype"),
        ((torch.ones(2, 7, 1), torch.ones(2)), "number of dimensions and dtype"),
        ((torch.ones(2, 7), torch.ones(2), "more"), "one structure"),
        ((torch.ones(2, 7), [torch.ones(2)]), "number of dimensions and dtype|one structure"),
    ],
)
def test_what_differs_in_kind_is_refused_wherever_it_stands(
    other: tuple[Any, ...], text: str
) -> None:
    one, ragged = (torch.ones(2, 5), torch.ones(2)), (torch.ones(2, 6), torch.ones(2))
    for batches in itertools.permutations([one, ragged, other]):
        with pytest.raises(ValueError, match=text):
            put_together(batches)


def test_what_pieces_share_must_be_equal() -> None:
    batches = [(torch.ones(2, width), Shared(torch.ones(width))) for width in (5, 7)]
    with pytest.raises(ValueError, match="equal Shared values"):
        put_together(batches)


def test_the_largest_piece_is_the_one_with_the_most_bytes_an_example() -> None:
    def batch(size: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        return (torch.zeros(size, width, dtype=dtype), Shared(torch.zeros(1000)))

    many, few, middle = batch(9, 3), batch(1, 2), batch(3, 4)
    assert largest_piece(RaggedBatch((many, few, middle))) is middle
    boxes = [
        (Examples([torch.zeros(n)] * 2), torch.zeros(2, width)) for n, width in ((1, 3), (9, 2))
    ]
    assert largest_piece(RaggedBatch(tuple(boxes))) is boxes[1]


def test_gradients_of_the_pieces_add_up_to_those_of_padded_text() -> None:
    """Why pieces may stand for the batch: a sum over examples does not ask how they are held."""
    torch.manual_seed(0)
    weight = torch.randn(21, dtype=torch.float64, requires_grad=True)

    def summed(batch: BatchTree) -> Tensor:
        assert isinstance(batch, dict)
        found = (weight[batch["input_ids"]] * batch["attention_mask"]).sum(1).square().sum()
        assert isinstance(found, Tensor)
        return found

    lengths = [3, 1, 4, 1, 2, 2, 4, 3]
    (window,) = logical_batches(padded(lengths, 3), 8)
    assert len(pieces_of(window)) == 3
    for tolerable in (1, 2, 8):
        parts, _ = cut_to(window, tolerable)
        (found,) = torch.autograd.grad(sum(map(summed, parts), torch.zeros(())), [weight])
        (expected,) = torch.autograd.grad(summed(next(padded(lengths, 8))), [weight])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
