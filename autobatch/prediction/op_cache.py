"""A cache of the results of operations on fake tensors.

``FakeTensorMode`` has a cache too, but reads every property of each tensor, which takes most of a
trace's time. This cache serves plain tensors only, by shape, strides, dtype and device. Other
tensors, and operations that return views, go to ``FakeTensorMode``.
"""

import contextlib
import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

_PLAIN: Final = (
    *(type(None), bool, int, float, str),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_UNFORESEEN: Final = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}
_Kind = Literal["new", "in place", "other"]


class _Spec(NamedTuple):
    """The properties of a tensor that an operation returned."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Several(NamedTuple):
    """The properties of a tuple or a list of tensors."""

    kind: type
    parts: list[Any]


class _NotPlainError(Exception):
    """A value is neither a plain tensor nor a plain value."""


class OperationCache:
    """Runs an operation under a ``FakeTensorMode``, or returns a copy of its cached result."""

    def __init__(self) -> None:
        self._results: dict[Hashable, Any] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return ``func(*args, **kwargs)``."""
        kind = _kind(func)
        if kind == "other":
            return func(*args, **kwargs)
        try:
            key = func, torch.get_default_dtype(), _described(args), _described([*kwargs.items()])
        except _NotPlainError:
            return func(*args, **kwargs)
        if kind == "in place":
            return args[0]
        if key in self._results:
            with unset_fake_temporarily() as mode:  # None while real data are loaded.
                return _made(self._results[key], mode or _mode_of(args))
        out = func(*args, **kwargs)
        with contextlib.suppress(_NotPlainError):
            self._results[key] = _result(out, [*args, *kwargs.values()])
        return out


@functools.cache
def _kind(func: Any) -> _Kind:
    """Return whether ``func`` returns new tensors, or works in place on its first argument."""
    schema = func._schema
    if func.namespace != "aten" or not _UNFORESEEN.isdisjoint(func.tags):
        return "other"
    aliases = [returned.alias_info for returned in schema.returns]
    if all(alias is None for alias in aliases):
        return "new"
    first = schema.arguments[0].alias_info if schema.arguments else None
    if len(aliases) > 1 or first is None or not first.is_write:
        return "other"
    return "in place" if aliases[0].before_set == first.before_set else "other"


def _described(value: Any) -> Hashable:
    if isinstance(value, FakeTensor):
        if value.layout is not torch.strided or value.constant is not None:
            raise _NotPlainError
        if value.is_conj() or value.is_neg():
            raise _NotPlainError
        return value.shape, value.stride(), value.dtype, value.fake_device
    if isinstance(value, _PLAIN):
        return type(value), value  # 1, 1.0 and True are equal.
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    raise _NotPlainError


def _result(out: Any, given: Sequence[Any]) -> Any:
    """Return the properties of ``out``.

    Raises:
        _NotPlainError: If a tensor in ``out`` shares memory with another one.
    """
    taken = {tensor.untyped_storage()._cdata for tensor in _tensors(given)}

    def of(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return _Several(type(value), [of(part) for part in value])
        if isinstance(value, _PLAIN):
            return value
        _described(value)  # Raise if the value is not plain.
        spec = _Spec(value.shape, value.stride(), value.dtype, value.fake_device)
        storage = value.untyped_storage()
        whole = value.storage_offset() == 0 and storage.nbytes() == _bytes(spec)
        if storage._cdata in taken or not whole:
            raise _NotPlainError
        taken.add(storage._cdata)
        return spec

    return of(out)


def _tensors(values: Iterable[Any]) -> Iterator[FakeTensor]:
    for value in values:
        if isinstance(value, FakeTensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _mode_of(values: Iterable[Any]) -> FakeTensorMode:
    return next(_tensors(values)).fake_mode


def _bytes(spec: _Spec) -> int:
    """Return the bytes of a tensor's memory if the memory holds nothing else."""
    if 0 in spec.shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(spec.shape, spec.stride, strict=True))
    return (last + 1) * spec.dtype.itemsize


def _made(result: Any, mode: Any) -> Any:
    """Return a new result with the given properties. Call it outside ``mode``.

    A fake tensor wraps a real tensor on ``meta``, which ``mode`` would make fake.
    """
    if type(result) is _Several:
        return result.kind(_made(part, mode) for part in result.parts)
    if type(result) is not _Spec:
        return result
    shape, stride, dtype, device = result
    return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)
