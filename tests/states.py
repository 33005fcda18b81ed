"""A fingerprint of all that a search must leave as it was: compared before and after, by tests."""

import hashlib
import pickle
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_PLAIN: Final = (str, bytes, int, bool, type(None), torch.dtype, torch.device)
_GENERATORS: Final[dict[type, Callable[[Any], object]]] = {
    torch.Generator: lambda generator: bytes(generator.get_state().numpy()),
    np.random.Generator: lambda generator: generator.bit_generator.state,
    np.random.RandomState: lambda generator: generator.get_state(),
    random.Random: lambda generator: generator.getstate(),
}


def fingerprint(*modules_and_optimizers: object) -> dict[str, object]:
    """Return every bit of the objects' values and of the global generators, by readable names.

    Takes modules, optimizers, anything with a ``state_dict`` (schedulers, scalers), generators,
    tensors and containers of these. Holds values only: two equal models have equal fingerprints.
    Which *objects* hold them is said by ``identities``.
    """
    found: dict[str, object] = dict(_random_states())
    for place, item in enumerate(modules_and_optimizers):
        found.update((f"{place}:{name}", value) for name, value in _values(item))
    return found


def identities(*modules_and_optimizers: object) -> dict[str, object]:
    """Return which objects, and which memory, hold the modules' and the optimizers' state."""
    found: dict[str, object] = {}
    for place, item in enumerate(modules_and_optimizers):
        found.update((f"{place}:{name}", value) for name, value in _objects(item))
    return found


def bits(tensor: Tensor | None) -> object:
    """Return what the tensor is (dtype, shape, strides, device) and a hash of its bytes."""
    if tensor is None:
        return None
    what = (tensor.dtype, tuple(tensor.shape), str(tensor.device), str(tensor.layout))
    if hasattr(tensor, "__tensor_flatten__"):  # A wrapper, such as a jagged tensor.
        return (*what, *(bits(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]))
    if tensor.layout is not torch.strided:
        parts = tensor.detach().coalesce()
        return (*what, bits(parts.indices()), bits(parts.values()))
    if tensor.is_meta:
        return (*what, tensor.stride())
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (*what, tensor.stride(), _digest(flat.view(torch.uint8).numpy().tobytes()))


def _random_states() -> Iterator[tuple[str, object]]:
    yield "torch rng", bits(torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            yield f"cuda rng {index}", bits(state)
    yield "numpy rng", _digest(pickle.dumps(np.random.get_state()))
    yield "python rng", _digest(pickle.dumps(random.getstate()))


def _values(item: object) -> Iterable[tuple[str, object]]:
    if isinstance(item, nn.Module):
        return _module(item)
    if isinstance(item, Optimizer):
        return _optimizer(item)
    return [(type(item).__name__, _value(item))]


def _module(root: nn.Module) -> Iterator[tuple[str, object]]:
    for path, module in root.named_modules(remove_duplicate=False):
        yield f"{path}.training", module.training
        for name, parameter in module._parameters.items():
            yield f"{path}.{name}", _value(parameter)
        for name, buffer in module._buffers.items():
            yield f"{path}.{name}", (_value(buffer), name in module._non_persistent_buffers_set)
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules", "training"):
                yield f"{path}.{name}", _value(value)
        yield f"{path}.children", list(module._modules)


def _optimizer(optimizer: Optimizer) -> Iterator[tuple[str, object]]:
    parameters = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for place, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            yield f"group {place}.{key}", _value(value)
    for place, parameter in enumerate(parameters):
        entry = optimizer.state.get(parameter)
        yield f"state {place}", None if entry is None else _value(entry)
    yield "entries", len(optimizer.state)
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state"):
            yield f"attribute {name}", _value(value)


def _value(item: object) -> object:
    """Anything that ``==`` compares bit by bit; an object that is unknown is only its class."""
    if isinstance(item, Tensor):
        return (bits(item), item.requires_grad, bits(item.grad if item.is_leaf else None))
    if isinstance(item, Mapping):
        return [type(item).__name__, *((_value(key), _value(item[key])) for key in item)]
    if isinstance(item, list | tuple | deque):
        return [type(item).__name__, *map(_value, item)]
    if isinstance(item, set | frozenset):
        return [type(item).__name__, *sorted(repr(_value(member)) for member in item)]
    if isinstance(item, _PLAIN):
        return (type(item).__name__, item)
    return _state_of(item)


def _state_of(item: object) -> object:
    if isinstance(item, float):
        return ("float", item.hex())
    if isinstance(item, np.ndarray):
        return (str(item.dtype), item.shape, item.strides, _digest(item.tobytes()))
    for kind, state in _GENERATORS.items():
        if isinstance(item, kind):
            return _digest(pickle.dumps(state(item)))
    state_dict = getattr(item, "state_dict", None)
    if callable(state_dict) and not isinstance(item, type):
        return [type(item).__name__, _value(state_dict())]
    return type(item).__qualname__


def _objects(item: object) -> Iterable[tuple[str, object]]:
    if isinstance(item, nn.Module):
        return _objects_of_module(item)
    if isinstance(item, Optimizer):
        return _objects_of_optimizer(item)
    return [(type(item).__name__, id(item))]


def _objects_of_module(root: nn.Module) -> Iterator[tuple[str, object]]:
    for path, module in root.named_modules(remove_duplicate=False):
        yield f"{path}.module", id(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield f"{path}.{name}", _identity(tensor)
        for name, value in vars(module).items():
            if isinstance(value, Tensor | dict | list | set):
                yield f"{path}.{name}", _identity(value)


def _objects_of_optimizer(optimizer: Optimizer) -> Iterator[tuple[str, object]]:
    yield "groups", id(optimizer.param_groups)
    yield "state", id(optimizer.state)
    for place, group in enumerate(optimizer.param_groups):
        yield f"group {place}", (id(group), id(group["params"]))
        for position, parameter in enumerate(group["params"]):
            yield f"group {place}.{position}", _identity(parameter)
    for place, entry in enumerate(optimizer.state.values()):
        yield f"entry {place}", id(entry)
        for key, value in entry.items():
            if isinstance(value, Tensor):
                yield f"entry {place}.{key}", _identity(value)


def _identity(item: object) -> object:
    if not isinstance(item, Tensor):
        return id(item)
    memory = item.data_ptr() if item.layout is torch.strided else None
    return (id(item), memory, id(item.grad) if item.is_leaf else None)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
