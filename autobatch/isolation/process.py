"""A task that is run in isolated processes: in a fresh one wherever a trial has ended the last."""

import math
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Final, TypeVar, cast

from autobatch.compat.torch_settings import Settings
from autobatch.errors import AutobatchError, ProcessDiedError
from autobatch.events import Event, Observer, SearchStarted, TrialEnded, TrialStarted
from autobatch.isolation.messages import Message, Raised, Returned, Told, packed
from autobatch.isolation.worker import command
from autobatch.results import Trial, Verdict

Result = TypeVar("Result")
Task = Callable[[Observer, Sequence[Trial]], Result]

_MOST_DEATHS: Final = 24  # Without a size that ran: more than bisection of a million has.
_TICK_SECONDS: Final = 0.1  # How late a trial that takes too long is noticed.
_GRACE_SECONDS: Final = 10.0  # To end by itself when all is said.


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What has ended a process before its task was done."""

    message: str
    verdict: Verdict = Verdict.FATAL


def run_isolated(
    task: Task[Result],
    *,
    observer: Observer,
    history: Sequence[Trial] = (),
    timeout_seconds: float | None = None,
) -> Result:
    """Return ``task(observer, history)``, run in another process; nothing here is touched.

    All trials share one process, until one of them ends it: the device's context is lost, the
    process dies (both ``Verdict.FATAL``), or the trial does not end in time (``TOO_SLOW``). Then a
    fresh process is given the task, with all trials so far as its history. The task must take
    those as known, and not try their sizes again.

    Args:
        task: A ``partial`` of a function that can be imported. Its arguments may come from a script
            or a notebook, lambdas included. Torch's settings, the path and the working directory
            are this process's.
        observer: Is told here what the task tells there, and of the trials that end a process.
        history: Trials that the task is not to repeat.
        timeout_seconds: How long a trial may take.

    Raises:
        TypeError: If an argument cannot be sent to another process; none has been started.
        ProcessDiedError: If the process dies and it is not a trial that did it, or if trial after
            trial does.
        BaseException: What the task raises, with its traceback as a note.
    """
    story = _Story(observer, history)
    while isinstance(ended := _run(task, story, timeout_seconds), Ended):
        story.outlive(ended)
    return cast("Result", ended.value)


def try_isolated(task: Task[Trial], *, timeout_seconds: float | None = None) -> Trial:
    """Return the trial that ``task`` makes in another process, or the one that has ended it.

    As ``run_isolated``; what the task tells but for the start of its trial goes unheard.
    """
    story = _Story(lambda _: None, ())
    ended = _run(task, story, timeout_seconds)
    if isinstance(ended, Ended):
        story.outlive(ended)
        return story.trials[-1]
    return cast("Trial", ended.value)


def _run(task: Task[object], story: "_Story", timeout_seconds: float | None) -> Returned | Ended:
    """Run the task in one process."""
    if sys.platform == "win32":
        raise AutobatchError("isolated processes are not built for Windows yet; use WSL")
    content = packed(task)
    with _child() as child:
        child.send(pickle.dumps((Settings.here(), tuple(story.trials))))
        child.send(content)
        del content  # A copy of the model.
        ended = _listen(child, story, math.inf if timeout_seconds is None else timeout_seconds)
    if isinstance(ended, Raised):
        raise ended.error()
    return ended


class _Story:
    """What the observer is told, over all processes.

    Attributes:
        trials: Every trial that has ended.
        is_lost: Whether the last of them has cost its process the device, or its life.
    """

    def __init__(self, observer: Observer, history: Sequence[Trial]) -> None:
        self.trials = list(history)
        self.is_lost = False
        self._observer = observer
        self._has_started = False
        self._deaths = 0
        self._trying: int | None = None
        self._since = 0.0

    @property
    def trying_seconds(self) -> float:
        """How long the trial that runs has run; 0 between trials."""
        return 0.0 if self._trying is None else time.monotonic() - self._since

    def tell(self, event: Event) -> None:
        """Hand an event on, but for a search's start that a later process tells again."""
        match event:
            case SearchStarted() if self._has_started:
                return
            case SearchStarted():
                self._has_started = True
            case TrialStarted():
                self._trying, self._since = event.size, time.monotonic()
            case TrialEnded():
                self._trying = None
                self.trials.append(event.trial)
                self._deaths *= not event.trial.fits  # In a row.
                self.is_lost = event.trial.failure is Verdict.FATAL
        self._observer(event)

    def outlive(self, ended: Ended) -> None:
        """Put down what has ended a process to the size that it was trying.

        Raises:
            ProcessDiedError: If it was trying none, or too many have ended so.
        """
        if self._trying is not None:
            trial = Trial(
                size=self._trying,
                fits=False,
                failure=ended.verdict,
                seconds=self.trying_seconds,
                message=ended.message,
                explained=False,
                repeated=any(self._trying == before.size for before in self.trials),
            )
            self.tell(TrialEnded(trial=trial))
            self.is_lost = True
        self._deaths += 1
        if not self.is_lost or self._deaths >= _MOST_DEATHS:
            ran = max((trial.size for trial in self.trials if trial.fits), default=None)
            raise ProcessDiedError(ended.message, ran)
        self.is_lost = False


class _Child:
    """An isolated process, as its parent sees it."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", channel: "Connection[bytes, bytes]"
    ) -> None:
        self._process = process
        self._channel = channel

    def send(self, content: bytes | memoryview) -> None:
        with suppress(OSError):  # Dead already: that is found out by who listens.
            self._channel.send_bytes(content)

    def receive(self) -> Message | None:
        """Return what it says next, or None if it says nothing for a moment.

        Raises:
            EOFError: If it is dead.
        """
        try:
            if self._channel.poll(_TICK_SECONDS):
                message: Message = pickle.loads(self._channel.recv_bytes())
                return message
        except OSError as error:  # It died in the middle of a message.
            raise EOFError from error
        # A process that it has started may hold the channel open for longer than it lives.
        if self._process.poll() is not None and not self._channel.poll():
            raise EOFError
        return None

    def wait(self) -> int | None:
        """Let it end by itself, and return how it did; None if it does not."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(_GRACE_SECONDS)
        return None


@contextmanager
def _child() -> Iterator[_Child]:
    """Start a process; whatever happens inside, it is gone afterwards."""
    here, there = Pipe()
    parts, environment = command([*map(str, sys.path)])
    with here:
        with there, _holding_interrupts():
            process = subprocess.Popen(parts, stdin=there.fileno(), env=environment)
        try:
            yield _Child(process, here)
        finally:
            process.kill()
            process.wait()


@contextmanager
def _holding_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back; a process that is started inside begins so, and none is lost here."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen(child: _Child, story: _Story, timeout_seconds: float) -> Returned | Raised | Ended:
    """Hand events on until the task is done, or its process is at its end."""
    while story.trying_seconds < timeout_seconds:
        try:
            message = child.receive()
        except EOFError:
            return Ended(message=_death(child.wait()))
        match message:
            case Told():
                story.tell(message.event)
                if story.is_lost:
                    return Ended(message="the device's context is lost")
            case Raised(context_lost=True):
                return Ended(message=message.text)
            case Raised() | Returned():
                child.wait()
                return message
    return Ended(
        verdict=Verdict.TOO_SLOW,
        message=f"did not end within {timeout_seconds:g} s, so its process was ended",
    )


def _death(status: int | None) -> str:
    """What to say of a process with this exit status; None: it lives, and has hung up."""
    if status is None:
        return "the isolated process has closed all its files"
    if status >= 0:
        return f"the isolated process ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # A real-time signal has none.
        name = "unnamed"
    hint = ", perhaps because the host ran out of memory" if name == "SIGKILL" else ""
    return f"the isolated process died with signal {-status} ({name}){hint}"
