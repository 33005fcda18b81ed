"""The records of a benchmark: cases within a deadline, tables for people, rows for JSON."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

import torch

from autobatch.prediction.gpu_catalogue import Gpu
from benchmarks.harness.timing import Samples

Case = TypeVar("Case")
Fields = Mapping[str, object]

SEED: Final = 0


class Notice(NamedTuple):
    """A case that begins: its name, its index among its kind, and how many cases there are."""

    case: str
    place: int
    cases: int


@dataclass(slots=True, kw_only=True)
class Records:
    """A part's work in progress.

    Attributes:
        device: Where models run.
        deadline: No case begins later, by ``time.monotonic``.
        quick: Whether the run only shows that everything works; its figures mean nothing.
        models: The names of the requested models; empty for all.
        imitated: The card whose memory the CPU's meter imitates.
        tables: The rows of each table, as people see them.
        cases: The same rows as the file holds them, with fields that no table shows.
        done: The rows of each finished case.
        left_out: The cases that were not measured, and why.
        last_seconds: How long the last case took.
        short: Whether time was short for a case.
        notice: Called with every case that begins.
        save: Called after every case.
    """

    device: torch.device
    deadline: float = float("inf")
    quick: bool = False
    models: Sequence[str] = ()
    imitated: Gpu | None = None
    tables: dict[str, list[Fields]] = field(default_factory=dict)
    cases: list[Fields] = field(default_factory=list)
    done: dict[str, list[Fields]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    last_seconds: float = 0.0
    short: bool = False
    notice: Callable[[Notice], object] = field(default=lambda _: None)
    save: Callable[[], object] = field(default=lambda: None)

    @property
    def left_seconds(self) -> float:
        """The seconds until the deadline."""
        return self.deadline - time.monotonic()

    def in_time(
        self, cases: Mapping[str, Case], seconds: Callable[[str, Case], float] | None = None
    ) -> Iterator[tuple[str, Case]]:
        """Yield the cases with their names until the deadline; the other cases are left out.

        A finished case is not yielded again. A case is finished when the next one is requested.

        Args:
            cases: The cases by name; a name must be unique in its part.
            seconds: Estimates how long a case takes, just before it would begin; None takes the
                seconds of the case before.
        """
        for place, (name, case) in enumerate(cases.items()):
            if name in self.done:
                continue
            expected = 0.0
            if self.left_seconds > 0:  # Estimates cost time themselves.
                expected = self.last_seconds if seconds is None else seconds(name, case)
            if not self._has_time(name, expected):
                continue
            self.notice(Notice(name, place, len(cases)))
            first, began = len(self.cases), time.monotonic()
            yield name, case
            self.last_seconds = time.monotonic() - began
            if len(self.cases) > first:  # A case without rows was left out after all.
                self.done[name] = self.cases[first:]
                self.save()

    def _has_time(self, name: str, seconds: float) -> bool:
        left = self.left_seconds
        if left > max(seconds, 0.0):
            return True
        self.give_up(f"{name}: no time" + f", it takes about {seconds:.0f} s" * (left > 0))
        return False

    def give_up(self, what: str) -> None:
        """Record a case for which there is no time."""
        self.left_out.append(what)
        self.short = True

    def add(self, table: str, row: Fields, **more: object) -> None:
        """Add a row: columns that the table shows, and ``more`` that only the file holds."""
        self.tables.setdefault(table, []).append(row)
        written = {name: as_json(value) for name, value in ({**row, **more}).items()}
        self.cases.append({"table": table, **written})

    def rows(self, table: str) -> list[Fields]:
        """Return the rows of a table as the file holds them."""
        return [case for case in self.cases if case["table"] == table]

    def begin_again(self) -> None:
        """Keep the finished cases for another round; drop sums over cases and skipped cases."""
        self.cases = [row for rows in self.done.values() for row in rows]
        self.tables, self.left_out, self.short = {}, [], False

    def __str__(self) -> str:
        tables = [
            f"{self._mark}{title}\n\n{table_text(rows)}\n" for title, rows in self.tables.items()
        ]
        return "\n".join([*tables, *(f"LEFT OUT: {name}" for name in self.left_out)])

    @property
    def _mark(self) -> str:
        return "" if self.imitated is None else f"imitated {self.imitated.name}, no measured card: "


def table_text(rows: list[Fields]) -> str:
    """Return rows as plain text, under the columns of the first row."""
    header = [name.replace("_", " ") for name in rows[0]]
    cells = [header, *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def as_json(value: object) -> object:
    """Return a value for JSON: samples with their spread, nan and infinities as text."""
    if isinstance(value, Samples):
        spread = {"median": value.median, "minimum": min(value), "maximum": max(value)}
        return {**spread, "samples": list(value)}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2g}" if isinstance(value, float) else str(value)
