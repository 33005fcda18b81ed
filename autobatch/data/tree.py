"""Nested tensors: measured, cut and joined along dimension 0.

A nest is a tensor or any nesting of tuples, named tuples, lists, mappings and dataclasses that
holds some. Its size is the length of its tensors along dimension 0. A list or tuple of plain
values (strings, numbers) as long as that holds one value an example, as torch's default collate
makes of text, and is cut along; every other plain value, and a tensor without dimensions, belongs
to the batch as a whole and goes to every part. So does what is marked as ``Shared``, whatever its
length; and a list that is marked as ``Examples`` holds one item an example, of any shapes.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Final, TypeGuard

import numpy as np
import torch
from torch import Tensor

from autobatch.data.containers import PLAIN, children_of, is_named_tuple, rebuilt
from autobatch.data.containers import BatchTree as BatchTree  # With all that can be done with one.
from autobatch.data.containers import tensors as tensors
from autobatch.data.markers import MARKS, Examples, RaggedBatch, Shared

WAY_OUT_OF_A_LIST: Final = (
    "; a list is read as one of batches: if data is a list of examples, pass "
    "DataLoader(data, batch_size=..., shuffle=True)"
)


class RaggedError(ValueError):
    """Batches differ only in shape beyond dimension 0, so they cannot be joined."""


def size_of(nest: BatchTree) -> int:
    """Return the number of examples: the common length of all tensors along dimension 0.

    Raises:
        ValueError: If nothing says how many, or two disagree.
    """
    size = plain_size(nest)
    if size is not None:
        return size
    if isinstance(nest, RaggedBatch):
        return sum(map(size_of, nest.pieces))
    found = list(counted(nest))
    if not found:
        raise ValueError(
            f"a batch must hold a tensor with a batch dimension, got {describe(nest)}; return "
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


def plain_size(nest: BatchTree) -> int | None:
    """Return the size of a plain tuple or list of bare tensors; None for any other nest.

    So are most batches, and they take short ways, for a small model's step lasts microseconds.
    """
    if type(nest) is not tuple and type(nest) is not list:
        return None
    size = None
    for member in nest:
        if type(member) is not Tensor or not member.ndim:
            return None
        length = member.shape[0]
        if size is None:
            size = length
        elif size != length:
            return None
    return size


def counted(nest: BatchTree) -> Iterator[Tensor | Examples]:
    """Yield all that is as long as the batch has examples, except lists of plain values."""
    if isinstance(nest, Tensor):
        if nest.ndim:
            yield nest
    elif isinstance(nest, Examples):
        yield nest
    elif not isinstance(nest, Shared):
        for child in children_of(nest) or ():
            yield from counted(child)


def map_tensors(function: Callable[[Tensor], Tensor], nest: BatchTree) -> BatchTree:
    """Return the same nest with ``function`` applied to every tensor."""
    if isinstance(nest, Tensor):
        return function(nest)
    if type(nest) is tuple or type(nest) is list:  # The same as below, in half the time.
        return type(nest)([map_tensors(function, child) for child in nest])
    children = children_of(nest)
    if children is None:
        return nest
    return rebuilt(nest, [map_tensors(function, child) for child in children])


def from_numpy(nest: BatchTree) -> BatchTree:
    """Return the nest with every NumPy array as a tensor over the same memory.

    A read-only or reversed array is copied, for torch has no such tensors; one of text or objects
    becomes a list. A plain tuple or list of bare tensors is returned as it is.
    """
    if isinstance(nest, np.ndarray):
        if nest.dtype.kind not in "biufc":
            return nest.tolist()
        shareable = nest.flags.writeable and min(nest.strides, default=0) >= 0
        return torch.from_numpy(nest if shareable else nest.copy())
    if plain_size(nest) is not None:
        return nest
    children = children_of(nest)
    if children is None:
        return nest
    return rebuilt(nest, [from_numpy(child) for child in children])


def unwrapped(nest: BatchTree) -> BatchTree:
    """Return the nest with the values of ``Shared`` in its place, or itself if there is none."""
    if isinstance(nest, Shared):
        return unwrapped(nest.value)
    children = children_of(nest)
    if children is None or plain_size(nest) is not None:
        return nest
    inside = [unwrapped(child) for child in children]
    return nest if all(map(operator.is_, inside, children)) else rebuilt(nest, inside)


def take(nest: BatchTree, rows: Sequence[int]) -> BatchTree:
    """Return the examples ``rows`` (any order, repeats allowed), copied."""
    index = torch.as_tensor(rows, dtype=torch.int64)  # Else no rows at all would be floats.
    return _select(
        nest,
        size_of(nest),
        lambda tensor: tensor.index_select(0, index.to(tensor.device)),
        lambda values: [map_tensors(Tensor.clone, values[row]) for row in rows],
    )


def part(nest: BatchTree, start: int, stop: int) -> BatchTree:
    """Return the examples ``start`` to ``stop`` as views of the same memory."""
    return _select(
        nest, size_of(nest), lambda tensor: tensor[start:stop], lambda values: values[start:stop]
    )


def cut(nest: BatchTree, sizes: Sequence[int]) -> list[BatchTree]:
    """Return consecutive parts of the given sizes, as views of the same memory.

    Raises:
        ValueError: If the sizes do not add up to the nest's own.
    """
    length = size_of(nest)
    if sum(sizes) != length:
        raise ValueError(f"cannot cut {length} examples into {tuple(sizes)}")
    return [nest] if len(sizes) == 1 else list(_cut(nest, length, tuple(sizes)))


def join(nests: Sequence[BatchTree]) -> BatchTree:
    """Return one nest with the examples of all, in order; a single one is returned as it is.

    Raises:
        RaggedError: If shapes differ beyond dimension 0, and nothing else does.
        ValueError: If types or structures differ, or a value of the batch as a whole does.
    """
    if len(nests) == 1:
        return nests[0]
    return _join(nests, [size_of(nest) for nest in nests])


def describe(nest: BatchTree) -> str:
    """Return the structure as short text: ``"(float32[8, 3, 32, 32], int64[8])"``."""
    if isinstance(nest, Tensor):
        return f"{str(nest.dtype).removeprefix('torch.')}{list(nest.shape)}"
    children = children_of(nest)
    if children is None:
        return type(nest).__name__
    if isinstance(nest, Mapping):
        inside = (f"{key}: {describe(child)}" for key, child in nest.items())
        return "{" + ", ".join(inside) + "}"
    if isinstance(nest, RaggedBatch):
        children = nest.pieces
    if len(children) > 8:
        return f"{type(nest).__name__} of {len(children)}"
    name = type(nest).__name__ if isinstance(nest, MARKS) else ""
    return f"{name}(" + ", ".join(map(describe, children)) + ")"


def _is_values(nest: BatchTree, size: int) -> TypeGuard[list[object] | tuple[object, ...]]:
    """Whether this is one item an example: examples, or plain values."""
    if isinstance(nest, Examples):
        return True
    return (
        isinstance(nest, (list, tuple))
        and not is_named_tuple(nest)
        and len(nest) == size
        and all(isinstance(value, PLAIN) for value in nest)
    )


def _select(
    nest: BatchTree,
    size: int,
    rows: Callable[[Tensor], Tensor],
    values: Callable[[list[object] | tuple[object, ...]], Sequence[object]],
) -> BatchTree:
    if isinstance(nest, Tensor):
        return rows(nest) if nest.ndim else nest
    assert not isinstance(nest, RaggedBatch), "pieces are cut one by one"
    if _is_values(nest, size):
        return type(nest)(values(nest))
    children = children_of(nest)
    if children is None or isinstance(nest, Shared):
        return nest
    return rebuilt(nest, [_select(child, size, rows, values) for child in children])


def _cut(nest: BatchTree, length: int, sizes: tuple[int, ...]) -> Sequence[BatchTree]:
    """One part for each of two or more sizes, or of none."""
    if isinstance(nest, Tensor):
        return nest.split_with_sizes(sizes) if nest.ndim else [nest] * len(sizes)
    assert not isinstance(nest, RaggedBatch), "pieces are cut one by one"
    if _is_values(nest, length):
        items = iter(nest)
        return [type(nest)(islice(items, size)) for size in sizes]
    children = children_of(nest)
    if children is None or isinstance(nest, Shared):
        return [nest] * len(sizes)
    columns = [_cut(child, length, sizes) for child in children]
    rows = zip(*columns, strict=True) if columns else [()] * len(sizes)
    return [rebuilt(nest, row) for row in rows]


def _join(nests: Sequence[BatchTree], sizes: Sequence[int]) -> BatchTree:
    first = nests[0]
    if isinstance(first, Tensor):
        return _join_tensors(nests)
    kinds = set(map(type, nests))
    if len(kinds) > 1 and not kinds.isdisjoint(MARKS):
        raise _structures_differ(nests)
    if isinstance(first, Shared):
        return _join_shared(nests)
    if all(_is_values(nest, size) for nest, size in zip(nests, sizes, strict=True)):
        return type(first)(chain.from_iterable(nests))  # type: ignore[call-arg, arg-type]  # Lists or tuples.
    families = [children_of(nest) for nest in nests]
    if families[0] is None:
        if any(nest is not first and nest != first for nest in nests):
            other = next(nest for nest in nests if nest is not first and nest != first)
            raise ValueError(
                f"batches that are joined must agree in {first!r}, got {other!r}{WAY_OUT_OF_A_LIST}"
            )
        return first
    if any(f is None or len(f) != len(families[0]) for f in families) or _keys_differ(nests):
        raise _structures_differ(nests)
    columns = zip(*(family for family in families if family is not None), strict=True)
    return rebuilt(first, _join_each(columns, sizes))


def _join_each(columns: Iterable[Sequence[BatchTree]], sizes: Sequence[int]) -> list[BatchTree]:
    """Every column joined; what is wrong in another way than ragged is what is raised."""
    joined, ragged = [], None
    for column in columns:
        try:
            joined.append(_join(column, sizes))
        except RaggedError as error:
            ragged = ragged or error
    if ragged is not None:
        raise ragged from None
    return joined


def _structures_differ(nests: Sequence[BatchTree]) -> ValueError:
    return ValueError(
        "batches that are joined must have one structure, got "
        + " and ".join(sorted({describe(nest) for nest in nests}))
    )


def _keys_differ(nests: Sequence[BatchTree]) -> bool:
    first = nests[0]
    return isinstance(first, Mapping) and any(
        not isinstance(nest, Mapping) or list(nest) != list(first) for nest in nests
    )


def _join_shared(nests: Sequence[BatchTree]) -> BatchTree:
    for nest in nests:
        if not is_same(nest, nests[0]):
            raise ValueError(
                "batches that are joined must hold equal Shared values, got "
                f"{describe(nests[0])} and {describe(nest)}, which differ; let the loader give "
                "batches of `desired` examples, so that nothing must be joined"
            )
    return nests[0]


def is_same(one: BatchTree, other: BatchTree) -> bool:
    """Whether two nests are of the same classes and hold the same values."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple) and all(type(item) in PLAIN for item in one):
        return bool(one == other)  # Long ones too, and they are quick to compare.
    children, others = children_of(one), children_of(other)
    if children is None or others is None:
        return bool(one == other)
    if isinstance(one, Mapping) and isinstance(other, Mapping) and list(one) != list(other):
        return False
    return len(children) == len(others) and all(map(is_same, children, others))


def _join_tensors(nests: Sequence[BatchTree]) -> Tensor:
    parts = [nest for nest in nests if isinstance(nest, Tensor)]
    first = parts[0]
    if len(parts) == len(nests) and not any(tensor.ndim for tensor in parts):
        if not all(torch.equal(tensor, first) for tensor in parts):
            other = next(tensor for tensor in parts if not torch.equal(tensor, first))
            raise ValueError(
                "batches that are joined must agree in their scalars, got "
                f"{first.tolist()} and {other.tolist()}{WAY_OUT_OF_A_LIST}"
            )
        return first
    for nest in nests:
        if not isinstance(nest, Tensor) or (nest.ndim, nest.dtype) != (first.ndim, first.dtype):
            raise ValueError(
                "batches can be joined only where all but dimension 0 agrees, got "
                f"{describe(first)} and {describe(nest)}; make the collate function give all "
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
