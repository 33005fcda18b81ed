"""The isolated process: takes a task from its standard input, and tells what happens."""

import os
import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, cast

from autobatch.devices.failures import verdict_of
from autobatch.errors import DeviceLostError
from autobatch.events import Event, TrialEnded, TrialStarted
from autobatch.isolation.wire import Message, Raised, Returned, Told, unpacked
from autobatch.pickling import cloudpickle
from autobatch.results import Verdict

# First the parent's own path; and Ctrl-C, which a terminal sends to both, is the parent's affair.
# Not ``-m``, which would look for autobatch, and all that it imports, in the working directory.
START: Final = (
    "import sys; sys.path[:] = sys.argv[1:]; del sys.argv[1:]; "
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from autobatch.isolation.child import main; main()"
)


def main() -> None:
    """Run one task to its end, or until the parent is gone."""
    channel = _take_channel()
    _go_first()
    try:
        known, content = channel.recv_bytes(), channel.recv_bytes()
    except (EOFError, OSError):  # The parent is gone before it began.
        return
    threading.Thread(target=_end_with_parent, args=(channel,), daemon=True).start()
    teller = _Teller(channel)
    teller.send(_answer(known, content, teller))


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
