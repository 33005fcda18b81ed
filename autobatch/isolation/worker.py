"""The isolated process: takes a task from its standard input, and tells what happens."""

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, cast

from autobatch.devices.failures import verdict_of
from autobatch.errors import DeviceLostError
from autobatch.events import Event, TrialEnded, TrialStarted
from autobatch.isolation.messages import Message, Raised, Returned, Told, unpacked
from autobatch.isolation.serialization import cloudpickle
from autobatch.results import Verdict

_NONE: Final = "none"  # No PYTHONPATH.
_SOME: Final = "some:"


def main() -> None:
    """Run one task to its end, or until the parent is gone."""
    _take_path()
    _leave_interrupts()
    channel = _take_channel()
    _go_first()
    try:
        known, content = channel.recv_bytes(), channel.recv_bytes()
    except (EOFError, OSError):  # The parent is gone before it began.
        return
    threading.Thread(target=_end_with_parent, args=(channel,), daemon=True).start()
    teller = _Teller(channel)
    teller.send(_answer(known, content, teller))


def command(path: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return what starts an isolated process that looks for modules in ``path``, and where.

    ``-P``, for else ``-m`` looks for autobatch, and all that it imports, in the working directory
    first. The path goes by the environment as well, where it is before anything is imported; user
    code finds the variable as it was.
    """
    before = os.environ.get("PYTHONPATH")
    told = _NONE if before is None else _SOME + before
    # Unbuffered: what it prints is seen even if it is killed.
    parts = [sys.executable, "-u", "-P", "-m", "autobatch.isolation", told, *path]
    return parts, {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


class _Teller:
    """Tells the parent, and knows whether a size is being tried."""

    def __init__(self, channel: "Connection[bytes, bytes]") -> None:
        self._channel = channel
        self.is_trying = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, TrialStarted | TrialEnded):
            self.is_trying = isinstance(event, TrialStarted)
        self.send(Told(event=event))

    def send(self, message: Message) -> None:
        self._channel.send_bytes(cloudpickle().dumps(message))


def _answer(known: bytes, content: bytes, teller: _Teller) -> Message:
    settings, history = pickle.loads(known)
    try:
        settings.apply()
        task = cast("Callable[..., object]", unpacked(content))
        return Returned(value=task(teller, history))
    except BaseException as error:  # noqa: BLE001  # The parent raises it: SystemExit as well.
        lost = teller.is_trying and verdict_of(error) is Verdict.FATAL
        said = error.__cause__ if isinstance(error, DeviceLostError) else None
        return Raised.of(said or error, context_lost=lost)


def _take_path() -> None:
    """Look for modules where the parent does, and give user code the variable that it knows."""
    told, *path = sys.argv[1:]
    sys.path[:] = path
    del sys.argv[1:]
    os.environ.pop("PYTHONPATH", None)
    if told != _NONE:
        os.environ["PYTHONPATH"] = told.removeprefix(_SOME)


def _leave_interrupts() -> None:
    """Ctrl-C, which a terminal sends to both, is the parent's affair; it is held back until now."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _take_channel() -> "Connection[bytes, bytes]":
    """Return the parent's connection; user code that reads its input finds the end of it."""
    channel = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return channel


def _go_first() -> None:
    """Where the host's memory ends, Linux is to end this process and not the user's session."""
    with suppress(OSError):  # Another system, or a container that forbids it.
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_with_parent(channel: "Connection[bytes, bytes]") -> None:
    """The parent says nothing more; when it is gone, so is this process, whatever it is doing."""
    with suppress(OSError, EOFError):
        channel.recv_bytes()
    os._exit(1)
