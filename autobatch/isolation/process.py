"""A worker process as its parent sees it: started, listened to, and killed at the end."""

import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import IO, Final

from autobatch.errors import AutobatchError
from autobatch.isolation.messages import Message, Raised, Returned
from autobatch.isolation.worker import command

_POLL_SECONDS: Final = 0.1  # The longest time that ``receive`` waits.
_GRACE_SECONDS: Final = 10.0  # The longest time that a worker may take to end by itself.
_NO_VARIABLES: Final[Mapping[str, str]] = MappingProxyType({})


class WorkerProcess:
    """A process that runs one task. ``worker_process`` makes one.

    Args:
        process: The process, whose standard input is the other end of ``channel``.
        channel: The connection to the process.
        complaints: The file that holds the process's standard error, or None if the process
            writes to this process's.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        channel: "Connection[bytes, bytes]",
        complaints: IO[bytes] | None,
    ) -> None:
        self._process = process
        self._channel = channel
        self._complaints = complaints

    def begin(
        self, task: bytes | memoryview, argument: object, *, prepare: Callable[[], None]
    ) -> None:
        """Make the worker call ``prepare()``, and then the task with an observer and ``argument``.

        Args:
            task: A function of an observer and an argument, packed by ``pack_task``.
            argument: A value that plain pickle can send.
            prepare: A function that plain pickle can send; the worker calls it before it unpacks
                the task.
        """
        for content in (pickle.dumps((prepare, argument)), task):
            with suppress(OSError):  # The worker is dead: ``receive`` says so.
                self._channel.send_bytes(content)

    def receive(self) -> Message | None:
        """Return the worker's next message, or None if no message comes within 0.1 s.

        Raises:
            EOFError: If the worker is dead, and has left no message.
        """
        try:
            if self._channel.poll(_POLL_SECONDS):
                message: Message = pickle.loads(self._channel.recv_bytes())
                return message
        except OSError as error:  # The worker died in the middle of a message.
            raise EOFError from error
        # A process that the worker has started may keep the channel open after the worker's death.
        if self._process.poll() is not None and not self._channel.poll():
            raise EOFError
        return None

    def outcome(self) -> Returned | Raised:
        """Wait for the end of the task, and return the message about it. Events are dropped.

        Raises:
            EOFError: If the worker dies before.
        """
        while True:
            message = self.receive()
            if isinstance(message, Returned | Raised):
                return message

    def wait(self) -> int | None:
        """Return the exit status, negative for a signal, or None if the worker lives after 10 s."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(_GRACE_SECONDS)
        return None

    def complaints(self) -> str:
        """Return the standard error of a worker that was started with ``silent=True``."""
        if self._complaints is None:
            return ""
        self._complaints.seek(0)
        return self._complaints.read().decode(errors="replace").strip()


@contextmanager
def worker_process(
    *, variables: Mapping[str, str] = _NO_VARIABLES, silent: bool = False
) -> Iterator[WorkerProcess]:
    """Start a fresh interpreter that waits for a task, and kill it when the block ends.

    The worker has this process's search path, working directory and environment variables. It runs
    no code of the user's main module, which therefore needs no ``if __name__ == "__main__"``.

    Args:
        variables: Environment variables in which the worker differs from this process.
        silent: Whether the worker's standard output is dropped, and its standard error kept for
            ``WorkerProcess.complaints``.

    Raises:
        AutobatchError: On Windows.

    Example:
        >>> with worker_process() as worker:
        ...     worker.begin(pack_task(task), argument, prepare=TorchSettings.here().apply)
        ...     message = worker.outcome()
    """
    if sys.platform == "win32":
        raise AutobatchError("isolated processes are not built for Windows yet; use WSL")
    here, there = Pipe()
    arguments, environment = command([*map(str, sys.path)])
    with ExitStack() as stack:
        stack.enter_context(here)
        errors = stack.enter_context(tempfile.TemporaryFile()) if silent else None
        with there, _interrupts_blocked():
            process = subprocess.Popen(
                arguments,
                stdin=there.fileno(),
                stdout=subprocess.DEVNULL if silent else None,
                stderr=errors,
                env={**environment, **variables},
            )
        try:
            yield WorkerProcess(process, here, errors)
        finally:
            process.kill()
            process.wait()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C inside: a process that is started inside inherits the blocked signal.

    A Ctrl-C that arrives inside is delivered afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
