"""Nested tensors: measured, cut and joined along dimension 0.

A nest is a tensor or any nesting of tuples, named tuples, lists, mappings and dataclasses that
holds some. Its size is the length of its tensors along dimension 0. A list or tuple of plain
values (strings, numbers) as long as that holds one value an example, as torch's default collate
makes of text, and is cut along; every other plain value, and a tensor without dimensions, belongs
to the batch as a whole and goes to every part.
"""

import copy
import dataclasses
import functools
import itertools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeGuard

import numpy as np
import torch
from torch import Tensor

_LEAVES: Final = (str, bytes, int, float, complex, bool, type(None))
_REFUSALS: Final = (TypeError, ValueError, LookupError, AttributeError)  # Of a class, of pairs.

Nest = object  # Any nesting: the structure is the user's, so there is no narrower type.


def tensors(nest: Nest) -> Iterator[Tensor]:
    """Yield every tensor, depth first."""
    if isinstance(nest, Tensor):
        yield nest
        return
    for child in _children(nest) or ():
        yield from tensors(child)


def size_of(nest: Nest) -> int:
    """Return the number of examples: the common length of all tensors along dimension 0.

    Raises:
        ValueError: If no tensor has a dimension, or two disagree in length.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors(nest) if tensor.ndim]
    if not shapes:
        raise ValueError(
            f"a batch must hold a tensor with a batch dimension, got {describe(nest)}; return "
            "tuples, dicts or dataclasses of tensors from the collate function"
        )
    if any(shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            "the tensors of a batch must agree in length along dimension 0, got shapes "
            + ", ".join(map(str, shapes))
        )
    return shapes[0][0]


def map_tensors(function: Callable[[Tensor], Tensor], nest: Nest) -> Nest:
    """Return the same nest with ``function`` applied to every tensor."""
    if isinstance(nest, Tensor):
        return function(nest)
    children = _children(nest)
    if children is None:
        return nest
    return _rebuild(nest, [map_tensors(function, child) for child in children])


def from_numpy(nest: Nest) -> Nest:
    """Return the nest with every NumPy array as a tensor over the same memory.

    A read-only or reversed array is copied, for torch has no such tensors; one of text or objects
    becomes a list.
    """
    if isinstance(nest, np.ndarray):
        if nest.dtype.kind not in "biufc":
            return nest.tolist()
        shareable = nest.flags.writeable and min(nest.strides, default=0) >= 0
        return torch.from_numpy(nest if shareable else nest.copy())
    children = _children(nest)
    if children is None or isinstance(nest, Tensor):
        return nest
    return _rebuild(nest, [from_numpy(child) for child in children])


def take(nest: Nest, rows: Sequence[int]) -> Nest:
    """Return the examples ``rows`` (any order, repeats allowed), copied."""
    index = torch.as_tensor(rows, dtype=torch.int64)  # Else no rows at all would be floats.
    return _select(
        nest,
        size_of(nest),
        lambda tensor: tensor.index_select(0, index.to(tensor.device)),
        lambda values: [values[row] for row in rows],
    )


def part(nest: Nest, start: int, stop: int) -> Nest:
    """Return the examples ``start`` to ``stop`` as views of the same memory."""
    return _part(nest, size_of(nest), start, stop)


def cut(nest: Nest, sizes: Sequence[int]) -> list[Nest]:
    """Return consecutive parts of the given sizes, as views of the same memory.

    Raises:
        ValueError: If the sizes do not add up to the nest's own.
    """
    length = size_of(nest)
    if sum(sizes) != length:
        raise ValueError(f"cannot cut {length} examples into {tuple(sizes)}")
    if len(sizes) == 1:
        return [nest]
    stops = itertools.accumulate(sizes)
    return [_part(nest, length, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def join(nests: Sequence[Nest]) -> Nest:
    """Return one nest with the examples of all, in order; a single one is returned as it is.

    Raises:
        ValueError: If shapes, types or structures differ, or a value of the batch as a whole does.
    """
    if len(nests) == 1:
        return nests[0]
    return _join(nests, [size_of(nest) for nest in nests])


def describe(nest: Nest) -> str:
    """Return the structure as short text: ``"(float32[8, 3, 32, 32], int64[8])"``."""
    if isinstance(nest, Tensor):
        return f"{str(nest.dtype).removeprefix('torch.')}{list(nest.shape)}"
    children = _children(nest)
    if children is None:
        return type(nest).__name__
    if isinstance(nest, Mapping):
        inside = (f"{key}: {describe(child)}" for key, child in nest.items())
        return "{" + ", ".join(inside) + "}"
    if len(children) > 8:
        return f"{type(nest).__name__} of {len(children)}"
    return "(" + ", ".join(map(describe, children)) + ")"


def _is_named_tuple(nest: object) -> bool:
    return isinstance(nest, tuple) and hasattr(nest, "_fields")


def _children(nest: Nest) -> list[Nest] | None:
    """The values directly inside a container; None for a leaf."""
    if isinstance(nest, (Tensor, *_LEAVES)):
        return None
    if isinstance(nest, Mapping):
        return list(nest.values())
    if isinstance(nest, list | tuple):
        return list(nest)
    if _is_dataclass(nest):
        return [getattr(nest, name) for name in _fields(nest)]
    return None


def _is_dataclass(nest: Nest) -> bool:
    return dataclasses.is_dataclass(nest) and not isinstance(nest, type)


def _fields(nest: Nest) -> list[str]:
    """The fields that its constructor takes; what it derives from them it derives again."""
    return [field.name for field in dataclasses.fields(nest) if field.init]  # type: ignore[arg-type]  # An instance.


def _rebuild(nest: Nest, children: list[Nest]) -> Nest:
    """A container like ``nest`` around other children."""
    if isinstance(nest, Mapping):
        return _rebuild_mapping(nest, dict(zip(nest, children, strict=True)))
    if _is_named_tuple(nest):
        return type(nest)(*children)
    if isinstance(nest, list | tuple):
        return type(nest)(children)
    return dataclasses.replace(nest, **dict(zip(_fields(nest), children, strict=True)))  # type: ignore[type-var]  # Only dataclasses are left.


def _rebuild_mapping(nest: Mapping[Any, Nest], pairs: dict[Any, Nest]) -> Nest:
    """A mapping of the same class where it takes ``pairs``, else a dict; ``nest`` is not changed.

    A copy keeps what the class carries besides its pairs, and not every class is made from pairs (a
    defaultdict is not). But only dicts are copied apart: what a copy of another class is given may
    reach the original.
    """
    if type(nest) is dict:
        return pairs
    makers: list[Callable[[dict[Any, Nest]], object]] = [type(nest)]
    # Where attributes are keys, as in many an AttrDict, those of a copy would be the old ones.
    if isinstance(nest, dict | UserDict) and getattr(nest, "__dict__", None) is not nest:
        makers.insert(0, functools.partial(_copy_with, nest))
    for make in makers:
        with suppress(*_REFUSALS):
            made = make(pairs)
            if _holds(made, pairs):
                return made
    return pairs


def _copy_with(nest: dict[Any, Nest] | UserDict[Any, Nest], pairs: dict[Any, Nest]) -> object:
    same = copy.copy(nest)
    own = getattr(same, "__dict__", {})
    own |= {name: dict(value) for name, value in own.items() if type(value) is dict}
    for key, child in pairs.items():
        same[key] = child
    return same


def _holds(made: object, pairs: dict[Any, Nest]) -> bool:
    return (
        isinstance(made, Mapping)
        and list(made) == list(pairs)
        and list(map(id, tensors(made))) == list(map(id, tensors(pairs)))
    )


def _is_values(nest: Nest, size: int) -> TypeGuard[list[object] | tuple[object, ...]]:
    """Whether this is one plain value an example."""
    return (
        isinstance(nest, list | tuple)
        and not _is_named_tuple(nest)
        and len(nest) == size
        and all(isinstance(value, _LEAVES) for value in nest)
    )


def _part(nest: Nest, length: int, start: int, stop: int) -> Nest:
    return _select(
        nest, length, lambda tensor: tensor[start:stop], lambda values: values[start:stop]
    )


def _select(
    nest: Nest,
    size: int,
    rows: Callable[[Tensor], Tensor],
    values: Callable[[list[object] | tuple[object, ...]], Sequence[object]],
) -> Nest:
    if isinstance(nest, Tensor):
        return rows(nest) if nest.ndim else nest
    if _is_values(nest, size):
        return type(nest)(values(nest))
    children = _children(nest)
    if children is None:
        return nest
    return _rebuild(nest, [_select(child, size, rows, values) for child in children])


def _join(nests: Sequence[Nest], sizes: Sequence[int]) -> Nest:
    first = nests[0]
    if isinstance(first, Tensor):
        return _join_tensors(nests)
    if all(_is_values(nest, size) for nest, size in zip(nests, sizes, strict=True)):
        return type(first)(value for nest in nests for value in nest)  # type: ignore[attr-defined, call-arg]  # Lists or tuples.
    families = [_children(nest) for nest in nests]
    if families[0] is None:
        if any(nest is not first and nest != first for nest in nests):
            raise ValueError(f"batches that are joined must agree in {first!r}, got {nests!r}")
        return first
    if any(f is None or len(f) != len(families[0]) for f in families) or _keys_differ(nests):
        raise ValueError(
            "batches that are joined must have one structure, got "
            + " and ".join(sorted({describe(nest) for nest in nests}))
        )
    columns = zip(*(family for family in families if family is not None), strict=True)
    return _rebuild(first, [_join(column, sizes) for column in columns])


def _keys_differ(nests: Sequence[Nest]) -> bool:
    first = nests[0]
    return isinstance(first, Mapping) and any(
        not isinstance(nest, Mapping) or list(nest) != list(first) for nest in nests
    )


def _join_tensors(nests: Sequence[Nest]) -> Tensor:
    parts = [nest for nest in nests if isinstance(nest, Tensor)]
    first = parts[0]
    if len(parts) == len(nests) and not any(tensor.ndim for tensor in parts):
        if not all(torch.equal(tensor, first) for tensor in parts):
            raise ValueError(f"batches that are joined must agree in their scalars, got {parts}")
        return first
    for nest in nests:
        if not isinstance(nest, Tensor) or (nest.ndim, nest.dtype) != (first.ndim, first.dtype):
            raise ValueError(
                "batches can be joined only where all but dimension 0 agrees, got "
                f"{describe(first)} and {describe(nest)}; make the collate function give all "
                "batches tensors that agree in number of dimensions and dtype too"
            )
        if nest.shape[1:] != first.shape[1:]:
            raise ValueError(
                "batches can be joined only where all but dimension 0 agrees, and these batches "
                f"are ragged: got {describe(first)} and {describe(nest)}; pad to one length in "
                "the collate function, or let the loader give batches of `desired` examples, so "
                "that nothing must be joined"
            )
    return torch.cat(parts)
