"""Worker processes that are forked from one that has torch imported already.

A fresh interpreter takes two to three seconds to import torch. Tests of what a worker answers need
not wait for that each time; tests of the process itself start fresh ones.
"""

import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest

_WORKER = "autobatch.isolation"
_IMPORTED = ("autobatch.isolation.worker", "autobatch.prediction.tracing_worker")


class _Launch(NamedTuple):
    """What a forked process is to be like."""

    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    folder: str
    blocked: frozenset[int]


class _Forked:
    """A forked process, with as much of ``subprocess.Popen`` as the parent of a worker uses."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired([_WORKER], timeout or 0.0)
            self.returncode = int(self._connection.recv(16))
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def kill(self) -> None:
        if self.returncode is None:
            self._connection.send(b"kill")


class Servers(ExitStack):
    """The processes that fork, each started when it is first needed."""

    def __init__(self) -> None:
        super().__init__()
        self._addresses: dict[bool, str] = {}  # By whether the server has torchvision.

    def address(self) -> str:
        """Return where to ask for a process."""
        has_torchvision = "torchvision" in sys.modules  # A tracing worker then imports it too.
        if has_torchvision not in self._addresses:
            self._addresses[has_torchvision] = self.enter_context(_server(has_torchvision))
        return self._addresses[has_torchvision]

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, workers are forked; everything else that is started is started as ever."""
        started = subprocess.Popen

        def popen(arguments: Any, **options: Any) -> Any:
            if not isinstance(arguments, list) or arguments[1:5] != ["-u", "-P", "-m", _WORKER]:
                return started(arguments, **options)
            return _launch(self.address(), arguments[4:], **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", popen)
            yield


@contextmanager
def _server(has_torchvision: bool) -> Iterator[str]:
    """Start the process that forks, and end it."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        address = str(Path(folder, "socket"))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            listening.listen()
            process = subprocess.Popen(
                [sys.executable, __file__, str(listening.fileno()), str(has_torchvision)],
                pass_fds=[listening.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
        try:
            yield address
        finally:
            process.kill()
            process.wait()


def _launch(
    address: str,
    words: Sequence[str],
    *,
    stdin: int,
    env: Mapping[str, str],
    stdout: int | None = None,
    stderr: IO[bytes] | None = None,
) -> _Forked:
    with open(os.devnull, "wb") as nothing:
        files = [
            stdin,
            nothing.fileno() if stdout == subprocess.DEVNULL else 1,
            2 if stderr is None else stderr.fileno(),
        ]
        blocked = frozenset(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        launch = _Launch(words[0], tuple(words[1:]), dict(env), os.getcwd(), blocked)
        content = pickle.dumps(launch)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], files)
        connection.sendall(content)
    return _Forked(connection)


def _serve(listening: socket.socket) -> _Launch:
    """Fork a process for each connection; return in the forked ones."""
    children: dict[int, socket.socket] = {}
    wakes, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        waited_for: list[int | socket.socket] = [listening, wakes, *children.values()]
        ready = select.select(waited_for, [], [])[0]
        for pid in [pid for pid, connection in children.items() if connection in ready]:
            os.kill(pid, signal.SIGKILL)  # The parent asks for it, or is gone.
            children[pid].recv(16)
        if wakes in ready:
            os.read(wakes, 4096)
            _report_ended(children)
        if listening in ready:
            connection, files, content = _accepted(listening)
            pid = os.fork()
            if not pid:
                for held in (listening, connection, *children.values()):
                    held.detach()
                return _forked(files, content)
            children[pid] = connection
            for file in files:
                os.close(file)


def _report_ended(children: dict[int, socket.socket]) -> None:
    """Send the exit statuses of the children that have ended to those who wait for them."""
    while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        with suppress(OSError), children.pop(ended[0]) as connection:
            connection.send(b"%d" % os.waitstatus_to_exitcode(ended[1]))


def _accepted(listening: socket.socket) -> tuple[socket.socket, list[int], bytes]:
    """Return a connection, the standard files that came over it, and the pickled launch."""
    connection, _ = listening.accept()
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    content = b""
    while len(content) < int.from_bytes(length, "big"):
        content += connection.recv(2**20)
    return connection, files, content


def _forked(files: list[int], content: bytes) -> _Launch:
    """Leave the server's files and signals, in the forked process; return the launch."""
    for there, here in enumerate(files):
        os.dup2(here, there)
    os.closerange(3, 1024)  # A parent sees the end of a pipe only if nobody else holds it.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    launch: _Launch = pickle.loads(content)
    return launch


def _become(launch: _Launch) -> None:
    """Be what ``python -m module arguments`` would be."""
    os.environ.clear()
    os.environ.update(launch.environment)
    os.chdir(launch.folder)
    signal.pthread_sigmask(signal.SIG_SETMASK, launch.blocked)
    sys.argv[1:] = launch.arguments
    runpy.run_module(launch.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for each in _IMPORTED:
        import_module(each)
    if sys.argv[2] == "True":
        import_module("autobatch.compat.torchvision").import_torchvision()
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
