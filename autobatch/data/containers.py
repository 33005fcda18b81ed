"""Containers of any class: what is inside, and another like it around something else."""

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
_REFUSALS: Final = (TypeError, ValueError, LookupError, AttributeError)  # Of a class, of pairs.

BatchTree = object  # Any nesting: the structure is the user's, so there is no narrower type.


def tensors(nest: BatchTree) -> Iterator[Tensor]:
    """Yield every tensor, depth first."""
    if isinstance(nest, Tensor):
        yield nest
        return
    for child in children_of(nest) or ():
        yield from tensors(child)


def children_of(nest: BatchTree) -> Sequence[BatchTree] | None:
    """Return the values directly inside a container; None for a leaf."""
    if isinstance(nest, _LEAVES):
        return None
    if isinstance(nest, (list, tuple)):
        return nest
    if isinstance(nest, (dict, Mapping)):  # A dict is known sooner than any Mapping.
        return list(nest.values())
    if is_dataclass(nest):
        return [getattr(nest, name) for name in _fields(nest)]
    return None


def rebuilt(nest: BatchTree, children: Sequence[BatchTree]) -> BatchTree:
    """Return a container like ``nest`` around other children; ``nest`` is not changed."""
    if type(nest) is tuple or type(nest) is list:  # Most are, and this is called often.
        return type(nest)(children)
    if is_named_tuple(nest):
        return type(nest)(*children)
    if isinstance(nest, (list, tuple)):
        return type(nest)(children)
    if isinstance(nest, Mapping):
        return _rebuilt_mapping(nest, dict(zip(nest, children, strict=True)))
    return dataclasses.replace(nest, **dict(zip(_fields(nest), children, strict=True)))  # type: ignore[type-var]  # Only dataclasses are left.


def is_named_tuple(nest: BatchTree) -> bool:
    """Return whether its places have names."""
    return isinstance(nest, tuple) and hasattr(type(nest), "_fields")


def is_dataclass(nest: BatchTree) -> bool:
    """Return whether this is an instance of a dataclass."""
    return dataclasses.is_dataclass(nest) and not isinstance(nest, type)


def _fields(nest: BatchTree) -> list[str]:
    """The fields that its constructor takes; what it derives from them it derives again."""
    return [field.name for field in dataclasses.fields(nest) if field.init]  # type: ignore[arg-type]  # An instance.


def _rebuilt_mapping(nest: Mapping[Any, BatchTree], pairs: dict[Any, BatchTree]) -> BatchTree:
    """A mapping of the same class where it takes ``pairs``, else a dict.

    A copy keeps what the class carries besides its pairs, and not every class is made from pairs (a
    defaultdict is not). But only dicts are copied apart: what a copy of another class is given may
    reach the original.
    """
    if type(nest) is dict:
        return pairs
    makers: list[Callable[[dict[Any, BatchTree]], object]] = [type(nest)]
    # Where attributes are keys, as in many an AttrDict, those of a copy would be the old ones.
    if isinstance(nest, dict | UserDict) and getattr(nest, "__dict__", None) is not nest:
        makers.insert(0, functools.partial(_copy_with, nest))
    for make in makers:
        with suppress(*_REFUSALS):
            made = make(pairs)
            if _holds(made, pairs):
                return made
    return pairs


def _copy_with(
    nest: dict[Any, BatchTree] | UserDict[Any, BatchTree], pairs: dict[Any, BatchTree]
) -> object:
    same = copy.copy(nest)
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
