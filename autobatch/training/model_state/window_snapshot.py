"""A snapshot of everything that the forward and backward passes of a logical batch may change."""

import functools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from autobatch.state.rng import Restore, random_state
from autobatch.state.snapshot import attributes_of, contents_of, reachable
from autobatch.training.batchnorm.statistics import STATISTICS, RunningStatistics

# Attributes of every module; a forward pass changes only the buffers among them.
_STANDARD: Final = frozenset(vars(nn.Module()))
_FIXED: Final = frozenset({int, float, bool, str, type(None), torch.Size, torch.dtype})


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSnapshot:
    """What a logical batch may change, as it was before; each function restores its part.

    Every function may be called several times.

    Attributes:
        restore_model: Restores buffers and plain attributes, the BatchNorm statistics among them.
        restore_scaler: Restores what a GradScaler records about unscaled gradients.
        restore_random: Restores the random generators.
        statistics: The BatchNorm statistics, if they are pooled where the batch is cut.
    """

    restore_model: Restore
    restore_scaler: Restore
    restore_random: Restore
    statistics: RunningStatistics | None = None

    def restore(self) -> None:
        """Restore everything."""
        self.restore_model()
        self.restore_scaler()
        self.restore_random()


def window_snapshot(
    modules: Sequence[nn.Module],
    generators: Iterable[object] = (),
    scaler: GradScaler | None = None,
    statistics: RunningStatistics | None = None,
) -> WindowSnapshot:
    """Copy what a logical batch may change: buffers, plain attributes, generators, the scaler.

    The copies are on the same device as the originals. This runs once a step, so for a layer of
    torch it only looks at the layer's attributes.

    Args:
        modules: All modules of the model and the loss. Parameters are skipped: only the optimizer
            changes them, after the backward passes.
        generators: The model's own random generators.
        scaler: The GradScaler, or None.
        statistics: Of BatchNorm layers; already copied.
    """
    dicts, containers = _mutable_attributes(modules, statistics.layers if statistics else ())
    values = reachable(containers) if containers else []
    tensors = [v for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)]
    restores = [contents_of(values)]
    if tensors:
        restores.append(_values_of(tensors))
    if statistics is not None:
        restores.append(statistics.restore)

    def restore_model() -> None:
        for attributes, copied in dicts:
            attributes.clear()
            attributes.update(copied)
        for restore in restores:
            restore()

    return WindowSnapshot(
        restore_model=restore_model,
        statistics=statistics,
        restore_scaler=attributes_of(scaler) if scaler is not None else _nothing,
        restore_random=random_state(generators),
    )


def _mutable_attributes(
    modules: Sequence[nn.Module], copied: Iterable[nn.Module]
) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], list[object]]:
    """Return each module's dictionaries with a copy, and the values in them that are mutable.

    Args:
        modules: All modules.
        copied: Modules whose BatchNorm statistics are already copied.
    """
    has_statistics = set(copied)
    dicts, containers = [], []
    for module in modules:
        attributes = vars(module)
        dicts.append((attributes, attributes.copy()))
        buffers = attributes["_buffers"]
        if module in has_statistics and len(buffers) == len(STATISTICS):
            dicts.append((buffers, buffers.copy()))
        elif buffers:
            containers.append(buffers)
        kind: Hashable = type(module)  # type: ignore[assignment]  # A class is hashable.
        for name in _variable_names(kind, tuple(attributes)):
            value = attributes[name]
            if type(value) not in _FIXED and not _is_fixed_tuple(value):
                containers.append(value)
    return dicts, containers


def _nothing() -> None:
    """Restore nothing: there is no scaler."""


@functools.lru_cache
def _variable_names(kind: Hashable, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the attribute names whose values may be mutated in place.

    Skipped are the attributes of every module and, for torch's own layers, the constants that
    TorchScript knows: strides, sizes. The result is cached by class.
    """
    fixed = _STANDARD
    if getattr(kind, "__module__", "").startswith("torch.nn.modules."):
        fixed = fixed.union(getattr(kind, "__constants__", ()))
    return tuple(name for name in names if name not in fixed)


def _is_fixed_tuple(value: object) -> bool:
    return type(value) is tuple and _FIXED.issuperset(map(type, value))


def _values_of(tensors: Sequence[Tensor]) -> Restore:
    """Copy the tensors bit for bit. Small tensors of one kind are copied together."""
    groups: dict[object, list[Tensor]] = {}
    for t in tensors:
        together = t.ndim < 2 and t.layout is torch.strided
        groups.setdefault((t.dtype, t.device, t.ndim) if together else id(t), []).append(t)
    with torch.no_grad():
        copies = [(group, _joined(group)) for group in groups.values()]

    def restore() -> None:
        with torch.no_grad():
            for group, values in copies:
                if len(group) == 1:
                    group[0].copy_(values)
                elif group[0].ndim:
                    torch._foreach_copy_(group, values.split([len(t) for t in group]))
                else:
                    torch._foreach_copy_(group, values.unbind())

    return restore


def _joined(group: Sequence[Tensor]) -> Tensor:
    if len(group) == 1:
        return group[0].detach().clone()
    return torch.cat(list(group)) if group[0].ndim else torch.stack(list(group))
