"""What a report is made of, before it is Markdown or a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.harness.records import Fields
from benchmarks.reporting import cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Text in rows.

    Attributes:
        title: What it shows; may be empty.
        header: The names of the columns.
        rows: As many cells each.
        folded: Whether it is opened by a click.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A drawing, as inline SVG.

    Attributes:
        svg: Its element; colours are the page's variables.
        caption: What it shows, for everyone.
    """

    svg: str
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number worth being read first.

    Attributes:
        value: With its unit.
        label: What it is of.
    """

    value: str
    label: str


HOW_TO_READ: Final = (
    "A cell such as 1.3 [1.1, 1.6] is the median with minimum and maximum; "
    "1.3 (1.2 to 1.4) [1.1, 1.6] has the quartiles, too. "
    "Every sample is in the JSON files of the parts."
)
Block = str | Table | Picture
"""A paragraph, a table, or a drawing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A chapter."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A whole report.

    Attributes:
        title: The device.
        stamp: What stands at every figure, as that it is imitated; may be empty.
        warning: The same in a sentence.
        facts: Name and value of what the figures must not be read without.
        figures: Those to be read first.
        sections: In order.
    """

    title: str
    stamp: str = ""
    warning: str = ""
    facts: Sequence[tuple[str, str]]
    figures: Sequence[Figure] = ()
    sections: Sequence[Section]


def table(rows: Sequence[Fields], title: str = "", *, folded: bool = False) -> Table:
    """Return rows of a result file with all the columns that can be shown."""
    names = cells.columns(rows)
    return Table(
        title=title,
        header=[name.replace("_", " ") for name in names],
        rows=[[cells.cell(row, name) for name in names] for row in rows],
        folded=folded,
    )
