"""Show which case is measured and the remaining time: a bar on a terminal, else plain lines.

Nothing is drawn while a case runs, because a drawing thread takes time.
"""

import datetime
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from benchmarks.harness.records import Notice

Notify = Callable[[str, Notice], None]  # Called with the part's name, and the case that begins.


@contextmanager
def shown(parts: Sequence[str], minutes: float, console: Console | None = None) -> Iterator[Notify]:
    """Yield a function to call with every case that begins.

    Args:
        parts: The parts, in the order in which they run.
        minutes: The minutes after which no case begins.
        console: Where to write; None is the standard output.
    """
    console = console or Console(file=sys.stdout)
    end = datetime.datetime.now() + datetime.timedelta(minutes=minutes)
    if console.is_terminal:
        with _bars(parts, end, console) as notify:
            yield notify
    else:
        yield lambda part, notice: print(_line(part, notice, end), flush=True, file=console.file)


@contextmanager
def _bars(parts: Sequence[str], end: datetime.datetime, console: Console) -> Iterator[Notify]:
    name = TextColumn("{task.description}", markup=False)
    ends = TextColumn(f"until {end:%H:%M:%S}")
    case = TextColumn("{task.fields[case]}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), ends, case)
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        tasks: dict[str, TaskID] = {
            part: progress.add_task(part, total=None, case="waits") for part in parts
        }

        def notify(part: str, notice: Notice) -> None:
            task = tasks[part]
            progress.update(task, completed=notice.place, total=notice.cases, case=notice.case)
            progress.refresh()

        yield notify


def _line(part: str, notice: Notice, end: datetime.datetime) -> str:
    left = max((end - datetime.datetime.now()).total_seconds(), 0.0)
    minutes, seconds = divmod(round(left), 60)
    counted = f"{notice.place + 1}/{notice.cases}"
    return f"[{minutes}:{seconds:02} left] {part} {counted}: {notice.case}"
