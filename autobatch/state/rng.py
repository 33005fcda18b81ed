"""Random number generators: seed them, save their states and restore them."""

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from autobatch.devices.factory import BACKENDS

Restore = Callable[[], object]

_DEPTH: Final = 10  # Levels of nested objects that are searched for generators.
_WIDTH: Final = 64  # Items of a container that are searched.
_OPAQUE: Final = (
    *(str, bytes, int, float, complex, type(None), type, ModuleType),
    *(Tensor, np.ndarray),
    random.SystemRandom,  # Has no state: getstate raises.
)
_KINDS: Final = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def seed_all(seed: int | None) -> None:
    """Seed the global generators of torch, NumPy and Python; None seeds nothing."""
    if seed is None:
        return
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def check_seed(seed: object) -> None:
    """Raise unless ``seed`` can seed all three generators, or is None.

    Raises:
        TypeError, ValueError: With the invalid value.
    """
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer or None, got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")


def random_state(sources: Iterable[object] = ()) -> Restore:
    """Save the states of the global generators and of all generators inside ``sources``.

    The global generators are those of torch (on the CPU and on GPUs in use), NumPy and Python.

    Args:
        sources: Objects that may hold generators, such as data loaders.

    Returns:
        A function that restores the saved states. It can be called several times.
    """
    torch_cpu = torch.get_rng_state()
    accelerators = _accelerators()
    of_numpy, of_python = np.random.get_state(), random.getstate()
    own = [_generator(found) for source in sources for found in generators_in(source)]

    def put_back() -> None:
        torch.set_rng_state(torch_cpu)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
        for restore in (*own, *accelerators):  # Last: a lost device may raise.
            restore()

    return put_back


def _accelerators() -> list[Restore]:
    """Save the generator states of the GPUs in use, without initializing other GPUs."""
    return [
        functools.partial(backend.set_rng_states, states)
        for backend in BACKENDS.values()
        if (states := backend.rng_states())
    ]


def generators_in(source: object) -> Iterator[object]:
    """Yield every random number generator that an object holds, directly or nested."""
    seen: set[int] = set()
    level: list[object] = [source]
    for _ in range(_DEPTH):
        inside: list[object] = []
        for item in level:
            if id(item) in seen or isinstance(item, _OPAQUE):
                continue
            seen.add(id(item))
            if isinstance(item, _KINDS):
                yield item
            elif isinstance(item, nn.Module):  # All submodules count as one level.
                for child in item.modules():
                    seen.add(id(child))
                    inside += vars(child).values()
            else:
                inside += _inside(item)
        level = inside


def _inside(item: object) -> list[object]:
    if isinstance(item, dict):
        return list(itertools.islice(item.values(), _WIDTH))
    if isinstance(item, list | tuple):
        return list(item[:_WIDTH])
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, FunctionType):
        return [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
    if isinstance(item, MethodType):
        return [item.__self__]
    slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
    return [
        *getattr(item, "__dict__", {}).values(),
        *(getattr(item, name) for name in slots if name != "__dict__" and hasattr(item, name)),
    ]


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # The variable has no value yet.
        return False


def _generator(found: object) -> Restore:
    if isinstance(found, torch.Generator):
        return functools.partial(found.set_state, found.get_state())
    if isinstance(found, np.random.RandomState):
        return functools.partial(found.set_state, found.get_state())
    if isinstance(found, np.random.Generator):
        bits = found.bit_generator
        return functools.partial(setattr, bits, "state", copy.deepcopy(bits.state))
    assert isinstance(found, random.Random)
    return functools.partial(found.setstate, found.getstate())
