"""The worker process: it runs one task, and sends events, a value or an error to its parent.

The worker's standard input is a socket to the parent. The parent sends two messages: a pickled
pair ``(prepare, argument)``, and a task that ``pack_task`` packed. The worker calls ``prepare()``,
unpacks the task, and returns ``task(observer, argument)``.
"""

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

from autobatch.devices.oom import verdict_of
from autobatch.errors import DeviceLostError
from autobatch.events import Event, TrialEnded, TrialStarted
from autobatch.isolation.messages import Message, Raised, Reported, Returned
from autobatch.isolation.serialization import cloudpickle, unpack_task
from autobatch.results.verdict import Verdict

_UNSET: Final = "none"  # The parent has no PYTHONPATH.
_SET: Final = "some:"  # The prefix of the parent's PYTHONPATH.


def main() -> None:
    """Run one task to its end, or until the parent process is gone."""
    _set_search_path()
    _ignore_interrupts()
    channel = _take_channel()
    _volunteer_for_the_oom_killer()
    try:
        preparation, task = channel.recv_bytes(), channel.recv_bytes()
    except (EOFError, OSError):  # The parent ended before it sent the task.
        return
    threading.Thread(target=_exit_with_parent, args=(channel,), daemon=True).start()
    reporter = _Reporter(channel)
    reporter.send(_run(preparation, task, reporter))


def command(path: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment variables that start a worker process.

    ``-P`` keeps Python from looking for autobatch, and for all that autobatch imports, in the
    working directory first. ``PYTHONPATH`` makes ``path`` the search path before the first import;
    the worker then gives the variable the parent's value again, for the user's code.

    Args:
        path: The directories in which the worker looks for modules.

    Example:
        >>> arguments, environment = command(sys.path)
        >>> subprocess.Popen(arguments, stdin=channel.fileno(), env=environment)
    """
    variable = os.environ.get("PYTHONPATH")
    value = _UNSET if variable is None else _SET + variable
    # -u: the output of a worker that is killed must not stay in a buffer.
    parts = [sys.executable, "-u", "-P", "-m", "autobatch.isolation", value, *path]
    return parts, {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


class _Reporter:
    """An observer that sends events to the parent, and knows whether a trial runs."""

    def __init__(self, channel: "Connection[bytes, bytes]") -> None:
        self._channel = channel
        self.trial_is_running = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, TrialStarted | TrialEnded):
            self.trial_is_running = isinstance(event, TrialStarted)
        self.send(Reported(event=event))

    def send(self, message: Message) -> None:
        self._channel.send_bytes(cloudpickle().dumps(message))


def _run(preparation: bytes, content: bytes, reporter: _Reporter) -> Message:
    try:
        prepare, argument = pickle.loads(preparation)
        prepare()
        task = cast("Callable[..., object]", unpack_task(content))
        return Returned(value=task(reporter, argument))
    except BaseException as error:  # noqa: BLE001  # The parent raises SystemExit as well.
        lost = reporter.trial_is_running and verdict_of(error) is Verdict.FATAL
        cause = error.__cause__ if isinstance(error, DeviceLostError) else None
        return Raised.of(cause or error, context_lost=lost)


def _set_search_path() -> None:
    """Use the parent's search path, and give PYTHONPATH the parent's value."""
    variable, *path = sys.argv[1:]
    sys.path[:] = path
    del sys.argv[1:]
    os.environ.pop("PYTHONPATH", None)
    if variable != _UNSET:
        os.environ["PYTHONPATH"] = variable.removeprefix(_SET)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C, which a terminal sends to both processes, to the parent.

    The parent starts the worker with the signal blocked, so no Ctrl-C ends the worker before.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _take_channel() -> "Connection[bytes, bytes]":
    """Return the connection to the parent, and leave an empty standard input to the user's code."""
    channel = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return channel


def _volunteer_for_the_oom_killer() -> None:
    """Make Linux kill this process before the user's session when host memory runs out."""
    with suppress(OSError):  # The system is not Linux, or a container forbids the change.
        Path("/proc/self/oom_score_adj").write_text("1000")


def _exit_with_parent(channel: "Connection[bytes, bytes]") -> None:
    """Exit as soon as the parent is gone: the channel, on which nothing follows, is then closed."""
    with suppress(OSError, EOFError):
        channel.recv_bytes()
    os._exit(1)
