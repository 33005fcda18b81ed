"""The last error that an interpreter keeps, and the tensors that its traceback keeps alive."""

import contextlib
import gc
import sys
import traceback
from types import TracebackType
from typing import Final

from autobatch.events import ErrorForgotten, Observer

_NAMES: Final = ("last_exc", "last_type", "last_value", "last_traceback")


def forget_last_error(observer: Observer) -> None:
    """Delete the error in ``sys.last_*`` and clear the variables of its frames.

    The frames are cleared even if the traceback is kept elsewhere too, as IPython keeps it.

    Args:
        observer: Receives ``ErrorForgotten`` if there was an error.
    """
    kept = [vars(sys).pop(name) for name in _NAMES if name in vars(sys)]
    if not kept:
        return
    _clear_frames(kept)
    kept.clear()
    gc.collect()
    observer(ErrorForgotten())


def _clear_frames(unseen: list[object]) -> None:
    """Clear the frames of errors and tracebacks, and of the errors that caused them."""
    seen: set[int] = set()
    unseen = list(unseen)
    while unseen:
        item = unseen.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, BaseException):
            unseen += [item.__cause__, item.__context__, item.__traceback__]
        elif isinstance(item, TracebackType):
            for frame, _ in traceback.walk_tb(item):
                # traceback.clear_frames would leave the copy of the variables that a frame keeps,
                # up to Python 3.12, once ``f_locals`` was read, as IPython does. Reading it again
                # empties the copy, but in a frame that still runs it would make one.
                with contextlib.suppress(RuntimeError):  # The frame still runs.
                    frame.clear()
                    _ = frame.f_locals
