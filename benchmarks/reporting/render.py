"""Documents as plain data, and the templates that print them as Markdown or as a page."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.harness.records import Fields
from benchmarks.reporting import cells

HOW_TO_READ: Final = (
    "A cell such as 1.3 [1.1, 1.6] is the median with minimum and maximum; "
    "1.3 (1.2 to 1.4) [1.1, 1.6] has the quartiles, too. "
    "Every sample is in the JSON files of the parts."
)


class Table(NamedTuple):
    """Rows of text under a header; a folded table opens with a click."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False


class Picture(NamedTuple):
    """An inline SVG element, whose colours are the page's CSS variables, and its caption."""

    svg: str
    caption: str


Block = str | Table | Picture
"""A paragraph, a table or a drawing."""


class Section(NamedTuple):
    """A chapter of a document."""

    title: str
    blocks: Sequence[Block]


class Figure(NamedTuple):
    """A number that is read first, with its unit, and what the number measures."""

    value: str
    label: str


class Document(NamedTuple):
    """A report. ``stamp`` stands at every figure: "imitated RTX 3060", "quick run" or nothing."""

    title: str
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    stamp: str = ""
    warning: str = ""


def markdown(document: Document) -> str:
    """Return the document as Markdown, without its drawings."""
    return render("report.md.j2", document._asdict())


def page(document: Document) -> str:
    """Return the document as one HTML page that loads nothing and runs no script."""
    return render("page.html.j2", document._asdict())


def render(template: str, data: Mapping[str, object]) -> str:
    """Fill a template; whatever it prints is escaped for Markdown or HTML, by its name."""
    environment = _HTML if template.endswith(".html.j2") else _MARKDOWN
    return environment.get_template(template).render(data, how_to_read=HOW_TO_READ)


def table(rows: Sequence[Fields], title: str = "", *, folded: bool = False) -> Table:
    """Return rows of a result file with every column that can be shown."""
    names = cells.columns(rows)
    header = [name.replace("_", " ") for name in names]
    return Table(header, [[cells.cell(row, name) for name in names] for row in rows], title, folded)


def escaped(text: object) -> Markup:
    """Return text without meaning in Markdown, HTML or a table's row."""
    if isinstance(text, Markup):
        return text
    plain = re.sub(r"\s+", " ", str(text)).replace("&", "&amp;").replace("<", "&lt;")
    # A link needs "](", which the range "[1, 2]" has not.
    return Markup(re.sub(r"([\\`*_|>#]|\](?=[(\[:]))", r"\\\1", plain))


def is_numeric(column: Sequence[str]) -> bool:
    """Return whether a column holds only numbers and units, so that it reads best aligned right."""
    shown = [cell for cell in column if cell not in (*_FAINT, *_BAD)]
    words = {word for cell in shown for word in re.findall(r"[A-Za-z;]+", cell)}
    return bool(shown) and words <= _UNITS and all(re.search(r"\d", cell) for cell in shown)


def css_class(cell: str) -> str:
    """Return the class of a cell that is a verdict or says that there is no value."""
    kinds = (("good", _GOOD), ("bad", _BAD), ("faint", _FAINT))
    return next((name for name, words in kinds if cell in words), "")


_GOOD: Final = ("held",)
_BAD: Final = ("NOT held", "an error", "failed")
_FAINT: Final = ("not installed", cells.NOTHING)
_UNITS: Final = {"to", "of", "e", "x", "M", "B", "KiB", "MiB", "GiB", "inf"}


def _environment(finalize: Callable[[object], Markup] | None = None) -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )


_HTML: Final = _environment()
_HTML.filters |= {"css_class": css_class}
_HTML.tests |= {"numeric": is_numeric}
_MARKDOWN: Final = _environment(finalize=escaped)
