"""The messages that a worker process sends to its parent."""

import pickle
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from autobatch.errors import ISOLATED, AutobatchError
from autobatch.events import Event
from autobatch.isolation.serialization import cloudpickle


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """An event for the parent's observer."""

    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """The value that the task returned."""

    value: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """The error that ended the task.

    Attributes:
        pickled: The error itself, or None if the error cannot be sent.
        text: The error's type and message.
        trace: The formatted traceback.
        context_lost: Whether the error says that the worker can no longer use its device.
    """

    pickled: bytes | None
    text: str
    trace: str
    context_lost: bool

    @classmethod
    def of(cls, error: BaseException, *, context_lost: bool) -> "Raised":
        """Return the message for an error.

        Args:
            error: The error, with its traceback.
            context_lost: Whether the worker can no longer use its device. The error is then not
                pickled, because it may hold tensors on that device.
        """
        return cls(
            pickled=None if context_lost else _pickled_error(error),
            text="".join(traceback.format_exception_only(error)).strip(),
            trace="".join(traceback.format_exception(error)).strip(),
            context_lost=context_lost,
        )

    def error(self, heading: str = ISOLATED) -> BaseException:
        """Return the error as the parent raises it, with the worker's traceback as a note.

        Args:
            heading: The first line of the note.

        Returns:
            The error itself, in its own type, or an ``AutobatchError`` with its text if the error
            could not be sent.
        """
        error: object = None
        if self.pickled is not None:
            with suppress(Exception):  # The parent may lack a module that the worker imported.
                error = pickle.loads(self.pickled)
        if not isinstance(error, BaseException):
            error = AutobatchError(f"in the isolated process: {self.text}")
        error.add_note(f"{heading}\n{self.trace}")
        return error


Message = Reported | Returned | Raised


def _pickled_error(error: BaseException) -> bytes | None:
    """Return the error as bytes, or None if no form of the error can be pickled and loaded."""
    for form in (error, _WithoutInit(error)):
        with suppress(Exception):  # A user's error may hold anything.
            content: bytes = cloudpickle().dumps(form)
            pickle.loads(content)
            return content
    return None


class _WithoutInit:
    """An error that is rebuilt without its ``__init__``, which may take other arguments."""

    def __init__(self, error: BaseException) -> None:
        self._content = type(error), error.args, vars(error)

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[object, ...]]:
        return _rebuilt, self._content


def _rebuilt(
    kind: type[BaseException], args: tuple[object, ...], attributes: Mapping[str, object]
) -> BaseException:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error
