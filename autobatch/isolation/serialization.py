"""cloudpickle, which sends to another process what only a script or a notebook knows."""

from types import ModuleType
from typing import IO, Any, Final

from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from autobatch.errors import AutobatchError

_HOOKS: Final = "_optimizer_"  # What the names of an optimizer's hooks begin with.


def cloudpickle() -> ModuleType:
    """Return the module; what needs no second process does without it.

    Raises:
        AutobatchError: If it is not installed.
    """
    try:
        import cloudpickle as module
    except ImportError as error:
        raise AutobatchError(
            "what runs in a process of its own (isolate=True, predict) needs cloudpickle: "
            "pip install cloudpickle"
        ) from error
    return module  # type: ignore[no-any-return]  # It is not typed.


def packer(stream: IO[bytes]) -> Any:
    """Return a pickler of cloudpickle's that also sends what torch leaves out or refuses.

    An optimizer's own attributes are left out by torch, and modules with parametrizations refused:
    their classes are made anew for each.

    Raises:
        AutobatchError: If it is not installed.
    """

    class Packer(cloudpickle().Pickler):  # type: ignore[misc]  # It is not typed.
        def reducer_override(self, value: Any) -> Any:
            kind: Any = type(value)
            if isinstance(value, Optimizer) and kind.__getstate__ is Optimizer.__getstate__:
                own = {n: held for n, held in vars(value).items() if not n.startswith(_HOOKS)}
                return _new_optimizer, (kind,), own
            if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
                base = kind.__bases__[0]
                return _new_module, (base,), vars(value), None, None, _parametrized_again
            return super().reducer_override(value)

    return Packer(stream)


def _new_optimizer(kind: type[Optimizer]) -> Optimizer:
    """Make one without its state.

    Torch wraps the ``step`` of a class to call hooks. Of a class that is sent by value, so would be
    the wrapper, with hooks that nobody adds to: it is wrapped here.
    """
    inner = getattr(kind.step, "__wrapped__", None)
    if getattr(kind.step, "hooked", False) and inner is not None:
        kind.step = inner  # type: ignore[method-assign]  # Setting its state wraps it again.
    return kind.__new__(kind)


def _new_module(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _parametrized_again(module: nn.Module, state: dict[str, Any]) -> None:
    """Do to the class what ``register_parametrization`` has done to it."""
    vars(module).update(state)
    parametrize._inject_new_class(module)
    assert isinstance(module.parametrizations, nn.ModuleDict)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)
