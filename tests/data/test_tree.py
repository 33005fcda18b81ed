import itertools
import pickle
import types
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import bits
from torch import Tensor

from autobatch.data.markers import Examples, RaggedBatch, Shared
from autobatch.data.tree import (
    RaggedError,
    cut,
    describe,
    from_numpy,
    join,
    map_tensors,
    part,
    per_example,
    plain_size,
    size_of,
    take,
    tensors,
    unwrapped,
)

drawn = settings(deadline=None, max_examples=40, derandomize=True)


class Pair(NamedTuple):
    image: object
    label: object


class Encoding(UserDict[str, object]):
    """A mapping that is made from a dict, and no dict, as transformers' BatchEncoding."""


class Frozen(Mapping[str, object]):
    """A mapping that cannot be changed, with no more than it must have."""

    def __init__(self, items: dict[str, object]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> object:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Stored(MutableMapping[str, object]):
    """A mapping that keeps what it holds in an object of its own."""

    def __init__(self, items: dict[str, object]) -> None:
        self._d = dict(items)

    def __getitem__(self, key: str) -> object:
        return self._d[key]

    def __setitem__(self, key: str, value: object) -> None:
        self._d[key] = value

    def __delitem__(self, key: str) -> None:
        del self._d[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._d)

    def __len__(self) -> int:
        return len(self._d)


class Named(Stored):
    """One that is not made from pairs."""

    def __init__(self, name: str, *, x: object) -> None:
        super().__init__({"x": x})
        self.name = name


class Loud(Stored):
    """One that is made from pairs, but holds other things then."""

    def __init__(self, items: dict[str, object]) -> None:
        super().__init__({f"{key}!": value for key, value in items.items()})


class Attributes(dict[str, Any]):
    """The dict whose attributes are its keys, as many a project has it."""

    x: Tensor

    def __init__(self, items: dict[str, object]) -> None:
        super().__init__(items)
        self.__dict__ = self


class Twice(dict[str, Any]):
    """A dict that keeps what it holds a second time."""

    def __init__(self, items: dict[str, object]) -> None:
        super().__init__(items)
        self.seen: dict[str, Any] = dict(items)

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, value)
        self.seen[key] = value


class Sealed(dict[str, Any]):
    """A dict that cannot be changed."""

    def __setitem__(self, key: str, value: object) -> None:
        raise TypeError(f"{key} cannot be set")


@dataclass(frozen=True)
class Graph:
    nodes: object
    edges: object
    name: str = "graph"


class Opaque:
    """A batch whose tensors nobody can find."""

    def __init__(self) -> None:
        self.rows = torch.arange(4)


@dataclass
class Counted:
    rows: Tensor
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = self.rows.sum()


def tensor_of(rows: int, width: int, offset: int) -> Tensor:
    """Every number in it is another one."""
    shape = (rows, width) if width else (rows,)
    return torch.arange(offset, offset + rows * max(width, 1)).reshape(shape)


def leaves(rows: int) -> st.SearchStrategy[object]:
    """What may stand at the end of a tree that holds ``rows`` examples."""
    whole: list[object] = [None, "whole", 3, 2.5, True, b"raw", torch.tensor(7), torch.float16]
    arrays = st.builds(tensor_of, st.just(rows), st.integers(0, 3), st.integers(0, 99))
    texts = st.just([f"text {row}" for row in range(rows)])
    # Each item is as wide as its row's number, so that no two could be stacked.
    ragged = st.just([{"boxes": tensor_of(1, row, row), "name": str(row)} for row in range(rows)])
    any_length = st.builds(tensor_of, st.integers(0, 5), st.integers(0, 2), st.integers(0, 99))
    shared = st.one_of(any_length, texts, ragged).map(Shared)
    return st.one_of(
        arrays,
        st.sampled_from(whole),
        texts,
        texts.map(tuple),
        ragged.map(Examples),
        texts.map(Examples),
        shared,
    )


def around(children: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    # The empty mapping at its end keeps a list of plain values from being one value an example.
    few = st.lists(children, min_size=1, max_size=3).map(lambda items: [*items, {}])
    named = st.dictionaries(st.sampled_from("abc"), children, min_size=1, max_size=3)
    return st.one_of(
        few,
        few.map(tuple),
        named,
        named.map(OrderedDict),
        named.map(Encoding),
        named.map(Frozen),
        named.map(Stored),
        named.map(Attributes),
        named.map(types.MappingProxyType),
        named.map(lambda items: defaultdict(list, items)),
        st.builds(Pair, children, children),
        st.builds(Graph, children, children),
    )


def trees(rows: int) -> st.SearchStrategy[object]:
    """Any tree of ``rows`` examples; at least one tensor says how many there are."""
    inside = st.recursive(leaves(rows), around, max_leaves=6)
    first = st.builds(tensor_of, st.just(rows), st.integers(0, 2), st.just(0))
    return st.one_of(
        st.tuples(first, inside),
        st.builds(Graph, first, inside),
        st.builds(lambda one, other: Encoding({"x": one, "y": other}), first, inside),
    )


def same(one: object, other: object) -> bool:
    """The slow comparison: class by class, value by value."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_dataclass(one) and is_dataclass(other):
        names = [entry.name for entry in fields(one)]
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    return one == other


def storage(tree: object) -> list[int]:
    """Where the rows of the batch lie; a list of examples has one place an item."""
    rows = [item for item in per_example(tree) if isinstance(item, Tensor)]
    return [tensor.untyped_storage().data_ptr() for tensor in rows]


def item_storage(tree: object) -> list[int]:
    lists = [item for item in per_example(tree) if isinstance(item, Examples)]
    return [t.untyped_storage().data_ptr() for item in lists for t in tensors(item) if t.numel()]


cuttings = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@drawn
@given(sizes=cuttings, data=st.data())
def test_joining_what_was_cut_gives_the_same_nest(sizes: list[int], data: st.DataObject) -> None:
    tree = data.draw(trees(sum(sizes)))
    before = (repr(tree), [bits(tensor) for tensor in tensors(tree)])
    pieces = cut(tree, sizes)
    assert [size_of(piece) for piece in pieces] == sizes
    assert same(join(pieces), tree)
    assert (repr(tree), [bits(tensor) for tensor in tensors(tree)]) == before, "it was changed"


@drawn
@given(sizes=cuttings, data=st.data())
def test_parts_are_views_and_rows_that_are_taken_are_copies(
    sizes: list[int], data: st.DataObject
) -> None:
    tree = data.draw(trees(sum(sizes)))
    for piece in cut(tree, sizes):
        assert storage(piece) == storage(tree)
        assert set(item_storage(piece)) <= set(item_storage(tree))
    taken = take(tree, range(sum(sizes)))
    assert set(storage(taken)).isdisjoint(storage(tree))
    assert set(item_storage(taken)).isdisjoint(item_storage(tree))


@drawn
@given(rows=st.integers(1, 6), data=st.data())
def test_rows_are_taken_in_any_order_and_more_than_once(rows: int, data: st.DataObject) -> None:
    tree = data.draw(trees(rows))
    wanted = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=8))
    one_by_one = [part(tree, row, row + 1) for row in wanted]
    assert same(take(tree, wanted), join(one_by_one))


@drawn
@given(rows=st.integers(1, 6), data=st.data())
def test_a_cut_gives_the_parts_one_by_one(rows: int, data: st.DataObject) -> None:
    tree = data.draw(trees(rows))
    at = data.draw(st.integers(0, rows))
    assert same(cut(tree, [at, rows - at]), [part(tree, 0, at), part(tree, at, rows)])


@drawn
@given(rows=st.integers(1, 6), data=st.data())
def test_mapping_nothing_changes_nothing(rows: int, data: st.DataObject) -> None:
    tree = data.draw(trees(rows))
    again = map_tensors(lambda tensor: tensor, tree)
    assert same(again, tree)
    assert [id(tensor) for tensor in tensors(again)] == [id(tensor) for tensor in tensors(tree)]
    assert same(from_numpy(tree), tree)


def test_the_comparison_can_fail() -> None:
    tree = (torch.arange(6), Graph(torch.arange(6), {"a": torch.ones(6, 2)}))
    first, second = cut(tree, [2, 4])
    assert same(join([first, second]), tree)
    assert not same(join([second, first]), tree)
    assert not same(first, tree)
    assert not same(map_tensors(lambda tensor: tensor.float(), tree), tree)
    assert not same(take(tree, [0, 1, 2, 3, 4, 4]), tree)
    assert not same(list(tree), tree)


def test_a_tensor_alone_is_a_nest() -> None:
    rows = torch.arange(10).reshape(5, 2)
    assert size_of(rows) == 5
    assert [piece.shape for piece in map_to_tensors(cut(rows, [3, 2]))] == [(3, 2), (2, 2)]
    assert same(join(cut(rows, [3, 2])), rows)


def map_to_tensors(trees: Sequence[object]) -> list[Tensor]:
    return [tree for tree in trees if isinstance(tree, Tensor)]


def test_values_of_the_whole_batch_go_to_every_part_as_they_are() -> None:
    shared = torch.tensor(0.5)
    marker = object()
    batch = {"x": torch.arange(4), "weight": shared, "epoch": 3, "mode": "train", "extra": marker}
    for piece in cut(batch, [1, 3]):
        assert isinstance(piece, dict)
        assert piece["weight"] is shared
        assert piece["extra"] is marker
        assert (piece["epoch"], piece["mode"]) == (3, "train")


def test_a_list_of_one_value_an_example_is_cut_along() -> None:
    batch = (torch.arange(3), ["a", "b", "c"], ("x", "y", "z"), [1.5, None, True])
    assert same(
        cut(batch, [2, 1]),
        [
            (torch.tensor([0, 1]), ["a", "b"], ("x", "y"), [1.5, None]),
            (torch.tensor([2]), ["c"], ("z",), [True]),
        ],
    )
    assert same(take(batch, [2, 0])[1:], (["c", "a"], ("z", "x"), [True, 1.5]))  # type: ignore[index]  # A tuple.


def test_a_list_of_another_length_belongs_to_the_whole_batch() -> None:
    batch = (torch.arange(3), ["cat", "dog"], Pair("one", "two"))
    for piece in cut(batch, [2, 1]):
        assert same(piece[1:], (["cat", "dog"], Pair("one", "two")))  # type: ignore[index]  # A tuple.


def test_whether_a_list_is_one_value_an_example_is_told_by_its_length_alone() -> None:
    """The price of it: a list of the whole batch is taken for more where it is just as long."""
    assert same(part((torch.arange(2), ["mean", "max"]), 0, 1), (torch.tensor([0]), ["mean"]))
    alone = (torch.arange(1), ["mean"])
    assert same(join([alone, alone]), (torch.tensor([0, 0]), ["mean", "mean"]))


def test_a_named_tuple_has_fields_and_not_one_value_an_example() -> None:
    batch = (torch.arange(2), Pair("one", "two"))
    assert same(cut(batch, [1, 1])[1], (torch.tensor([1]), Pair("one", "two")))


def test_a_list_of_tensors_is_a_container_and_no_dimension() -> None:
    batch = [torch.arange(2), torch.arange(2)]
    assert size_of(batch) == 2
    assert same(cut(batch, [1, 1])[1], [torch.tensor([1]), torch.tensor([1])])


def test_a_mapping_keeps_its_class_and_what_it_was_made_with() -> None:
    counts: defaultdict[str, Any] = defaultdict(list, x=torch.arange(4))
    piece = part(counts, 0, 2)
    assert isinstance(piece, defaultdict)
    assert piece.default_factory is list
    assert list(piece["x"]) == [0, 1]
    assert list(counts["x"]) == [0, 1, 2, 3]
    encoding = Encoding({"x": torch.arange(4)})
    encoding.tokenizer = "bert"  # type: ignore[attr-defined]  # Such classes carry more than pairs.
    assert vars(part(encoding, 0, 2))["tokenizer"] == "bert"
    assert list(encoding["x"]) == [0, 1, 2, 3]  # type: ignore[call-overload]  # A tensor.


@pytest.mark.parametrize("make", [dict, OrderedDict, Encoding, Frozen, Stored, Attributes, Sealed])
def test_no_use_of_a_mapping_changes_it_and_its_class_stays(make: Any) -> None:
    rows, names = torch.arange(4), ["a", "b", "c", "d"]
    batch = make({"x": rows, "names": names})
    uses: list[Callable[[], object]] = [
        lambda: part(batch, 0, 2),
        lambda: take(batch, [3, 0]),
        lambda: map_tensors(lambda tensor: tensor[:2] + 1, batch),
        lambda: join(cut(batch, [3, 1])),
        lambda: from_numpy(batch),
    ]
    for use in uses:
        assert type(use()) is make
        assert batch["x"] is rows
        assert batch["names"] is names
        assert size_of(batch) == 4


@pytest.mark.parametrize("batch", [Named("one", x=torch.arange(4)), Loud({"x": torch.arange(4)})])
def test_a_mapping_that_cannot_be_made_from_its_pairs_gives_a_dict(batch: Stored) -> None:
    (key,) = batch
    assert same(part(batch, 1, 3), {key: torch.tensor([1, 2])})
    assert size_of(batch) == 4


def test_keys_that_are_attributes_too_are_cut_in_both() -> None:
    piece = part(Attributes({"x": torch.arange(4)}), 0, 2)
    assert isinstance(piece, Attributes)
    assert piece.x is piece["x"]


def test_what_a_dict_keeps_besides_is_not_shared_with_its_parts() -> None:
    batch = Twice({"x": torch.arange(4)})
    piece = part(batch, 0, 2)
    assert isinstance(piece, Twice)
    assert len(piece["x"]) == len(piece.seen["x"]) == 2
    assert len(batch["x"]) == len(batch.seen["x"]) == 4


def test_a_dataclass_derives_again_what_it_derives() -> None:
    counted = Counted(torch.arange(4))
    assert size_of(counted) == 4
    first, second = cut(counted, [2, 2])
    assert isinstance(first, Counted)
    assert isinstance(second, Counted)
    assert (int(first.total), int(second.total)) == (1, 5)
    joined = join([first, second])
    assert isinstance(joined, Counted)
    assert int(joined.total) == 6


def test_joining_one_nest_copies_nothing() -> None:
    tree = (torch.arange(3), "text")
    assert join([tree]) is tree


@pytest.mark.parametrize(
    ("tree", "shapes"),
    [
        ((torch.ones(3, 2), torch.ones(4)), "(3, 2), (4,)"),
        ({"a": torch.ones(2), "b": [torch.ones(2), torch.ones(1)]}, "(2,), (2,), (1,)"),
        (Graph(torch.ones(0), torch.ones(1)), "(0,), (1,)"),
    ],
)
def test_tensors_of_different_lengths_are_refused_with_their_shapes(
    tree: object, shapes: str
) -> None:
    for use in (size_of, lambda tree: cut(tree, [1]), lambda tree: take(tree, [0])):
        with pytest.raises(ValueError, match="must agree in length along dimension 0") as caught:
            use(tree)
        assert str(caught.value).endswith(f"got shapes {shapes}")


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (torch.tensor(1.0), "float32[]"),
        ({"a": 1, "b": "text"}, "{a: int, b: str}"),
        ((), "()"),
        ("text", "str"),
        ([None, [2.5]], "(NoneType, (float))"),
        (Opaque(), "Opaque"),
    ],
)
def test_a_nest_without_a_batch_dimension_is_refused_with_its_structure(
    tree: object, text: str
) -> None:
    with pytest.raises(ValueError, match="must hold a tensor with a batch dimension") as caught:
        size_of(tree)
    assert str(caught.value).endswith(
        f"got {text}; return tuples, dicts or dataclasses of tensors from the collate function"
    )


@pytest.mark.parametrize("sizes", [[1], [2, 2], [3, 1], []])
def test_a_cut_must_use_every_example(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot cut 3 examples into") as caught:
        cut(torch.arange(3), sizes)
    assert str(caught.value).endswith(str(tuple(sizes)))


def test_ragged_batches_cannot_be_joined_and_the_error_names_the_ways_out() -> None:
    widths = (5, 5, 7, 9)
    with pytest.raises(ValueError, match="these batches are ragged") as caught:
        join([(torch.ones(2, width), torch.ones(2)) for width in widths])
    assert str(caught.value) == (
        "batches can be joined only where all but dimension 0 agrees, and these batches are "
        "ragged: got float32[2, 5] and float32[2, 7]; pad to one length in the collate function, "
        "or let the loader give batches of `desired` examples, so that nothing must be joined"
    )


def test_what_differs_in_another_way_than_in_length_is_not_called_ragged() -> None:
    for other in (torch.ones(2, 5).double(), torch.ones(2), 5):
        with pytest.raises(ValueError, match=r"agrees, got float32\[2, 5\] and \w+") as caught:
            join([(torch.ones(2, 5), torch.ones(2)), (other, torch.ones(2))])
        assert "ragged" not in str(caught.value)
        assert "in number of dimensions and dtype too" in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "complaint"),
    [
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "all but dimension 0 agrees"),
        (torch.ones(2, 1), torch.ones(2), "all but dimension 0 agrees"),
        ((torch.ones(2), torch.ones(())), (torch.ones(2), torch.ones(2)), "dimension 0 agrees"),
        ((torch.ones(2), torch.ones(2)), (torch.ones(2), torch.ones(())), "dimension 0 agrees"),
        ((torch.ones(2), torch.ones(2)), (torch.ones(2), 5), "dimension 0 agrees"),
        (
            (torch.ones(2), torch.tensor(1)),
            (torch.ones(2), torch.tensor(2)),
            "got 1 and 2; a list .* DataLoader",
        ),
        ((torch.ones(2), 5), (torch.ones(2), 6), "must agree in 5"),
        ((torch.ones(2), "a"), (torch.ones(2), "b"), "must agree in 'a'"),
        ((torch.ones(2),), (torch.ones(2), torch.ones(2)), "must have one structure"),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "must have one structure"),
        ({"a": torch.ones(2)}, [torch.ones(2)], "must have one structure"),
        ((torch.ones(2), [torch.ones(2)]), (torch.ones(2), None), "must have one structure"),
        ((torch.ones(2), ["a", "b"]), (torch.ones(3), ["a", "b"]), "must agree in"),
    ],
)
def test_batches_that_differ_in_kind_cannot_be_joined(
    one: object, other: object, complaint: str
) -> None:
    if complaint == "must agree in":
        # A list as long as one batch but not as the other: of the whole batch, and the same.
        assert same(join([one, other]), (torch.ones(5), ["a", "b"]))
        return
    with pytest.raises(ValueError, match=complaint):
        join([one, other])


def test_joining_gives_the_mapping_order_of_the_first_only_if_all_have_it() -> None:
    one = {"a": torch.zeros(1), "b": torch.ones(1)}
    swapped = {"b": torch.ones(1), "a": torch.zeros(1)}
    with pytest.raises(ValueError, match="one structure"):
        join([one, swapped])


def test_arrays_become_tensors_over_the_same_memory() -> None:
    array = np.arange(6.0).reshape(3, 2)
    tensor = from_numpy(array)
    assert isinstance(tensor, Tensor)
    array[0, 0] = 9
    assert tensor[0, 0] == 9


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6)[::-1],
        np.arange(6.0).reshape(3, 2)[:, ::-1],
        np.broadcast_to(np.arange(3), (4, 3)),
        np.arange(6)[::2],
        np.frombuffer(b"\x01\x02\x03", dtype=np.uint8),
        np.zeros((0, 3), dtype=np.float32),
        np.array(5),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.arange(3, dtype=np.float16),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_any_array_of_numbers_becomes_a_tensor_without_a_warning(
    array: "np.ndarray[Any, Any]",
) -> None:
    before = array.copy()
    tensor = from_numpy(array)
    assert isinstance(tensor, Tensor)
    assert tensor.numpy().dtype == array.dtype
    np.testing.assert_array_equal(tensor.numpy(), before)


def test_a_read_only_array_is_not_written_through() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    tensor = from_numpy(array)
    assert isinstance(tensor, Tensor)
    tensor[0] = 9
    assert array[0] == 0


def test_an_array_of_text_is_cut_along_like_a_list_of_text() -> None:
    batch = from_numpy({"x": np.arange(3), "name": np.array(["a", "b", "c"])})
    assert same(cut(batch, [2, 1])[1], {"x": torch.tensor([2]), "name": ["c"]})


def test_arrays_are_found_at_any_depth() -> None:
    tree = Graph({"a": [np.arange(2)]}, Pair(np.arange(2), "text"))
    found = from_numpy(tree)
    assert same(found, Graph({"a": [torch.arange(2)]}, Pair(torch.arange(2), "text")))


@pytest.mark.parametrize("tree", [torch.ones(0, 3), {"x": torch.ones(0), "names": []}])
def test_an_empty_batch_has_size_zero_and_can_be_cut_and_joined(tree: object) -> None:
    assert size_of(tree) == 0
    assert cut(tree, []) == []
    assert same(take(tree, []), tree)
    assert same(join([tree, tree]), tree)
    assert same(part(tree, 0, 0), tree)


def test_no_rows_of_a_full_batch_are_an_empty_batch() -> None:
    batch = (torch.ones(3, 2), ["a", "b", "c"])
    assert same(take(batch, []), (torch.ones(0, 2), []))


def test_gradients_flow_through_parts_and_joins() -> None:
    rows = torch.ones(4, requires_grad=True)
    joined = join(cut(rows, [1, 3]))
    assert isinstance(joined, Tensor)
    joined.sum().backward()
    assert same(rows.grad, torch.ones(4))


def test_every_tensor_is_found_depth_first() -> None:
    one, two, three, four = (torch.tensor(number) for number in range(4))
    found = tensors(({"a": one, "b": [two]}, Graph(three, {"deep": (four,)}), "text"))
    assert [id(tensor) for tensor in found] == [id(tensor) for tensor in (one, two, three, four)]


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (torch.ones(8, 3), "float32[8, 3]"),
        ((torch.ones(8, 3), torch.ones(8).long()), "(float32[8, 3], int64[8])"),
        ({"a": torch.ones(1), 2: None}, "{a: float32[1], 2: NoneType}"),
        (["x"] * 9, "list of 9"),
        (["x"] * 8, "(" + ", ".join(["str"] * 8) + ")"),
        (Graph(torch.ones(2), 1), "(float32[2], int, str)"),
        (Pair("a", 1), "(str, int)"),
        (Shared(torch.ones(5, 5)), "Shared(float32[5, 5])"),
        (Shared([torch.ones(5), 1]), "Shared((float32[5], int))"),
        (Examples([torch.ones(5), "x"]), "Examples(float32[5], str)"),
        (Examples(["x"] * 9), "Examples of 9"),
        (
            RaggedBatch(((torch.ones(2, 5), 1), (torch.ones(3, 7), 1))),
            "RaggedBatch((float32[2, 5], int), (float32[3, 7], int))",
        ),
        (RaggedBatch((torch.ones(2),) * 9), "RaggedBatch of 9"),
        (3.5, "float"),
    ],
)
def test_a_structure_is_described_in_short(tree: object, text: str) -> None:
    assert describe(tree) == text


def test_parts_of_all_sizes_follow_one_another_without_gap_or_overlap() -> None:
    rows = torch.arange(5)
    for sizes in itertools.product(range(6), repeat=3):
        if sum(sizes) == 5:
            assert torch.cat(map_to_tensors(cut(rows, sizes))).tolist() == [0, 1, 2, 3, 4]


@drawn
@given(
    sizes=st.lists(st.integers(0, 4), min_size=2, max_size=5),
    widths=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    kind=st.sampled_from([tuple, list]),
)
def test_the_short_way_of_plain_tensors_gives_what_slices_give(
    sizes: list[int], widths: list[int], kind: Any
) -> None:
    rows = [tensor_of(sum(sizes), width, 10 * width) for width in widths]
    batch = kind(rows)
    assert plain_size(batch) == size_of(batch) == sum(sizes)
    assert from_numpy(batch) is batch
    assert unwrapped(batch) is batch
    assert same(map_tensors(torch.neg, batch), kind(-tensor for tensor in rows))
    stops = list(itertools.accumulate(sizes, initial=0))
    expected = [kind(t[start:stop] for t in rows) for start, stop in itertools.pairwise(stops)]
    assert same(cut(batch, sizes), expected)


@pytest.mark.parametrize(
    "tree",
    [
        torch.ones(2),
        (),
        (torch.ones(2), torch.tensor(1.0)),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), "text"),
        (torch.ones(2), [torch.ones(2)]),
        (torch.ones(2), Shared(torch.ones(2))),
        (torch.ones(2), torch.nn.Parameter(torch.ones(2))),
        Pair(torch.ones(2), torch.ones(2)),
        Examples([torch.ones(2), torch.ones(2)]),
        {"x": torch.ones(2)},
    ],
    ids=describe,
)
def test_only_plain_tuples_and_lists_of_bare_tensors_take_the_short_way(tree: object) -> None:
    assert plain_size(tree) is None


def test_what_is_shared_goes_whole_to_every_part_and_is_not_counted() -> None:
    for value in (torch.eye(5), torch.arange(3), torch.tensor(1), ["a", "b", "c"], {"x": [1]}):
        shared = Shared(value)
        batch = {"x": torch.arange(3), "inside": [shared, {}]}
        assert size_of(batch) == 3
        uses = [*cut(batch, [1, 2]), part(batch, 1, 2), take(batch, [2, 2])]
        assert all(use["inside"][0] is shared for use in uses)  # type: ignore[index]  # Dicts.


def test_tensors_inside_what_is_shared_are_mapped_and_the_mark_stays() -> None:
    batch = (torch.arange(3), Shared({"a": np.arange(2), "b": [torch.arange(5)]}))
    mapped = map_tensors(lambda tensor: tensor + 1, from_numpy(batch))
    expected = (
        torch.arange(1, 4),
        Shared({"a": torch.arange(1, 3), "b": [torch.arange(1, 6)]}),
    )
    assert same(mapped, expected)
    assert len(list(tensors(mapped))) == 3


def test_batches_are_joined_where_what_they_share_is_equal() -> None:
    value = {"edges": torch.eye(4), "names": ["a", "b"], "scale": 2.0}
    one = (torch.arange(2), Shared(value))
    other = (torch.arange(3), Shared(map_tensors(Tensor.clone, value)))
    assert same(join([one, other]), (torch.tensor([0, 1, 0, 1, 2]), one[1]))
    unequal_to_itself = Shared(torch.tensor([float("nan")]))
    again = [(torch.arange(1), unequal_to_itself), (torch.arange(1), unequal_to_itself)]
    assert same(join(again)[1], unequal_to_itself) is False  # type: ignore[index]  # The comparison's nan.
    assert join(again)[1] is unequal_to_itself  # type: ignore[index]  # A tuple.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.eye(3), torch.eye(3) + 1),
        (torch.eye(3), torch.eye(4)),
        (torch.eye(3), torch.eye(3).double()),
        (torch.eye(3), [torch.eye(3)]),
        ([torch.eye(3)], (torch.eye(3),)),
        ([torch.eye(3)], [torch.eye(3), torch.eye(3)]),
        ({"a": torch.eye(3)}, {"b": torch.eye(3)}),
        ({"a": torch.eye(3), "n": 1}, {"a": torch.eye(3), "n": 2}),
    ],
)
def test_batches_that_share_different_values_cannot_be_joined(one: object, other: object) -> None:
    batches = [(torch.ones(2), Shared(one)), (torch.ones(2), Shared(other))]
    with pytest.raises(ValueError, match=r"must hold equal Shared values, got Shared.* and Shared"):
        join([batches[0], batches[0], batches[1]])


def test_marked_and_unmarked_cannot_be_joined() -> None:
    images = [torch.ones(2), torch.ones(2)]
    members = [Shared(torch.ones(2)), Shared(images), Examples(images), images, tuple(images), "a"]
    for one, other in itertools.permutations(members, 2):
        if not isinstance(one, Shared | Examples) and not isinstance(other, Shared | Examples):
            continue
        if isinstance(one, Shared) and isinstance(other, Shared):
            continue
        with pytest.raises(ValueError, match="must have one structure"):
            join([(torch.ones(2), one), (torch.ones(2), other)])
    for one, other in itertools.permutations([torch.ones(2), Shared(torch.ones(2))]):
        with pytest.raises(ValueError, match=r"batches (that are joined must|can be joined only)"):
            join([(torch.ones(2), one), (torch.ones(2), other)])


def test_a_batch_of_nothing_but_shared_values_has_no_size() -> None:
    with pytest.raises(ValueError, match=r"dimension, got \(Shared\(float32\[5, 5\]\)\); return"):
        size_of((Shared(torch.ones(5, 5)),))


def test_what_is_shared_is_unwrapped_at_any_depth() -> None:
    value = torch.eye(2)
    batch = Graph({"a": [Shared(value)]}, Pair(torch.ones(3), Shared(Shared((value, "text")))))
    found = unwrapped(batch)
    assert same(found, Graph({"a": [value]}, Pair(torch.ones(3), (value, "text"))))
    assert isinstance(batch.edges, Pair), "the batch itself stays"
    assert isinstance(batch.edges.label, Shared)
    assert unwrapped(Shared(value)) is value


@drawn
@given(rows=st.integers(1, 4), data=st.data())
def test_a_nest_without_anything_shared_is_its_own_unwrapping(
    rows: int, data: st.DataObject
) -> None:
    tree = data.draw(trees(rows))
    once = unwrapped(tree)
    assert "Shared" not in describe(once)
    assert unwrapped(once) is once
    if "Shared" not in describe(tree):
        assert once is tree


def test_marks_survive_the_way_from_a_worker() -> None:
    batch = (Shared(torch.eye(2)), Examples([torch.ones(1), "text"]), RaggedBatch((torch.ones(2),)))
    assert same(pickle.loads(pickle.dumps(batch)), batch)


def test_examples_count_and_must_agree_with_the_tensors() -> None:
    items = Examples([torch.ones(3, 4), torch.ones(3, 7)])
    assert size_of(items) == 2
    assert size_of({"images": items, "labels": torch.ones(2)}) == 2
    with pytest.raises(ValueError, match=r"0, got shapes 2 examples, \(3,\)$"):
        size_of((items, torch.ones(3)))
    with pytest.raises(ValueError, match=r"0, got shapes 2 examples, 1 examples$"):
        size_of((items, Examples(["text"])))


def test_ragged_is_said_only_where_nothing_else_is_wrong() -> None:
    narrow, wide = torch.ones(2, 5), torch.ones(2, 7)
    with pytest.raises(RaggedError):
        join([{"x": narrow, "y": narrow}, {"x": wide, "y": narrow}])
    for other in (wide.double(), torch.ones(2), "text"):
        for first, second in itertools.permutations([(narrow, wide), (narrow, other)]):
            batches = [tuple(column) for column in zip(first, second, strict=True)]
            with pytest.raises(ValueError, match=r"agree") as caught:
                join(batches)
            assert type(caught.value) is ValueError
        with pytest.raises(ValueError, match=r"agree") as caught:
            join([(narrow, narrow), (wide, narrow), (other, narrow)])
        assert type(caught.value) is ValueError


@pytest.mark.parametrize("use", [lambda b: part(b, 0, 1), lambda b: cut(b, [1, 3])])
def test_pieces_are_no_batch_that_can_be_cut(use: Callable[[object], object]) -> None:
    with pytest.raises(AssertionError, match="one by one"):
        use(RaggedBatch((torch.ones(2, 5), torch.ones(2, 7))))
