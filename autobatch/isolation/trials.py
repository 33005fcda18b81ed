"""A search in worker processes: if a trial ends its process, the search goes on in another."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar, cast

from autobatch.compat.torch_settings import TorchSettings
from autobatch.errors import ProcessDiedError
from autobatch.events import Event, Observer, SearchStarted, TrialEnded, TrialStarted
from autobatch.isolation.messages import Raised, Reported, Returned
from autobatch.isolation.process import WorkerProcess, worker_process
from autobatch.isolation.serialization import pack_task
from autobatch.results.search import Trial
from autobatch.results.verdict import Verdict

Result = TypeVar("Result")
Task = Callable[[Observer, Sequence[Trial]], Result]

_MOST_DEATHS: Final = 24  # In a row, without a size that ran; bisecting a million takes fewer.


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEnded:
    """The reason why a process ended before its task was done.

    Attributes:
        message: The reason in words.
        verdict: ``Verdict.FATAL``, or ``Verdict.TOO_SLOW`` for a trial that took too long.
    """

    message: str
    verdict: Verdict = Verdict.FATAL


def run_isolated(
    task: Task[Result],
    *,
    observer: Observer,
    history: Sequence[Trial] = (),
    timeout_seconds: float | None = None,
) -> Result:
    """Return ``task(observer, history)``, run in another process; this process is not changed.

    All trials share one process until a trial ends it: the device's context is lost or the process
    dies (``Verdict.FATAL``), or the trial takes longer than ``timeout_seconds``
    (``Verdict.TOO_SLOW``). A fresh process then runs the task with all trials so far as its
    history. The task must not try the sizes of its history again.

    Args:
        task: A ``partial`` of a function that can be imported. Its arguments may come from a script
            or a notebook, lambdas included. The other process has this process's torch settings,
            search path and working directory.
        observer: Called in this process with the task's events, and with an event for each trial
            that ends a process.
        history: Trials that the task does not repeat.
        timeout_seconds: The longest time that one trial may take; None sets no limit.

    Returns:
        The value that the task returned.

    Raises:
        TypeError: If an argument cannot be sent to another process. No process is started then.
        ProcessDiedError: If the process dies outside a trial, or if 24 trials in a row end it.
        BaseException: The error that the task raised, with the other process's traceback as a
            note.

    Example:
        >>> run_isolated(partial(search, model, data), observer=print, timeout_seconds=60)
    """
    record = _TrialRecord(observer, history)
    while isinstance(ended := _run(task, record, timeout_seconds), ProcessEnded):
        record.add_death(ended)
    return cast("Result", ended.value)


def try_isolated(task: Task[Trial], *, timeout_seconds: float | None = None) -> Trial:
    """Return the trial that the task makes in another process, or the trial that ended the process.

    Args:
        task: As for ``run_isolated``. It makes one trial.
        timeout_seconds: As for ``run_isolated``.

    Raises:
        TypeError, ProcessDiedError, BaseException: As for ``run_isolated``.
    """
    record = _TrialRecord(lambda _: None, ())
    ended = _run(task, record, timeout_seconds)
    if isinstance(ended, ProcessEnded):
        record.add_death(ended)
        return record.trials[-1]
    return cast("Trial", ended.value)


def _run(
    task: Task[object], record: "_TrialRecord", timeout_seconds: float | None
) -> Returned | ProcessEnded:
    """Run the task in one process."""
    content = pack_task(task)
    with worker_process() as worker:
        worker.begin(content, tuple(record.trials), prepare=TorchSettings.here().apply)
        del content  # A copy of the model.
        ended = _listen(worker, record, math.inf if timeout_seconds is None else timeout_seconds)
    if isinstance(ended, Raised):
        raise ended.error()
    return ended


class _TrialRecord:
    """The trials of one search over all its processes.

    Args:
        observer: Receives the events.
        history: Trials that ended before.

    Attributes:
        trials: Every trial that has ended.
        process_is_lost: Whether the last trial has cost its process the device, or its life.
    """

    def __init__(self, observer: Observer, history: Sequence[Trial]) -> None:
        self.trials = list(history)
        self.process_is_lost = False
        self._observer = observer
        self._has_started = False
        self._deaths = 0
        self._size: int | None = None  # The size that is being tried.
        self._since = 0.0

    @property
    def trying_seconds(self) -> float:
        """The time that the present trial has taken; 0 between trials."""
        return 0.0 if self._size is None else time.monotonic() - self._since

    def add(self, event: Event) -> None:
        """Record an event, and pass it on; a later process's ``SearchStarted`` is dropped."""
        match event:
            case SearchStarted() if self._has_started:
                return
            case SearchStarted():
                self._has_started = True
            case TrialStarted():
                self._size, self._since = event.size, time.monotonic()
            case TrialEnded():
                self._size = None
                self.trials.append(event.trial)
                self._deaths *= not event.trial.fits  # A size that ran ends the row of deaths.
                self.process_is_lost = event.trial.failure is Verdict.FATAL
        self._observer(event)

    def add_death(self, ended: ProcessEnded) -> None:
        """Record that a process ended, as the failure of the size that it was trying.

        Raises:
            ProcessDiedError: If the process was trying no size, or too many processes in a row
                have ended.
        """
        if self._size is not None:
            trial = Trial(
                size=self._size,
                fits=False,
                failure=ended.verdict,
                seconds=self.trying_seconds,
                message=ended.message,
                explained=False,
                repeated=any(self._size == before.size for before in self.trials),
            )
            self.add(TrialEnded(trial=trial))
            self.process_is_lost = True
        self._deaths += 1
        if not self.process_is_lost or self._deaths >= _MOST_DEATHS:
            ran = max((trial.size for trial in self.trials if trial.fits), default=None)
            raise ProcessDiedError(ended.message, ran)
        self.process_is_lost = False


def _listen(
    worker: WorkerProcess, record: _TrialRecord, timeout_seconds: float
) -> Returned | Raised | ProcessEnded:
    """Record the worker's events until the task is done, or the process has to be given up."""
    while record.trying_seconds < timeout_seconds:
        try:
            message = worker.receive()
        except EOFError:
            return ProcessEnded(message=_cause_of_death(worker.wait()))
        match message:
            case Reported():
                record.add(message.event)
                if record.process_is_lost:
                    return ProcessEnded(message="the device's context is lost")
            case Raised(context_lost=True):
                return ProcessEnded(message=message.text)
            case Raised() | Returned():
                worker.wait()
                return message
    return ProcessEnded(
        verdict=Verdict.TOO_SLOW,
        message=f"did not end within {timeout_seconds:g} s, so its process was ended",
    )


def _cause_of_death(status: int | None) -> str:
    """Describe an exit status; None means that the process lives, and has closed its channel."""
    if status is None:
        return "the isolated process has closed all its files"
    if status >= 0:
        return f"the isolated process ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # A real-time signal has no name.
        name = "unnamed"
    hint = ", perhaps because the host ran out of memory" if name == "SIGKILL" else ""
    return f"the isolated process died with signal {-status} ({name}){hint}"
