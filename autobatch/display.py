"""Progress lines, a progress bar and tables on the terminal."""

import functools
import math
import random
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from autobatch.events import (
    EpochEnded,
    ErrorForgotten,
    Evaluated,
    Event,
    Observer,
    Replayed,
    Resumed,
    SearchEnded,
    SearchStarted,
    SizesTimed,
    StepEnded,
    TrainingStarted,
    TrialEnded,
    TrialStarted,
)
from autobatch.results.search import (
    TRIAL_HEADER,
    LimitedBy,
    SearchResult,
    Trial,
    memory_unused,
    trial_row,
)
from autobatch.units import count, format_bytes

with ExitStack() as _stack:
    # The import of rich draws a number from Python's generator: draw it and put the state back.
    _stack.callback(random.setstate, random.getstate())
    from rich.console import Console
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column, Table
    from rich.text import Text

_REASONS: Final[dict[LimitedBy, str]] = {
    "memory": "limited by memory",
    "ceiling": "limited by the ceiling",
    "data": "limited by the data",
    "kernel": "limited by a kernel",
    "time": "limited by the timeout of a trial",
    "crash": "limited by a crash: larger sizes ended the process or lost the device",
}
_VERDICT: Final = slice(10, 24)  # The columns of the verdict in a trial's row.
_NARROWEST_BAR: Final = 8
_WIDEST_BAR: Final = 40
_ANY_WIDTH: Final = 10_000
_NO_LOSS: Final = "loss -     "  # As wide as a loss.
_NO_SPEED: Final = "     - examples/s"
_BESIDE_THE_BAR: Final = 65  # Characters that the rest of the line takes.


def observer_of(progress: bool | Observer, stack: ExitStack) -> Observer:
    """Return the observer that the argument ``progress`` of a public function stands for.

    Args:
        progress: True for a display, False for no output, or an observer.
        stack: Closes the display.
    """
    if callable(progress):
        return progress
    return stack.enter_context(Display()) if progress else lambda _: None


class Display:
    """An observer that writes a line to the standard error for each trial and each epoch.

    Inside ``with`` and on a terminal, the running trial and a progress bar are shown as well. In
    any other case only whole lines are written, without control characters.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._entered = False
        self._live: Live | Progress | None = None
        self._limit_bytes = 0
        self._epochs = 1
        self._first = 1  # The first epoch of this training.
        self._epoch = _Epoch(began=self._console.get_time())

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        self._entered = False
        epoch = self._epoch
        if epoch.steps:  # The epoch ended early: max_steps, an error or Ctrl-C.
            note = f"  (stopped after {count(epoch.steps, 'step')})"
            self.log(self._line(epoch.number, epoch.mean_loss, self._speed) + note)
        self._epoch = _Epoch(began=self._console.get_time())

    def __call__(self, event: Event) -> None:
        """Write the lines of an event."""
        self._show(event)

    def log(self, text: str, *, style: str = "") -> None:
        """Write a line; if there is a bar, above the bar."""
        self._write(Text(text, style=style))

    @functools.singledispatchmethod
    def _show(self, event: Event) -> None:
        """Write nothing for a class of events that this version does not know."""

    @_show.register
    def _(self, event: ErrorForgotten) -> None:  # noqa: ARG002  # The class of the event is enough.
        self.log("deleted the last error and the tensors that its traceback held")

    @_show.register
    def _(self, event: Resumed) -> None:
        self._first = event.epoch
        done = count(event.steps, "step")
        self.log(f"continuing from {event.checkpoint}: {done} done, epoch {event.epoch}")
        for difference in event.differences:
            self.log(difference, style="yellow")

    @_show.register
    def _(self, event: SearchStarted) -> None:
        self._limit_bytes = event.limit_bytes
        limit = format_bytes(event.limit_bytes)
        self.log(f"{event.device}, limit {limit}, sizes up to {event.ceiling}")
        for other in event.others:
            self.log(f"on the same device {other}")
        self.log(TRIAL_HEADER, style="dim")

    @_show.register
    def _(self, event: TrialStarted) -> None:
        row = Text(f"{event.size:>7}   running", style="dim")
        # Drawn once, because a refreshing thread would slow down the trial that is measured.
        self._open(
            Live(
                row,
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
        )

    @_show.register
    def _(self, event: TrialEnded) -> None:
        self._close()
        self._write(_row(event.trial, self._limit_bytes))

    @_show.register
    def _(self, event: SearchEnded) -> None:
        self.log(_tolerable(event.search))
        for note in event.search.notes:
            self.log(f"note: {note}")

    @_show.register
    def _(self, event: SizesTimed) -> None:
        if not event.search.speeds:
            self.log(f"note: {event.search.notes[-1]}")
            return
        timed = ", ".join(f"{s.size}: {s.examples_per_second:,.4g}" for s in event.search.speeds)
        self.log(f"examples a second at {timed}; training uses {event.search.fastest}")

    @_show.register
    def _(self, event: TrainingStarted) -> None:
        self.log(str(event.plan), style="bold")
        self._epochs = event.epochs
        self._epoch = _Epoch(began=self._console.get_time())
        progress = Progress(
            *_columns(event.steps, self._console.width),
            console=self._console,
            get_time=self._console.get_time,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        progress.add_task(
            self._name(self._first), total=event.steps, loss=_NO_LOSS, speed=_NO_SPEED
        )
        self._open(progress)

    @_show.register
    def _(self, event: StepEnded) -> None:
        self._epoch.add(event)
        self._advance(event.epoch, _loss(self._epoch.last_loss), _speed(self._speed), steps=1)

    @_show.register
    def _(self, event: EpochEnded) -> None:
        self.log(self._line(event.epoch, event.loss, event.examples_per_second))
        self._epoch = _Epoch(began=self._console.get_time(), number=event.epoch + 1)
        if event.epoch < self._epochs:
            self._advance(event.epoch + 1, _NO_LOSS, _NO_SPEED, steps=0)

    @_show.register
    def _(self, event: Evaluated) -> None:
        self.log(str(event.evaluation))

    @_show.register
    def _(self, event: Replayed) -> None:
        self.log(
            f"memory ran out with micro-batches of {event.failed}: "
            f"the logical batch runs again with {event.micro_batch}",
            style="yellow",
        )

    @property
    def _speed(self) -> float:
        seconds = self._console.get_time() - self._epoch.began
        return self._epoch.examples / seconds if seconds > 0 else 0.0

    def _name(self, epoch: int) -> str:
        return f"epoch {epoch:>{len(str(self._epochs))}}/{self._epochs}"

    def _line(self, epoch: int, loss: float, speed: float) -> str:
        return f"{self._name(epoch)}  {_loss(loss)}  {_speed(speed)}"

    def _open(self, live: Live | Progress) -> None:
        """Show ``live`` until it is closed, on a terminal and inside ``with``."""
        self._close()
        if self._entered and self._can_draw:
            live.start()
            live.refresh()  # Starting draws a bar, but no row.
            self._live = live

    def _advance(self, epoch: int, loss: str, speed: str, *, steps: int) -> None:
        """Update the bar, if there is one."""
        if isinstance(self._live, Progress):
            bar = self._live.task_ids[0]
            name = self._name(epoch)
            self._live.update(bar, advance=steps, description=name, loss=loss, speed=speed)

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def _can_draw(self) -> bool:
        """True if lines can be redrawn; with FORCE_COLOR rich treats a file as a terminal."""
        return self._console.is_terminal and self._console.file.isatty()

    def _write(self, text: Text) -> None:
        # Long lines stay whole in a file; on a terminal they break between words.
        self._console.print(text, soft_wrap=not self._can_draw)


@dataclass
class _Epoch:
    """The steps of an epoch so far."""

    began: float
    number: int = 1
    steps: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    counted: int = 0
    last_loss: float = math.nan

    def add(self, event: StepEnded) -> None:
        self.number = event.epoch
        self.steps += 1
        self.examples += event.step.examples
        if not event.step.skipped:
            self.last_loss = event.step.loss
            self.loss_sum += event.step.loss * event.step.examples
            self.counted += event.step.examples

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / self.counted if self.counted else math.nan


class _Remaining(TimeRemainingColumn):
    """The time that is left."""

    def render(self, task: Task) -> Text:
        return super().render(task).append(" left")


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table to the standard output; only a terminal limits its width."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _ANY_WIDTH
    table = Table(*headers, box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _columns(steps: int | None, width: int) -> tuple[ProgressColumn, ...]:
    """Return the columns of an epoch's line and its bar; without ``steps`` there is no bar.

    rich puts one space between columns, and each text ends with a second one.
    """
    line = [
        _text("{task.description} "),
        _text("{task.fields[loss]} "),
        _text("{task.fields[speed]} "),
    ]
    if steps is None:
        return (*line, _text("step {task.completed:.0f} "), TimeElapsedColumn())
    rest = (_text("{task.completed:.0f}/{task.total:.0f} "), _Remaining(compact=True))
    room = width - _BESIDE_THE_BAR
    if room < _NARROWEST_BAR:
        return (*line, *rest)
    bar = BarColumn(
        min(_WIDEST_BAR, room),
        style="dim",
        complete_style="cyan",
        finished_style="cyan",
    )
    return (*line, bar, _text(""), *rest)


def _text(pattern: str) -> ProgressColumn:
    return TextColumn(pattern, markup=False, table_column=Column(no_wrap=True))


def _row(trial: Trial, limit_bytes: int) -> Text:
    row = Text(trial_row(trial, limit_bytes))
    row.stylize("green" if trial.fits else "yellow", _VERDICT.start, _VERDICT.stop)
    return row


def _tolerable(search: SearchResult) -> str:
    upper = "" if search.upper.size is None else f" ({search.upper.under(search.limit_bytes)})"
    reason = f"{_REASONS[search.limited_by]}{memory_unused(search)}"
    return f"tolerable batch {search.size}, {reason}{upper}"


def _loss(loss: float) -> str:
    plain = loss == 0 or 1e-3 <= abs(loss) < 1e4 or not math.isfinite(loss)
    return f"loss {loss:.4f}" if plain else f"loss {loss:.2e}"


def _speed(examples_per_second: float) -> str:
    digits = 0 if examples_per_second >= 10 else 1
    return f"{examples_per_second:>6,.{digits}f} examples/s"
