"""Models, optimizers and functions as bytes for another process."""

import inspect
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import ModuleType
from typing import IO, Any, Final

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from autobatch.errors import AutobatchError

_HOOKS: Final = "_optimizer_"  # The prefix of the attributes that hold an optimizer's hooks.
_DEPTH: Final = 12  # The deepest level at which the part that cannot be sent is searched for.


def cloudpickle() -> ModuleType:
    """Return cloudpickle, which pickles functions and classes of scripts and notebooks by value.

    Raises:
        AutobatchError: If cloudpickle is not installed. Nothing else of autobatch needs it.
    """
    try:
        import cloudpickle as module
    except ImportError as error:
        raise AutobatchError(
            "what runs in a process of its own (isolate=True, predict) needs cloudpickle: "
            "pip install cloudpickle"
        ) from error
    return module  # type: ignore[no-any-return]  # cloudpickle has no types.


def model_pickler(stream: IO[bytes]) -> Any:
    """Return a pickler that also pickles optimizers completely, and parametrized modules.

    torch omits an optimizer's own attributes, and refuses modules with parametrizations because
    ``register_parametrization`` makes a class for each module.

    Args:
        stream: The pickler writes to this stream.

    Returns:
        A subclass of ``cloudpickle.Pickler``.

    Raises:
        AutobatchError: If cloudpickle is not installed.
    """

    class ModelPickler(cloudpickle().Pickler):  # type: ignore[misc]  # cloudpickle has no types.
        def reducer_override(self, value: Any) -> Any:
            kind: Any = type(value)
            if isinstance(value, Optimizer) and kind.__getstate__ is Optimizer.__getstate__:
                own = {n: held for n, held in vars(value).items() if not n.startswith(_HOOKS)}
                return _new_optimizer, (kind,), own
            if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
                base = kind.__bases__[0]
                return _new_module, (base,), vars(value), None, None, _restore_parametrized
            return super().reducer_override(value)

    return ModelPickler(stream)


def _new_optimizer(kind: type[Optimizer]) -> Optimizer:
    """Return an optimizer without state.

    torch wraps the ``step`` of an optimizer's class in a function that calls hooks. cloudpickle
    copies the wrapper together with a class that it sends by value, and the copy has hooks of its
    own that no code registers anything with. Unwrapping ``step`` here makes torch wrap it again
    when the optimizer's state is set.
    """
    inner = getattr(kind.step, "__wrapped__", None)
    if getattr(kind.step, "hooked", False) and inner is not None:
        kind.step = inner  # type: ignore[method-assign]
    return kind.__new__(kind)


def _new_module(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _restore_parametrized(module: nn.Module, state: dict[str, Any]) -> None:
    """Set the module's state, and change its class as ``register_parametrization`` does."""
    vars(module).update(state)
    parametrize._inject_new_class(module)
    assert isinstance(module.parametrizations, nn.ModuleDict)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)


def pack_task(task: Callable[..., object]) -> memoryview:
    """Return the task as bytes; objects that a script or notebook defines are sent by value.

    Tensors that share memory share memory again after ``unpack_task``.

    Args:
        task: A function, or a ``partial`` of one.

    Raises:
        TypeError: If part of the task cannot be sent. The message names that part.
        AutobatchError: If cloudpickle is not installed.
    """
    cloudpickle()
    try:
        return _pack(task)
    except Exception as error:  # noqa: BLE001  # Pickling calls methods that users wrote.
        cause = error
    name, part = _unsendable_part("task", task)
    raise TypeError(
        f"{name} cannot be sent to an isolated process ({type(part).__name__}: {cause}); make it "
        "where it is needed, in a function or a factory, leave it out of the pickle with "
        "__getstate__, or search with isolate=False"
    ) from cause


def unpack_task(content: bytes) -> object:
    """Return the task that ``pack_task`` packed.

    Unpacking runs code that the bytes contain: call this only with bytes of this user.
    """
    return torch.load(io.BytesIO(content), weights_only=False)


def _pack(value: object) -> memoryview:
    buffer = io.BytesIO()
    # torch.save stores memory that several tensors share once.
    torch.save(value, buffer, cloudpickle(), pickle.HIGHEST_PROTOCOL)
    return buffer.getbuffer()


def _unsendable_part(name: str, value: object) -> tuple[str, object]:
    """Return the name and the value of the innermost part that cannot be sent."""
    for _ in range(_DEPTH):
        bad = next(
            (pair for pair in _parts(name, value).items() if not _can_be_sent(pair[1])), None
        )
        if bad is None:
            break
        name, value = bad
    return name, value


def _can_be_sent(value: object) -> bool:
    try:
        _pack(value)
    except Exception:  # noqa: BLE001  # Pickling calls methods that users wrote.
        return False
    return True


def _parts(name: str, value: object) -> Mapping[str, object]:
    """Return the parts of a value by name: arguments by their own, other parts as ``name.key``."""
    if isinstance(value, partial):
        return inspect.signature(value.func).bind_partial(*value.args, **value.keywords).arguments
    if is_dataclass(value) and type(value).__module__.startswith("autobatch."):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {f"{name}.{key}": part for key, part in _members(value).items()}


def _members(value: object) -> Mapping[Any, object]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if inspect.isfunction(value):
        used = inspect.getclosurevars(value)
        return {**used.globals, **used.nonlocals}
    children = dict(value.named_children()) if isinstance(value, torch.nn.Module) else {}
    return {**children, **getattr(value, "__dict__", {})}
