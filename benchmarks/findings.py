"""What a part is told and what it hands back: cases in time, text for people, fields for JSON."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

import torch

from autobatch.prediction.gpu_catalogue import Gpu
from benchmarks.samples import Samples

Case = TypeVar("Case")
Fields = Mapping[str, object]

SEED: Final = 0


class Notice(NamedTuple):
    """A case that begins: its name, its place among those of its kind, and how many they are."""

    case: str
    place: int
    cases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Cases that were measured before.

    Attributes:
        cases: Rows, as they are written.
        done: By name, the places of a finished case's rows among them.
        seconds: How long they took.
        last_seconds: How long the last of them took.
    """

    cases: Sequence[Fields] = ()
    done: Mapping[str, Sequence[int]] = field(default_factory=dict)
    seconds: float = 0.0
    last_seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Findings:
    """A part's work in progress.

    Attributes:
        device: Where models run.
        deadline: By ``time.monotonic``: no case begins after it.
        quick: Only to see that it works; the figures mean nothing.
        models: The names of those that are wanted; none are all.
        imitated: The card that the CPU's meter stands for.
        tables: Rows by title, each as the columns' names and values; only of this run.
        cases: The same and more, and those that were measured before.
        done: By name, the places of a finished case's rows in ``cases``.
        left_out: Cases that were not measured, and why.
        last_seconds: How long the last case took.
        short: Whether one of them was for want of time.
        notice: Told of every case that begins.
        save: Called after every case.
    """

    device: torch.device
    deadline: float = float("inf")
    quick: bool = False
    models: Sequence[str] = ()
    imitated: Gpu | None = None
    tables: dict[str, list[Fields]] = field(default_factory=dict)
    cases: list[Fields] = field(default_factory=list)
    done: dict[str, list[int]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    last_seconds: float = 0.0
    short: bool = False
    notice: Callable[[Notice], object] = field(default=lambda _: None)
    save: Callable[[], object] = field(default=lambda: None)

    @property
    def left_seconds(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def in_time(
        self, cases: Mapping[str, Case], seconds: Callable[[str, Case], float] | None = None
    ) -> Iterator[tuple[str, Case]]:
        """Yield the cases with their names until the deadline; the others are left out.

        One that was measured before is not yielded again. A case counts as measured when the next
        is asked for.

        Args:
            cases: By name, which must be the part's only one.
            seconds: What a case is expected to take, which is asked for just before it would begin;
                None takes the one before it as an example.
        """
        for place, (name, case) in enumerate(cases.items()):
            if name in self.done:
                continue
            expected = 0.0
            if self.left_seconds > 0:  # Else nobody need think about it.
                expected = self.last_seconds if seconds is None else seconds(name, case)
            if not self._has_time(name, expected):
                continue
            self.notice(Notice(name, place, len(cases)))
            first, began = len(self.cases), time.monotonic()
            yield name, case
            self.last_seconds = time.monotonic() - began
            if len(self.cases) > first:  # Else it was left out after all.
                self.done[name] = list(range(first, len(self.cases)))
                self.save()

    def _has_time(self, name: str, seconds: float) -> bool:
        left = self.left_seconds
        if left > max(seconds, 0.0):
            return True
        self.give_up(f"{name}: no time" + f", it takes about {seconds:.0f} s" * (left > 0))
        return False

    def give_up(self, what: str) -> None:
        """Note what time does not allow."""
        self.left_out.append(what)
        self.short = True

    def add(self, table: str, row: Fields, **more: object) -> None:
        """Note one case: a row that is shown, and what is only written."""
        self.tables.setdefault(table, []).append(row)
        written = {name: as_json(value) for name, value in ({**row, **more}).items()}
        self.cases.append({"table": table, **written})

    def rows(self, table: str) -> list[Fields]:
        """Return the table's cases as they are written, those that were measured before too."""
        return [case for case in self.cases if case["table"] == table]

    def take_up(self, kept: Kept) -> None:
        """Begin with finished cases; what was summed up over them is left to the part."""
        self.last_seconds = kept.last_seconds
        for name, places in kept.done.items():
            first = len(self.cases)
            self.cases += [kept.cases[place] for place in places]
            self.done[name] = list(range(first, len(self.cases)))

    def __str__(self) -> str:
        tables = [
            f"{self._mark}{title}\n\n{table_text(rows)}\n" for title, rows in self.tables.items()
        ]
        return "\n".join([*tables, *(f"LEFT OUT: {name}" for name in self.left_out)])

    @property
    def _mark(self) -> str:
        return "" if self.imitated is None else f"imitated {self.imitated.name}, no measured card: "


def table_text(rows: list[Fields]) -> str:
    """Return rows under the columns of the first, as plain text."""
    header = [name.replace("_", " ") for name in rows[0]]
    cells = [header, *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def as_json(value: object) -> object:
    """Return samples with their spread; nan and the infinities, which JSON lacks, as text."""
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
