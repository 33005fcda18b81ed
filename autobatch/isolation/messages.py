"""What goes between this process and the isolated one, as bytes."""

import inspect
import io
import pickle
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Final

import torch

from autobatch.errors import ISOLATED, AutobatchError
from autobatch.events import Event
from autobatch.isolation.serialization import cloudpickle

_DEPTH: Final = 12  # How far into an argument the part that cannot be sent is sought.


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An event, for the observer."""

    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """What the task returned."""

    value: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """An error that ended the task.

    Attributes:
        pickled: The error itself, or None if it cannot be sent.
        text: Its type and what it says.
        trace: The traceback, for people.
        context_lost: Whether it says that the device can no longer be used by its process.
    """

    pickled: bytes | None
    text: str
    trace: str
    context_lost: bool

    @classmethod
    def of(cls, error: BaseException, *, context_lost: bool) -> "Raised":
        """Return what can be sent of an error."""
        return cls(
            pickled=None if context_lost else _pickled_error(error),  # It may hold tensors there.
            text="".join(traceback.format_exception_only(error)).strip(),
            trace="".join(traceback.format_exception(error)).strip(),
            context_lost=context_lost,
        )

    def error(self) -> BaseException:
        """Return the error: the user's own type, or an ``AutobatchError`` with what it said."""
        error: object = None
        if self.pickled is not None:
            with suppress(Exception):  # What it is made of may be only there.
                error = pickle.loads(self.pickled)
        if not isinstance(error, BaseException):
            error = AutobatchError(f"in the isolated process: {self.text}")
        error.add_note(f"{ISOLATED}\n{self.trace}")
        return error


Message = Told | Returned | Raised


def _pickled_error(error: BaseException) -> bytes | None:
    """Return an error as bytes, or None if no form of it arrives."""
    for form in (error, _Bare(error)):
        with suppress(Exception):  # A user's error may hold anything.
            content: bytes = cloudpickle().dumps(form)
            pickle.loads(content)
            return content
    return None


class _Bare:
    """An error whose class takes other arguments than it hands on: made without ``__init__``."""

    def __init__(self, error: BaseException) -> None:
        self._content = type(error), error.args, vars(error)

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[object, ...]]:
        return _made_anew, self._content


def _made_anew(
    kind: type[BaseException], args: tuple[object, ...], attributes: Mapping[str, object]
) -> BaseException:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


def packed(task: Callable[..., object]) -> memoryview:
    """Return the task as bytes: what is defined in a script or a notebook by value.

    Tensors that share memory share it again where they arrive.

    Raises:
        TypeError: If part of it cannot be sent; the argument is named.
        AutobatchError: If cloudpickle is not installed.
    """
    cloudpickle()
    try:
        return _packed(task)
    except Exception as error:  # noqa: BLE001  # Pickling runs code of the user's.
        cause = error
    name, part = _culprit("task", task)
    raise TypeError(
        f"{name} cannot be sent to an isolated process ({type(part).__name__}: {cause}); make it "
        "where it is needed, in a function or a factory, leave it out of the pickle with "
        "__getstate__, or search with isolate=False"
    ) from cause


def unpacked(content: bytes) -> object:
    """Return what ``packed`` was given. It runs code: only for bytes of this user's own."""
    return torch.load(io.BytesIO(content), weights_only=False)


def _packed(value: object) -> memoryview:
    buffer = io.BytesIO()
    # Torch's own format keeps one copy of memory that tensors share.
    torch.save(value, buffer, cloudpickle(), pickle.HIGHEST_PROTOCOL)
    return buffer.getbuffer()


def _culprit(name: str, value: object) -> tuple[str, object]:
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
        _packed(value)
    except Exception:  # noqa: BLE001  # As above: any failure is the answer.
        return False
    return True


def _parts(name: str, value: object) -> Mapping[str, object]:
    """What a value is made of. Arguments have names of their own; the rest is named from there."""
    if isinstance(value, partial):
        return inspect.signature(value.func).bind_partial(*value.args, **value.keywords).arguments
    if is_dataclass(value) and type(value).__module__.startswith("autobatch."):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {f"{name}.{key}": part for key, part in _inside(value).items()}


def _inside(value: object) -> Mapping[Any, object]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if inspect.isfunction(value):
        used = inspect.getclosurevars(value)
        return {**used.globals, **used.nonlocals}
    children = dict(value.named_children()) if isinstance(value, torch.nn.Module) else {}
    return {**children, **getattr(value, "__dict__", {})}
