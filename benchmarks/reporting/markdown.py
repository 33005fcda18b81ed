"""A document as Markdown."""

import html
import re
from collections.abc import Iterator, Sequence

from benchmarks.reporting.document import HOW_TO_READ, Block, Document, Picture, Section, Table


def markdown(document: Document) -> str:
    """Return the whole document; drawings are only in the page."""
    lines = [f"# {escaped(document.title)}", ""]
    if document.warning:
        lines += [f"**{escaped(document.warning)}**", ""]
    lines += [f"* {escaped(name)}: {escaped(value)}" for name, value in document.facts]
    lines += [""]
    lines += [f"* **{escaped(f.value)}** {escaped(f.label)}" for f in document.figures]
    for section in document.sections:
        lines += ["", *_section(section, document.stamp)]
    return "\n".join([*lines, escaped(HOW_TO_READ)]) + "\n"


def table_lines(table: Table) -> list[str]:
    """Return a table as Markdown's lines."""
    return [
        _line(table.header),
        _line(["---"] * len(table.header)),
        *(_line(row) for row in table.rows),
    ]


def escaped(text: str) -> str:
    """Return text that means nothing to Markdown, HTML or a table."""
    plain = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_|>#]|\](?=[(\[:]))", r"\\\1", plain)  # A link needs "](", a range not.


def _section(section: Section, stamp: str) -> Iterator[str]:
    yield f"## {escaped(section.title)}"
    yield ""
    for block in section.blocks:
        yield from _block(block, stamp)


def _block(block: Block, stamp: str) -> Iterator[str]:
    if isinstance(block, str):
        yield from (escaped(block), "")
        return
    if isinstance(block, Picture):
        yield from (f"*{escaped(block.caption)} (drawn in report.html)*", "")
        return
    title = " · ".join(part for part in (block.title, stamp) if part)
    if block.folded:
        yield from ("<details>", f"<summary>{html.escape(title)}</summary>", "")
    elif title:
        yield from (f"**{escaped(title)}**", "")
    yield from (*table_lines(block), "")
    if block.folded:
        yield from ("</details>", "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell if cell == '---' else escaped(cell) for cell in cells)} |"
