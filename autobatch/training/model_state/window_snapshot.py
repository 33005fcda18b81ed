"""Running a window again, from its beginning, with smaller micro-batches."""

import functools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from autobatch.state.rng import Restore, random_state
from autobatch.state.snapshot import attributes_of, contents_of, reachable
from autobatch.training.batchnorm.statistics import STATISTICS, Statistics

# What every module has; of these a forward pass moves only buffers.
_STANDARD: Final = frozenset(vars(nn.Module()))
_FIXED: Final = frozenset({int, float, bool, str, type(None), torch.Size, torch.dtype})


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSnapshot:
    """What a window may move, as it was before: each function puts its part back.

    Attributes:
        model: Buffers and plain attributes.
        scaler: What a GradScaler notes about gradients that it has unscaled.
        random: Generators.
        statistics: BatchNorm's, where a window that is cut pools them; ``model`` puts them back.
    """

    model: Restore
    scaler: Restore
    random: Restore
    statistics: Statistics | None = None

    def put_back(self) -> None:
        """Put everything back."""
        self.model()
        self.scaler()
        self.random()


def window_snapshot(
    modules: Sequence[nn.Module],
    generators: Iterable[object] = (),
    scaler: GradScaler | None = None,
    statistics: Statistics | None = None,
) -> WindowSnapshot:
    """Take what a window may move: buffers, plain attributes, random generators, a scaler's stage.

    The copies lie beside the originals, on the device. A window starts often: for a layer of torch
    this costs a look at its attributes.

    Args:
        modules: All of the model's. Parameters are left out: only the optimizer moves them, after
            the window.
        generators: The model's own ones.
        scaler: Notes what it has unscaled.
        statistics: Of layers of BatchNorm, taken already.
    """
    dicts, containers = _held(modules, statistics.layers if statistics else ())
    moving = reachable(containers) if containers else []
    tensors = [t for t in moving if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
    put_others_back = [contents_of(moving)]
    if tensors:
        put_others_back.append(_values_of(tensors))
    if statistics is not None:
        put_others_back.append(statistics.put_back)

    def put_model_back() -> None:
        for own, before in dicts:
            own.clear()
            own.update(before)
        for put_back in put_others_back:
            put_back()

    return WindowSnapshot(
        model=put_model_back,
        statistics=statistics,
        scaler=attributes_of(scaler) if scaler is not None else _nothing,
        random=random_state(generators),
    )


def _held(
    modules: Sequence[nn.Module], taken: Iterable[nn.Module]
) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], list[object]]:
    """Return the modules' dictionaries with a copy of each, and what in them may move by itself.

    Args:
        modules: All.
        taken: Those whose statistics are taken already.
    """
    known = set(taken)
    dicts, containers = [], []
    for module in modules:
        own = vars(module)
        dicts.append((own, own.copy()))
        buffers = own["_buffers"]
        if module in known and len(buffers) == len(STATISTICS):
            dicts.append((buffers, buffers.copy()))
        elif buffers:
            containers.append(buffers)
        kind: Hashable = type(module)  # type: ignore[assignment]  # A class is hashable.
        for name in _own_names(kind, tuple(own)):
            value = own[name]
            if type(value) not in _FIXED and not _is_fixed_tuple(value):
                containers.append(value)
    return dicts, containers


def _nothing() -> None:
    """Put nothing back: there was nothing to take."""


@functools.lru_cache
def _own_names(kind: Hashable, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those whose values may move by themselves; layers of one kind ask for the same.

    Not what every module has, nor what torch's own layers are built with and TorchScript takes for
    constant: strides, sizes.
    """
    fixed = _STANDARD
    if getattr(kind, "__module__", "").startswith("torch.nn.modules."):
        fixed = fixed.union(getattr(kind, "__constants__", ()))
    return tuple(name for name in names if name not in fixed)


def _is_fixed_tuple(value: object) -> bool:
    return type(value) is tuple and _FIXED.issuperset(map(type, value))


def _values_of(tensors: Sequence[Tensor]) -> Restore:
    """Take the values of each, bit for bit; most are BatchNorm's, and are copied together."""
    alike: dict[object, list[Tensor]] = {}
    for t in tensors:
        together = t.ndim < 2 and t.layout is torch.strided
        alike.setdefault((t.dtype, t.device, t.ndim) if together else id(t), []).append(t)
    with torch.no_grad():
        taken = [(group, _joined(group)) for group in alike.values()]

    def put_back() -> None:
        with torch.no_grad():
            for group, values in taken:
                if len(group) == 1:
                    group[0].copy_(values)
                elif group[0].ndim:
                    torch._foreach_copy_(group, values.split([len(t) for t in group]))
                else:
                    torch._foreach_copy_(group, values.unbind())

    return put_back


def _joined(group: Sequence[Tensor]) -> Tensor:
    if len(group) == 1:
        return group[0].detach().clone()
    return torch.cat(list(group)) if group[0].ndim else torch.stack(list(group))
