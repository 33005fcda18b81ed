"""Names of the buffers, parameters and attributes that a forward pass changes.

In a batch that is cut these change once a micro-batch instead of once a step.
"""

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from torch import Tensor, nn

from autobatch.errors import InexactStepError

_STANDARD: Final = frozenset(vars(nn.Module()))
_NUMBERS: Final = (bool, int, float, type(None))

VersionStamps = Mapping[str, object]  # By name; a stamp compares equal while its value is the same.


def version_stamps(model: nn.Module, excluded: Collection[Tensor] = ()) -> VersionStamps:
    """Return a stamp of every buffer, every parameter and every number or tensor attribute.

    Two kinds of tensors are skipped. A tensor with a graph is recomputed from parameters in each
    forward pass, as by the old weight norm. The weight of an embedding with ``max_norm`` is
    renormalized, and a second forward pass changes it no further. No tensor is kept alive.

    Args:
        model: The root module.
        excluded: Tensors to skip.
    """
    excluded_ids = set(map(id, excluded))
    stamps: dict[str, object] = {}
    for name, value in _attributes(model):
        if isinstance(value, _NUMBERS):
            stamps[name] = repr(value)  # As text, because nan != nan.
        elif isinstance(value, Tensor) and value.grad_fn is None and id(value) not in excluded_ids:
            stamps[name] = _TensorStamp(value)
    return stamps


def changed_names(before: VersionStamps, now: VersionStamps) -> set[str]:
    """Return the names whose stamps differ. A name that is in only one of the two is skipped."""
    return {name for name, stamp in before.items() if name in now and now[name] != stamp}


@contextmanager
def refuse_parameter_changes(model: nn.Module) -> Iterator[None]:
    """Refuse a model whose forward pass changes its parameters even in evaluation mode.

    Raises:
        InexactStepError: At the end of the block, with the names of the parameters. Their values
            stay changed, because a copy of all parameters may not fit into memory.
    """
    before = [
        (name, value, _version(value))
        for name, value in _attributes(model)
        if isinstance(value, nn.Parameter)
    ]
    yield
    changed = [name for name, parameter, version in before if _version(parameter) != version]
    if changed:
        raise InexactStepError(
            f"the model's forward pass changes its parameters {', '.join(changed)} in evaluation "
            "mode too: a check or an evaluation would change them, and a batch that is cut would "
            "change them more than once; change them after the step instead (on_step=, or in the "
            "optimizer's step)"
        )


class _TensorStamp:
    """Version stamp of a tensor; compares unequal once the tensor is written to in place."""

    def __init__(self, tensor: Tensor) -> None:
        # Weak references to one tensor are one object. Comparing them with == compares tensors.
        self._tensor = weakref.ref(tensor)
        self._version = _version(tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _TensorStamp):
            return False
        return self._tensor is other._tensor and self._version == other._version


def _version(tensor: Tensor) -> int:
    """Return how often the tensor was written to; inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _attributes(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield the parameters, buffers and own attributes of all modules, by name.

    The weight of an embedding with ``max_norm`` is skipped.
    """
    for prefix, module in model.named_modules():
        renormalized = getattr(module, "max_norm", None) is not None
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if name not in _STANDARD and not (renormalized and name == "weight"):
                yield (f"{prefix}.{name}" if prefix else name), value
