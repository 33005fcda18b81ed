"""Batch trees: measure, cut and join nested tensors along dimension 0.

A batch tree is a tensor, or any nesting of tuples, named tuples, lists, mappings and dataclasses
that contains tensors. Its size, the number of examples, is the length of its tensors along
dimension 0. What happens to each leaf when a tree of ``n`` examples is cut:

* A tensor with dimensions, and a list marked as ``Examples``, are cut along dimension 0.
* A list or tuple of ``n`` plain values (strings, numbers) is cut as well: torch's default collate
  function makes such a list of the texts of a batch.
* Every other plain value, a tensor without dimensions, and a value marked as ``Shared`` belong to
  the batch as a whole: each part receives the value undivided.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Final, TypeGuard

import numpy as np
import torch
from torch import Tensor

from autobatch.data.containers import PLAIN, children_of, is_named_tuple, rebuilt
from autobatch.data.containers import BatchTree as BatchTree  # Exported from here.
from autobatch.data.containers import tensors as tensors
from autobatch.data.markers import MARKERS, Examples, RaggedBatch, Shared

LIST_OF_EXAMPLES_HINT: Final = (
    "; a list is read as a list of batches: if data is a list of examples, pass "
    "DataLoader(data, batch_size=..., shuffle=True)"
)


class RaggedError(ValueError):
    """Batches differ only in shape beyond dimension 0, so they cannot be joined."""


def size_of(tree: BatchTree) -> int:
    """Return the number of examples: the common length of all tensors along dimension 0.

    Raises:
        ValueError: If no tensor has a dimension 0, or two tensors differ in length along it.
    """
    size = plain_size(tree)
    if size is not None:
        return size
    if isinstance(tree, RaggedBatch):
        return sum(map(size_of, tree.pieces))
    found = list(per_example(tree))
    if not found:
        raise ValueError(
            f"a batch must hold a tensor with a batch dimension, got {describe(tree)}; return "
            "tuples, dicts or dataclasses of tensors from the collate function"
        )
    size = len(found[0])
    if any(len(item) != size for item in found):
        shapes = [
            str(tuple(item.shape)) if isinstance(item, Tensor) else f"{len(item)} examples"
            for item in found
        ]
        raise ValueError(
            "the tensors of a batch must agree in length along dimension 0, got shapes "
            + ", ".join(shapes)
        )
    return size


def plain_size(tree: BatchTree) -> int | None:
    """Return the size of a plain tuple or list of tensors; None for any other tree.

    Most batches are such tuples. This fast path keeps the steps of small models fast.
    """
    if type(tree) is not tuple and type(tree) is not list:
        return None
    size = None
    for member in tree:
        if type(member) is not Tensor or not member.ndim:
            return None
        length = member.shape[0]
        if size is None:
            size = length
        elif size != length:
            return None
    return size


def per_example(tree: BatchTree) -> Iterator[Tensor | Examples]:
    """Yield the tensors and lists with one row per example, except lists of plain values."""
    if isinstance(tree, Tensor):
        if tree.ndim:
            yield tree
    elif isinstance(tree, Examples):
        yield tree
    elif not isinstance(tree, Shared):
        for child in children_of(tree) or ():
            yield from per_example(child)


def map_tensors(function: Callable[[Tensor], Tensor], tree: BatchTree) -> BatchTree:
    """Return a tree like this one with ``function`` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is tuple or type(tree) is list:  # A fast path: half the time of the code below.
        return type(tree)([map_tensors(function, child) for child in tree])
    children = children_of(tree)
    if children is None:
        return tree
    return rebuilt(tree, [map_tensors(function, child) for child in children])


def from_numpy(tree: BatchTree) -> BatchTree:
    """Return the tree with every NumPy array as a tensor over the same memory.

    Read-only arrays and arrays with negative strides are copied, because torch has no such tensors.
    An array of strings or objects becomes a list. A plain tuple or list of tensors is returned as
    it is.
    """
    if isinstance(tree, np.ndarray):
        if tree.dtype.kind not in "biufc":
            return tree.tolist()
        shareable = tree.flags.writeable and min(tree.strides, default=0) >= 0
        return torch.from_numpy(tree if shareable else tree.copy())
    if plain_size(tree) is not None:
        return tree
    children = children_of(tree)
    if children is None:
        return tree
    return rebuilt(tree, [from_numpy(child) for child in children])


def unwrapped(tree: BatchTree) -> BatchTree:
    """Return the tree with each ``Shared`` replaced by its value; itself if it has none."""
    if isinstance(tree, Shared):
        return unwrapped(tree.value)
    children = children_of(tree)
    if children is None or plain_size(tree) is not None:
        return tree
    inside = [unwrapped(child) for child in children]
    return tree if all(map(operator.is_, inside, children)) else rebuilt(tree, inside)


def take(tree: BatchTree, rows: Sequence[int]) -> BatchTree:
    """Return a copy of the examples at ``rows``, in any order and with repeats."""
    index = torch.as_tensor(rows, dtype=torch.int64)  # An empty list would become floats.
    return _select(
        tree,
        size_of(tree),
        lambda tensor: tensor.index_select(0, index.to(tensor.device)),
        lambda values: [map_tensors(Tensor.clone, values[row]) for row in rows],
    )


def part(tree: BatchTree, start: int, stop: int) -> BatchTree:
    """Return the examples from ``start`` up to ``stop``, as views of the same memory."""
    return _select(
        tree, size_of(tree), lambda tensor: tensor[start:stop], lambda values: values[start:stop]
    )


def cut(tree: BatchTree, sizes: Sequence[int]) -> list[BatchTree]:
    """Return consecutive parts of the given sizes, as views of the same memory.

    Raises:
        ValueError: If the sum of the sizes is not the size of the tree.
    """
    length = size_of(tree)
    if sum(sizes) != length:
        raise ValueError(f"cannot cut {length} examples into {tuple(sizes)}")
    return [tree] if len(sizes) == 1 else list(_cut(tree, length, tuple(sizes)))


def join(trees: Sequence[BatchTree]) -> BatchTree:
    """Return one tree with the examples of all trees, in order; a single tree as it is.

    Raises:
        RaggedError: If the trees differ only in their shapes beyond dimension 0.
        ValueError: If types, structures or values that belong to the batch as a whole differ.
    """
    if len(trees) == 1:
        return trees[0]
    return _join(trees, [size_of(tree) for tree in trees])


def describe(tree: BatchTree) -> str:
    """Return a short description of the structure: ``"(float32[8, 3, 32, 32], int64[8])"``."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')}{list(tree.shape)}"
    children = children_of(tree)
    if children is None:
        return type(tree).__name__
    if isinstance(tree, Mapping):
        inside = (f"{key}: {describe(child)}" for key, child in tree.items())
        return "{" + ", ".join(inside) + "}"
    if isinstance(tree, RaggedBatch):
        children = tree.pieces
    if len(children) > 8:
        return f"{type(tree).__name__} of {len(children)}"
    name = type(tree).__name__ if isinstance(tree, MARKERS) else ""
    return f"{name}(" + ", ".join(map(describe, children)) + ")"


def _is_values(tree: BatchTree, size: int) -> TypeGuard[list[object] | tuple[object, ...]]:
    """Return whether this is a list with one item per example: ``Examples``, or plain values."""
    if isinstance(tree, Examples):
        return True
    return (
        isinstance(tree, (list, tuple))
        and not is_named_tuple(tree)
        and len(tree) == size
        and all(isinstance(value, PLAIN) for value in tree)
    )


def _select(
    tree: BatchTree,
    size: int,
    rows: Callable[[Tensor], Tensor],
    values: Callable[[list[object] | tuple[object, ...]], Sequence[object]],
) -> BatchTree:
    if isinstance(tree, Tensor):
        return rows(tree) if tree.ndim else tree
    assert not isinstance(tree, RaggedBatch), "the pieces of a RaggedBatch are cut one by one"
    if _is_values(tree, size):
        return type(tree)(values(tree))
    children = children_of(tree)
    if children is None or isinstance(tree, Shared):
        return tree
    return rebuilt(tree, [_select(child, size, rows, values) for child in children])


def _cut(tree: BatchTree, length: int, sizes: tuple[int, ...]) -> Sequence[BatchTree]:
    """The parts of the given sizes; there is never exactly one size."""
    if isinstance(tree, Tensor):
        return tree.split_with_sizes(sizes) if tree.ndim else [tree] * len(sizes)
    assert not isinstance(tree, RaggedBatch), "the pieces of a RaggedBatch are cut one by one"
    if _is_values(tree, length):
        items = iter(tree)
        return [type(tree)(islice(items, size)) for size in sizes]
    children = children_of(tree)
    if children is None or isinstance(tree, Shared):
        return [tree] * len(sizes)
    columns = [_cut(child, length, sizes) for child in children]
    rows = zip(*columns, strict=True) if columns else [()] * len(sizes)
    return [rebuilt(tree, row) for row in rows]


def _join(trees: Sequence[BatchTree], sizes: Sequence[int]) -> BatchTree:
    first = trees[0]
    if isinstance(first, Tensor):
        return _join_tensors(trees)
    kinds = set(map(type, trees))
    if len(kinds) > 1 and not kinds.isdisjoint(MARKERS):
        raise _structures_differ(trees)
    if isinstance(first, Shared):
        return _join_shared(trees)
    if all(_is_values(tree, size) for tree, size in zip(trees, sizes, strict=True)):
        return type(first)(chain.from_iterable(trees))  # type: ignore[call-arg, arg-type]  # Lists or tuples.
    families = [children_of(tree) for tree in trees]
    if families[0] is None:
        if any(tree is not first and tree != first for tree in trees):
            other = next(tree for tree in trees if tree is not first and tree != first)
            raise ValueError(
                f"batches that are joined must agree in {first!r}, got {other!r}"
                + LIST_OF_EXAMPLES_HINT
            )
        return first
    if any(f is None or len(f) != len(families[0]) for f in families) or _keys_differ(trees):
        raise _structures_differ(trees)
    columns = zip(*(family for family in families if family is not None), strict=True)
    return rebuilt(first, _join_each(columns, sizes))


def _join_each(columns: Iterable[Sequence[BatchTree]], sizes: Sequence[int]) -> list[BatchTree]:
    """Join each column; raise a RaggedError only if no column raises another error."""
    joined, ragged = [], None
    for column in columns:
        try:
            joined.append(_join(column, sizes))
        except RaggedError as error:
            ragged = ragged or error
    if ragged is not None:
        raise ragged from None
    return joined


def _structures_differ(trees: Sequence[BatchTree]) -> ValueError:
    return ValueError(
        "batches that are joined must have one structure, got "
        + " and ".join(sorted({describe(tree) for tree in trees}))
    )


def _keys_differ(trees: Sequence[BatchTree]) -> bool:
    first = trees[0]
    return isinstance(first, Mapping) and any(
        not isinstance(tree, Mapping) or list(tree) != list(first) for tree in trees
    )


def _join_shared(trees: Sequence[BatchTree]) -> BatchTree:
    for tree in trees:
        if not is_same(tree, trees[0]):
            raise ValueError(
                "batches that are joined must hold equal Shared values, got "
                f"{describe(trees[0])} and {describe(tree)}, which differ; let the loader give "
                "batches of `desired` examples, so that nothing must be joined"
            )
    return trees[0]


def is_same(one: BatchTree, other: BatchTree) -> bool:
    """Return whether two trees have the same classes and equal values."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple) and all(type(item) in PLAIN for item in one):
        return bool(one == other)  # A fast path for long lists of plain values.
    children, others = children_of(one), children_of(other)
    if children is None or others is None:
        return bool(one == other)
    if isinstance(one, Mapping) and isinstance(other, Mapping) and list(one) != list(other):
        return False
    return len(children) == len(others) and all(map(is_same, children, others))


def _join_tensors(trees: Sequence[BatchTree]) -> Tensor:
    parts = [tree for tree in trees if isinstance(tree, Tensor)]
    first = parts[0]
    if len(parts) == len(trees) and not any(tensor.ndim for tensor in parts):
        if not all(torch.equal(tensor, first) for tensor in parts):
            other = next(tensor for tensor in parts if not torch.equal(tensor, first))
            raise ValueError(
                "batches that are joined must agree in their scalars, got "
                f"{first.tolist()} and {other.tolist()}{LIST_OF_EXAMPLES_HINT}"
            )
        return first
    for tree in trees:
        if not isinstance(tree, Tensor) or (tree.ndim, tree.dtype) != (first.ndim, first.dtype):
            raise ValueError(
                "batches can be joined only where all but dimension 0 agrees, got "
                f"{describe(first)} and {describe(tree)}; make the collate function give all "
                "batches tensors that agree in number of dimensions and dtype too"
            )
    for tensor in parts:
        if tensor.shape[1:] != first.shape[1:]:
            raise RaggedError(
                "batches can be joined only where all but dimension 0 agrees, and these batches "
                f"are ragged: got {describe(first)} and {describe(tensor)}; pad to one length in "
                "the collate function, or let the loader give batches of `desired` examples, so "
                "that nothing must be joined"
            )
    return torch.cat(parts)
