"""What a part is told and what it hands back: cases in time, text for people, fields for JSON."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

import torch

from benchmarks.samples import Samples

Case = TypeVar("Case")
Fields = Mapping[str, object]

SEED: Final = 0


@dataclass(slots=True, kw_only=True)
class Findings:
    """A part's work in progress.

    Attributes:
        device: Where models run.
        deadline: By ``time.monotonic``: no case begins after it.
        quick: Only to see that it works; the figures mean nothing.
        tables: Rows by title, each as the columns' names and values.
        cases: The same and more.
        left_out: Cases that were not measured, and why.
    """

    device: torch.device
    deadline: float = float("inf")
    quick: bool = False
    tables: dict[str, list[Fields]] = field(default_factory=dict)
    cases: list[Fields] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def in_time(self, cases: Mapping[str, Case]) -> Iterator[tuple[str, Case]]:
        """Yield the cases with their names until the deadline; the others are left out."""
        for name, case in cases.items():
            if time.monotonic() < self.deadline:
                yield name, case
            else:
                self.left_out.append(f"{name}: no time")

    def add(self, table: str, row: Fields, **more: object) -> None:
        """Note one case: a row that is shown, and what is only written."""
        self.tables.setdefault(table, []).append(row)
        self.cases.append({name: as_json(value) for name, value in ({**row, **more}).items()})

    def __str__(self) -> str:
        tables = [f"{title}\n\n{table_text(rows)}\n" for title, rows in self.tables.items()]
        return "\n".join([*tables, *(f"LEFT OUT: {name}" for name in self.left_out)])


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
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2g}" if isinstance(value, float) else str(value)
