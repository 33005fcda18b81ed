"""The last error that an interpreter keeps to show it, and the tensors that stay alive with it."""

import gc
import sys
import weakref
from collections.abc import Iterator
from types import TracebackType

from torch import Tensor

from autobatch.events import ErrorForgotten, Observer
from autobatch.state import reachable

_NAMES = ("last_exc", "last_type", "last_value", "last_traceback")
_Seen = list[tuple[int, int, "weakref.ref[Tensor]"]]  # Of each tensor: its storage, bytes, itself.


def forget_last_error(observer: Observer) -> None:
    """Let go of the error in ``sys.last_*``, and tell how much that gave back."""
    seen = _cleared()
    gc.collect()
    alive = {storage for storage, _, tensor in seen if tensor() is not None}
    freed = {storage: nbytes for storage, nbytes, _ in seen if storage not in alive}
    observer(ErrorForgotten(freed_bytes=sum(freed.values())))


def _cleared() -> _Seen:
    """Empty the error's frames, wherever else it is kept; return the tensors that they held."""
    kept = [vars(sys).pop(name, None) for name in _NAMES]
    tracebacks = {
        id(t): t
        for error in kept
        if isinstance(error, BaseException | TracebackType)
        for t in _tracebacks(error)
    }
    seen: _Seen = []
    for traceback in tracebacks.values():
        frame = traceback.tb_frame
        # Not f_locals: reading those would keep a copy of them in the frame.
        shared = {id(frame.f_globals), id(frame.f_builtins)}
        held = [item for item in gc.get_referents(frame) if id(item) not in shared]
        for item in reachable(held):
            if isinstance(item, Tensor):
                storage = item.untyped_storage()
                seen.append((storage._cdata, storage.nbytes(), weakref.ref(item)))
        try:
            frame.clear()
        except RuntimeError:  # It still runs: whoever asks for this has caught the error there.
            continue
        _ = frame.f_locals  # Whoever has read these, as IPython does, has left a copy: no more.
    return seen


def _tracebacks(kept: BaseException | TracebackType) -> Iterator[TracebackType]:
    """Every entry of the tracebacks of an error and of those that it came from."""
    if isinstance(kept, BaseException):
        seen: set[int] = set()
        errors: list[BaseException | None] = [kept]
        while errors:
            error = errors.pop()
            if error is not None and id(error) not in seen:
                seen.add(id(error))
                errors += [error.__cause__, error.__context__]
                if error.__traceback__ is not None:
                    yield from _tracebacks(error.__traceback__)
        return
    entry: TracebackType | None = kept
    while entry is not None:
        yield entry
        entry = entry.tb_next
