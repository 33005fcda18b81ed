"""What a forward pass moves, by name: cut, it moves once a micro-batch instead of once a step."""

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from torch import Tensor, nn

from autobatch.errors import InexactStepError

_STANDARD: Final = frozenset(vars(nn.Module()))
_NUMBERS: Final = (bool, int, float, type(None))

Marks = Mapping[str, object]  # By name: equal as long as nothing has moved.


def marks_of(model: nn.Module, besides: Collection[Tensor] = ()) -> Marks:
    """Return a mark of every buffer and parameter, and of attributes that are numbers or tensors.

    Tensors with a graph are left out: they are made of parameters in each forward pass, as the
    weight norm of old does. So are weights that an embedding keeps short, which a second pass moves
    no further. No tensor is kept alive.

    Args:
        model: With all its modules.
        besides: Buffers that are looked after.
    """
    known = set(map(id, besides))
    found: dict[str, object] = {}
    for name, value in _held(model):
        if isinstance(value, _NUMBERS):
            found[name] = repr(value)  # nan is no other nan.
        elif isinstance(value, Tensor) and value.grad_fn is None and id(value) not in known:
            found[name] = _Mark(value)
    return found


def moved(before: Marks, now: Marks) -> set[str]:
    """Return the names whose marks differ; what is new was not there to be moved."""
    return {name for name, mark in before.items() if name in now and now[name] != mark}


@contextmanager
def parameters_at_rest(model: nn.Module) -> Iterator[None]:
    """Refuse a model whose forward pass moves its parameters even in evaluation mode.

    Raises:
        InexactStepError: At the end, with their names. They stay moved: a copy of all parameters
            may not fit.
    """
    held = _held(model)
    before = [(name, p, _written(p)) for name, p in held if isinstance(p, nn.Parameter)]
    yield
    found = [name for name, parameter, written in before if _written(parameter) != written]
    if found:
        raise InexactStepError(
            f"the model's forward pass moves its parameters {', '.join(found)}, in evaluation mode "
            "too, so that a check or an evaluation moves them, and a batch that is cut more than "
            "once; move them after the step instead (on_step=, or in the optimizer's step)"
        )


class _Mark:
    """Of a tensor: equal to another of the same one, unless it was written to in between."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)  # Two of the same are one object; == asks the tensors.
        self._written = _written(tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Mark):
            return False
        return self._tensor is other._tensor and self._written == other._written


def _written(tensor: Tensor) -> int:
    """How often it was written to, as far as it counts that."""
    return 0 if tensor.is_inference() else tensor._version


def _held(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield what modules hold by name: parameters, buffers, attributes of their own.

    But for weights that an embedding keeps short.
    """
    for place, module in model.named_modules():
        shortened = getattr(module, "max_norm", None) is not None
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if name not in _STANDARD and not (shortened and name == "weight"):
                yield (f"{place}.{name}" if place else name), value
