"""Containers of any class: list the children, and rebuild the container around other children."""

import copy
import dataclasses
import functools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from torch import Tensor

PLAIN: Final = (str, bytes, int, float, complex, bool, type(None))
_LEAVES: Final = (Tensor, *PLAIN)
_REFUSALS: Final = (TypeError, ValueError, LookupError, AttributeError)  # A constructor's.

BatchTree = object  # The user chooses the nesting, so there is no narrower type.


def tensors(tree: BatchTree) -> Iterator[Tensor]:
    """Yield every tensor, depth first."""
    if isinstance(tree, Tensor):
        yield tree
        return
    for child in children_of(tree) or ():
        yield from tensors(child)


def children_of(tree: BatchTree) -> Sequence[BatchTree] | None:
    """Return the direct children of a container; None for a leaf."""
    if isinstance(tree, _LEAVES):
        return None
    if isinstance(tree, (list, tuple)):
        return tree
    if isinstance(tree, (dict, Mapping)):  # Testing for dict first is faster.
        return list(tree.values())
    if is_dataclass(tree):
        return [getattr(tree, name) for name in _fields(tree)]
    return None


def rebuilt(tree: BatchTree, children: Sequence[BatchTree]) -> BatchTree:
    """Return a container like ``tree`` around other children, without changing ``tree``."""
    if type(tree) is tuple or type(tree) is list:  # A fast path for the usual case.
        return type(tree)(children)
    if is_named_tuple(tree):
        return type(tree)(*children)
    if isinstance(tree, (list, tuple)):
        return type(tree)(children)
    if isinstance(tree, Mapping):
        return _rebuilt_mapping(tree, dict(zip(tree, children, strict=True)))
    return dataclasses.replace(tree, **dict(zip(_fields(tree), children, strict=True)))  # type: ignore[type-var]  # Only dataclasses are left.


def is_named_tuple(tree: BatchTree) -> bool:
    """Return whether this is an instance of a named tuple."""
    return isinstance(tree, tuple) and hasattr(type(tree), "_fields")


def is_dataclass(tree: BatchTree) -> bool:
    """Return whether this is an instance of a dataclass."""
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def _fields(tree: BatchTree) -> list[str]:
    """The names of the fields that the constructor takes; it computes the other fields anew."""
    return [field.name for field in dataclasses.fields(tree) if field.init]  # type: ignore[arg-type]  # An instance.


def _rebuilt_mapping(tree: Mapping[Any, BatchTree], pairs: dict[Any, BatchTree]) -> BatchTree:
    """A mapping of the same class if the class accepts ``pairs``, else a dict.

    Copying the mapping keeps the attributes that the class adds, and works for classes whose
    constructor takes no pairs, such as defaultdict. Only dicts and UserDicts are copied: the copy
    of another class may share its storage with the original.
    """
    if type(tree) is dict:
        return pairs
    makers: list[Callable[[dict[Any, BatchTree]], object]] = [type(tree)]
    # Some classes (AttrDict) keep their keys as attributes: a copy would show the old values.
    if isinstance(tree, dict | UserDict) and getattr(tree, "__dict__", None) is not tree:
        makers.insert(0, functools.partial(_copy_with, tree))
    for make in makers:
        with suppress(*_REFUSALS):
            made = make(pairs)
            if _holds(made, pairs):
                return made
    return pairs


def _copy_with(
    tree: dict[Any, BatchTree] | UserDict[Any, BatchTree], pairs: dict[Any, BatchTree]
) -> object:
    same = copy.copy(tree)
    own = getattr(same, "__dict__", {})
    own |= {name: dict(value) for name, value in own.items() if type(value) is dict}
    for key, child in pairs.items():
        same[key] = child
    return same


def _holds(made: object, pairs: dict[Any, BatchTree]) -> bool:
    return (
        isinstance(made, Mapping)
        and list(made) == list(pairs)
        and list(map(id, tensors(made))) == list(map(id, tensors(pairs)))
    )
