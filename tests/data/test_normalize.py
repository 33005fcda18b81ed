from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autobatch import Accumulator
from autobatch.data.containers import children_of
from autobatch.data.markers import Examples, RaggedBatch, Shared
from autobatch.data.normalize import as_batch
from autobatch.data.rebatch import logical_batches
from autobatch.data.source import open_source
from autobatch.data.tree import BatchTree, cut, describe, join, size_of, take

drawn = settings(deadline=None, max_examples=60, derandomize=True)


class Pair(NamedTuple):
    images: object
    targets: object


@dataclass
class Boxes:
    boxes: Tensor


@dataclass
class WholeBatchObjective:
    images: object
    targets: object


class Encoding(UserDict[str, object]):
    """A mapping that is no dict."""


class Picture:
    """What nobody knows, as an image of another library."""


def image(height: int = 4, width: int = 5, channels: int = 3) -> Tensor:
    return torch.zeros(channels, height, width)


def target(boxes: int) -> dict[str, Tensor]:
    return {"boxes": torch.zeros(boxes, 4), "labels": torch.zeros(boxes, dtype=torch.int64)}


def kinds(batch: BatchTree) -> list[str]:
    """What a batch of several members came to be."""
    members = children_of(batch)
    assert members is not None
    return [type(member).__name__ for member in members]


two_images = [image(4, 5), image(6, 3)]
labels = torch.tensor([0, 1])

LISTS: list[tuple[str, Any, int]] = [
    ("a detector's", (two_images, [target(1), target(2)]), 2),
    ("transposed by zip", (tuple(two_images), (target(1), target(2))), 2),
    ("a single image", ([image()], [target(3)]), 1),
    ("as many boxes as images", (two_images, [target(2), target(2)]), 2),
    ("images that are stacked", (torch.zeros(2, 3, 4, 4), [target(1), target(2)]), 2),
    ("images without a box", (two_images, [target(0), target(0)]), 2),
    ("three images of one shape and three boxes", ([image()] * 3, [target(3)] * 3), 3),
    ("dataclasses", (two_images, [Boxes(torch.zeros(3, 4))] * 2), 2),
    ("other mappings", (two_images, [Encoding(target(1)), OrderedDict(target(2))]), 2),
    ("labels in a tensor", (two_images, labels), 2),
    ("one-dimensional", ([torch.zeros(7), torch.zeros(9)], labels), 2),
    ("labels in a list", (two_images, [0, 1]), 2),
    ("captions", (two_images, ["a cat", "a dog"]), 2),
    ("captions of three images", ([image()] * 3, ["cat", "dog", "cow"]), 3),
    ("several captions an image", (two_images, [["a cat", "an animal"], ["a dog"]]), 2),
    ("labels without a dimension", (two_images, (torch.tensor(0), torch.tensor(1))), 2),
    ("pictures and labels", ([Picture(), Picture()], [0, 1]), 2),
    ("pictures and a tensor of other length", ([image()] * 4, [Picture()] * 4), 4),
    ("masks of each image's size", (two_images, [torch.zeros(4, 5), torch.zeros(6, 3)]), 2),
    ("a list around it", [two_images, [target(1), target(2)]], 2),
    ("a mapping around it", {"images": two_images, "targets": [target(1), target(2)]}, 2),
    ("a mapping of another class", Encoding({"images": two_images, "labels": labels}), 2),
    ("a named tuple around it", Pair(two_images, [target(1), target(2)]), 2),
    ("a dataclass around it", WholeBatchObjective(two_images, [target(1), target(2)]), 2),
    ("more that is whole", (two_images, [target(1), target(2)], "train", 3, None, Shared([1])), 2),
    ("a scalar tensor", (two_images, [target(1), target(2)], torch.tensor(0.5)), 2),
    ("arrays", ([np.zeros((4, 5)), np.zeros((6, 3))], np.array([0, 1])), 2),
    ("an array of text", ([image()] * 2, np.array(["a", "b"])), 2),
    ("text alone", {"text": ["one", "two"], "labels": [0, 1]}, 2),
]


@pytest.mark.parametrize(("batch", "size"), [r[1:] for r in LISTS], ids=[r[0] for r in LISTS])
def test_lists_of_examples_are_marked(batch: Any, size: int) -> None:
    read = as_batch(batch)
    assert type(read) is type(batch)
    assert "Examples" in kinds(read)
    assert not {"list", "tuple"} & set(kinds(read))
    assert size_of(read) == size
    assert [size_of(one) for one in cut(read, [1] * size)] == [1] * size


@dataclass
class Views:
    one: Tensor
    two: Tensor


def rows(*shape: int) -> Tensor:
    return torch.zeros(shape)


USUAL: list[tuple[str, Any, int | None]] = [
    ("two inputs in a list", ([rows(5, 2), rows(5, 3)], rows(5)), 5),
    ("as many inputs as examples", ([rows(2, 2), rows(2, 3)], rows(2)), 2),
    ("one input, one example", ([rows(1, 2)], rows(1)), 1),
    ("inputs and targets in lists", ([rows(5, 2), rows(5)], [rows(5), rows(5)]), 5),
    ("a list of tensors", [rows(5, 2), rows(5)], 5),
    ("lists of other lengths", ([rows(5, 2), rows(5)], [rows(5)], rows(5)), 5),
    ("mappings as inputs", ({"a": rows(5), "b": rows(5)}, rows(5)), 5),
    ("captions beside a tensor", (rows(2, 3), ["a cat", "a dog"]), 2),
    ("names of the whole batch", (rows(3), ["a cat", "a dog"]), 3),
    ("a dataclass", Views(rows(2, 3), rows(2)), 2),
    ("named tuples as members", (Pair(rows(2, 3), rows(2)), rows(2)), 2),
    ("named tuples of other lengths", (Pair(rows(2, 3), rows(3)), rows(2)), None),
    ("a tensor", rows(4), 4),
    ("tensors that disagree", (rows(3), rows(4)), None),
    ("lists and a tensor that disagree", ([rows(4), rows(5)], rows(3)), None),
    ("lists of no examples", ([], []), None),
    ("no examples", (rows(0, 3), []), 0),
    ("a list of mappings alone", [{"x": rows(5)}, {"x": rows(5)}], 5),
    ("plain values", [1, 2, 3], None),
    ("text", "text", None),
    ("nothing but what is shared", (Shared(rows(3)), [Shared(rows(2))]), None),
]


@pytest.mark.parametrize(("batch", "size"), [r[1:] for r in USUAL], ids=[r[0] for r in USUAL])
def test_what_looks_like_lists_of_examples_keeps_the_usual_reading(
    batch: Any, size: int | None
) -> None:
    read = as_batch(batch)
    assert "Examples" not in describe(read)
    assert describe(read) == describe(batch)
    if size is None:
        with pytest.raises(ValueError, match="batch"):
            size_of(read)
    else:
        assert size_of(read) == size


def test_as_many_images_as_channels_beside_a_tensor_of_labels_are_taken_for_inputs() -> None:
    """The limit that the docstring names."""
    assert kinds(as_batch(([image()] * 3, rows(3)))) == ["list", "Tensor"]
    assert kinds(as_batch(([image()] * 3, rows(3).tolist()))) == ["Examples", "Examples"]
    assert kinds(as_batch((Examples([image()] * 3), rows(3)))) == ["Examples", "Tensor"]


def test_a_last_batch_of_as_many_is_read_as_those_before() -> None:
    batches = [([image()] * n, rows(n)) for n in (4, 4, 3)]
    for source in (batches, iter(batches)):
        opened = open_source(source, batch_size=4)
        read = list(opened.epoch())
        assert [kinds(batch) for batch in read] == [["Examples", "Tensor"]] * 3
        assert opened.examples in (11, None)
    of_two_inputs = ([rows(4, 2), rows(4, 3)], rows(4))
    assert kinds(list(open_source([*batches, of_two_inputs], batch_size=4).epoch())[-1]) == [
        "list",
        "Tensor",
    ]


def test_an_accumulator_reads_them_all_alike() -> None:
    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Linear(3, 2)

        def forward(self, images: list[Tensor]) -> Tensor:
            scores: Tensor = self.last(torch.stack([one.mean((1, 2)) for one in images]))
            return scores

    model = Mean()
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batch=2)
    for examples, sizes in ((4, (2, 2)), (3, (2, 1))):
        step = accumulator.step(([image()] * examples, torch.zeros(examples, dtype=torch.long)))
        assert step.micro_batch_sizes == sizes


@pytest.mark.parametrize(
    "batch",
    [
        (rows(4, 2), rows(4)),
        [rows(4, 2), rows(4)],
        RaggedBatch(((rows(4, 2), rows(4)), (rows(4, 3), rows(4)))),
        "text",
    ],
)
def test_what_needs_no_reading_is_returned_at_once(batch: Any) -> None:
    assert as_batch(batch) is batch


def test_a_list_that_the_user_marked_is_left_to_him() -> None:
    marked = (Examples(two_images), ["cat", "dog"])
    assert kinds(as_batch(marked)) == ["Examples", "list"]
    several_targets = Examples([[target(1)], [target(2)]])
    assert kinds(as_batch(several_targets)) == ["list", "list"]
    assert size_of(as_batch(several_targets)) == 2


def test_arrays_inside_the_lists_become_tensors() -> None:
    read = as_batch(([np.ones((2, 3)), np.ones((4, 3))], [{"boxes": np.ones((1, 4))}] * 2))
    assert describe(read) == (
        "(Examples(float64[2, 3], float64[4, 3]), "
        "Examples({boxes: float64[1, 4]}, {boxes: float64[1, 4]}))"
    )


detections = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=8
)


def detected(shapes: list[tuple[int, int, int]], first: int = 0) -> list[tuple[Tensor, Any]]:
    """One image an example, every pixel of it the example's number, and its boxes."""
    return [
        (torch.full((3, height, width), float(number)), {"boxes": torch.full((k, 4), number)})
        for number, (height, width, k) in enumerate(shapes, first)
    ]


def by_example(batches: list[BatchTree]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for batch in batches:
        assert isinstance(batch, tuple)
        found += zip(*batch, strict=True)
    return found


def assert_same_examples(found: list[tuple[Any, Any]], expected: list[tuple[Any, Any]]) -> None:
    assert len(found) == len(expected)
    for (one, boxes), (other, other_boxes) in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(boxes["boxes"], other_boxes["boxes"])


class Detection(Dataset[Any]):
    def __init__(self, shapes: list[tuple[int, int, int]]) -> None:
        self.examples = detected(shapes)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> Any:
        return self.examples[row]


def transposed(examples: list[tuple[Tensor, Any]]) -> tuple[Any, ...]:
    """The collate function of torchvision's own references."""
    return tuple(zip(*examples, strict=True))


@drawn
@given(shapes=detections, loaded=st.integers(1, 9), desired=st.integers(1, 9))
def test_a_detectors_loader_gives_logical_batches_of_all_examples_in_order(
    shapes: list[tuple[int, int, int]], loaded: int, desired: int
) -> None:
    data = Detection(shapes)
    loader = DataLoader(data, batch_size=loaded, collate_fn=transposed)
    windows = list(logical_batches(open_source(loader, batch_size=1).epoch(), desired))
    whole, rest = divmod(len(shapes), desired)
    assert [size_of(window) for window in windows] == [desired] * whole + [rest] * bool(rest)
    assert_same_examples(by_example(windows), data.examples)


@drawn
@given(shapes=detections, data=st.data())
def test_lists_of_examples_are_cut_joined_and_taken_by_example(
    shapes: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    examples = detected(shapes)
    batch = as_batch(transposed(examples))
    at = data.draw(st.integers(0, len(shapes)))
    parts = cut(batch, [at, len(shapes) - at])
    assert_same_examples(by_example(parts), examples)
    assert_same_examples(by_example([join(parts)]), examples)
    wanted = data.draw(st.lists(st.integers(0, len(shapes) - 1), max_size=9))
    assert_same_examples(by_example([take(batch, wanted)]), [examples[row] for row in wanted])


def test_a_list_of_such_batches_counts_its_examples() -> None:
    batches = [(two_images, [target(1), target(2)]), ([image()], [target(0)])]
    assert open_source(batches, batch_size=9).examples == 3
