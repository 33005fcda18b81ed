"""Random number generators: seeded, taken, and put back."""

import _random
import copy
import ctypes
import functools
import itertools
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

Restore = Callable[[], object]

_DEPTH: Final = 10  # How deep, and how far along a container, generators of the data are sought.
_WIDTH: Final = 64
_OPAQUE: Final = (
    *(str, bytes, int, float, complex, type(None), type, ModuleType),
    *(Tensor, np.ndarray),
    random.SystemRandom,  # It has no state: getstate raises.
)
_KINDS: Final = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def seed_all(seed: int | None) -> None:
    """Seed torch, NumPy and Python; None leaves them alone."""
    if seed is None:
        return
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def check_seed(seed: object) -> None:
    """Refuse what cannot seed all three generators, before one of them is seeded."""
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer or None, got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")


def random_state(sources: Iterable[object] = ()) -> Restore:
    """Take the generators of torch, NumPy and Python, and those found in ``sources``.

    Returns:
        A function that puts all of them back, as often as it is called.
    """
    torch_cpu = torch.default_generator.get_state()
    accelerators = _accelerators()
    numpy_global = _numpy_state()
    put_python_back = _python_state()
    own = [_generator(found) for source in sources for found in generators_in(source)]

    def put_back() -> None:
        _forget_numpy()  # Its normal number that waits may be another with the same memory.
        torch.set_rng_state(torch_cpu)
        np.random.set_state(numpy_global)
        put_python_back()
        for restore in (*own, *accelerators):  # A device that is lost may refuse: last.
            restore()

    return put_back


# Those that this build of torch has: every window asks whether they are in use.
_ACCELERATORS: Final = tuple(
    module
    for module, version in (
        (torch.cuda, torch.version.cuda or torch.version.hip),
        (torch.xpu, torch.version.xpu),
    )
    if version
)


def _accelerators() -> list[Restore]:
    """Take the generators of the GPUs that are in use; a GPU that is idle is not started."""
    found: list[Restore] = [
        functools.partial(module.set_rng_state_all, module.get_rng_state_all())
        for module in _ACCELERATORS
        if module.is_initialized()
    ]
    if torch.mps.is_available():
        found.append(functools.partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return found


def _memory_at(address: int, size: int) -> "ctypes.Array[ctypes.c_char]":
    """Memory of somebody else's, whose ``raw`` copies it: asked for at every window."""
    return (ctypes.c_char * size).from_address(address)


_WORDS: Final = struct.Struct("i624I")  # Of CPython's generator: its position, and its key.
_SOURCE: Final[random.Random] = getattr(random.random, "__self__")  # noqa: B009  # Not typed.


def _python_state() -> Restore:
    """Python's global state: 625 integers of Python's, which a window would wait 20 us for.

    Where they are known to lie in memory one after the other, they are copied as they lie.
    """
    memory = _python_memory()
    if memory is None:
        return functools.partial(random.setstate, random.getstate())
    words, waiting = memory.raw, vars(_SOURCE)["gauss_next"]

    def put_back() -> None:
        position, *key = _WORDS.unpack(words)
        random.setstate((3, (*key, position), waiting))

    return put_back


@functools.cache
def _python_memory() -> "ctypes.Array[ctypes.c_char] | None":
    """Where CPython has its state, behind an object's header; None where it has another layout."""
    ends = object.__basicsize__ + _WORDS.size
    if sys.implementation.name != "cpython" or _random.Random.__basicsize__ < ends:
        return None
    memory = _memory_at(id(_SOURCE) + object.__basicsize__, _WORDS.size)
    version, state, _ = random.getstate()
    position, *key = _WORDS.unpack(memory.raw)
    return memory if version == 3 and state == (*key, position) else None


_MT19937_BYTES: Final = 624 * 4 + 4  # Key and position: all of its struct that draws move.


@dataclass(slots=True)
class _Numpy:
    """NumPy's generator, and a cache of its state as it was when last taken.

    Attributes:
        bits: The bit generator; it may be replaced.
        memory: Where it has its key and position.
        known: A copy of that, and the state that belongs to it; None if there is none.
    """

    bits: object
    memory: "ctypes.Array[ctypes.c_char]"
    known: tuple[bytes, Any] | None = None


_numpy: _Numpy | None = None


def _forget_numpy() -> None:
    global _numpy
    _numpy = None


def _numpy_state() -> Any:
    """NumPy's global state, which takes 23 microseconds to get, unless it is the last one still.

    Its memory is compared with what it was. A normal number that waits to be handed out lies
    elsewhere; with none waiting, one cannot come to wait without a draw.
    """
    global _numpy
    bits = np.random.get_bit_generator()  # type: ignore[attr-defined]  # Public, but not typed.
    if _numpy is None or _numpy.bits is not bits:
        if type(bits) is not np.random.MT19937:
            return np.random.get_state()
        _numpy = _Numpy(bits, _memory_at(bits.ctypes.state_address, _MT19937_BYTES))
    memory = _numpy.memory.raw
    if _numpy.known is not None and _numpy.known[0] == memory:
        return _numpy.known[1]
    state: Any = np.random.get_state()
    # Of five parts: the fourth is whether one waits.
    _numpy.known = None if state[3] else (memory, state)
    return state


def generators_in(source: object) -> Iterator[object]:
    """Yield every random number generator that an object, or what it is made of, holds."""
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
            elif isinstance(item, nn.Module):  # However deep its layers lie: all at once.
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
    except ValueError:  # A name of the enclosing function that has no value yet.
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
