"""A document as one page that needs nothing else: no network, no script."""

import html
import re
from collections.abc import Iterator, Sequence
from typing import Final

from benchmarks.reporting.cells import NOTHING
from benchmarks.reporting.document import (
    HOW_TO_READ,
    Block,
    Document,
    Figure,
    Picture,
    Section,
    Table,
)

_STYLE: Final = """
:root { color-scheme: light dark;
  --back: #ffffff; --ink: #1f2328; --faint: #656d76; --line: #d8dee4; --panel: #f6f8fa;
  --first: #0072b2; --second: #c2410c; --third: #00805e; --fourth: #8250a0;
  --grid: #e6e6e6; --bar: #a9b1ba;
  --good: #00704f; --bad: #b3261e; --stamp: #fff4d6; --stamp-ink: #6b4a00; }
@media (prefers-color-scheme: dark) { :root {
  --back: #0f1419; --ink: #e6e9ed; --faint: #98a2ae; --line: #30363d; --panel: #171d24;
  --first: #5ab4ee; --second: #ff9457; --third: #3ccb9c; --fourth: #d3a4ee;
  --grid: #2a3138; --bar: #59636e;
  --good: #4fd1a1; --bad: #ff8a80; --stamp: #3a2f10; --stamp-ink: #ffd97a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .2rem 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
nav { margin: 1rem 0 0; } nav a { margin-right: 1rem; white-space: nowrap; }
a { color: var(--first); }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: 0; padding: 0;
  color: var(--faint); font-size: .85rem; list-style: none; }
.facts li { overflow-wrap: anywhere; }
.facts b { font-weight: 600; color: var(--ink); }
.stamp { background: var(--stamp); color: var(--stamp-ink); padding: .1rem .5rem;
  border-radius: .3rem; font-size: .8rem; font-weight: 600; }
p.stamp { padding: .5rem .8rem; font-size: 1rem; max-width: none; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .7rem;
  margin: 1.2rem 0 0; padding: 0; list-style: none; }
.figures li { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem .9rem; font-size: .85rem; color: var(--faint); }
.figures b { display: block; font-size: 1.35rem; line-height: 1.3; color: var(--ink);
  font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  margin: .3rem 0; }
th { text-align: left; font-weight: 600; color: var(--faint); vertical-align: bottom;
  border-bottom: 2px solid var(--line); }
th, td { padding: .3rem .7rem .3rem 0; }
td { border-bottom: 1px solid var(--line); vertical-align: top; }
td { min-width: 3rem; } td:not(.number):not(.faint) { min-width: 8rem; }
td:first-child { min-width: 10rem; }
tr.ours td { font-weight: 600; background: var(--panel); }
.number { text-align: right; } td.number { white-space: nowrap; }
th:first-child, td:first-child { padding-left: .4rem; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; white-space: nowrap; }
.faint { color: var(--faint); }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
figure { margin: 1rem 0; } figcaption { color: var(--faint); font-size: .85rem; max-width: 46rem; }
figure svg { max-width: 100%; min-width: 34rem; height: auto; display: block; }
footer { margin-top: 3rem; color: var(--faint); font-size: .85rem; }
"""
_GOOD: Final = ("held",)
_BAD: Final = ("NOT held", "an error", "failed")
_OF_NUMBERS: Final = {"to", "of", "e", "x", "M", "B", "KiB", "MiB", "GiB", "inf"}
_FAINT: Final = ("not installed", NOTHING)


def page(document: Document) -> str:
    """Return the whole document."""
    title = " · ".join(part for part in (document.title, document.stamp) if part)
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        *_head(document),
    ]
    for place, section in enumerate(document.sections):
        lines += _section(section, place, document.stamp)
    lines.append(f"<footer>{_text(HOW_TO_READ)}</footer></body></html>")
    return "\n".join(lines) + "\n"


def _head(document: Document) -> Iterator[str]:
    yield f"<header><h1>{_text(document.title)}</h1>"
    if document.warning:
        yield f'<p class="stamp">{_text(document.warning)}</p>'
    yield '<ul class="facts">'
    yield from (f"<li>{_text(name)} <b>{_text(value)}</b></li>" for name, value in document.facts)
    yield "</ul>"
    if document.figures:
        yield '<ul class="figures">'
        yield from (_figure(figure, document.stamp) for figure in document.figures)
        yield "</ul>"
    links = (f'<a href="#s{n}">{_text(s.title)}</a>' for n, s in enumerate(document.sections))
    yield f"<nav>{' '.join(links)}</nav></header>"


def _figure(figure: Figure, stamp: str) -> str:
    return f"<li><b>{_text(figure.value)}</b>{_text(figure.label)}{_stamp(stamp)}</li>"


def _section(section: Section, place: int, stamp: str) -> Iterator[str]:
    yield f'<section id="s{place}"><h2>{_text(section.title)}</h2>'
    for block in section.blocks:
        yield from _block(block, stamp)
    yield "</section>"


def _block(block: Block, stamp: str) -> Iterator[str]:
    if isinstance(block, str):
        yield f"<p>{_text(block)}</p>"
    elif isinstance(block, Picture):
        yield f'<figure><div class="wide">{block.svg}</div>'
        yield f"<figcaption>{_text(block.caption)}{_stamp(stamp)}</figcaption></figure>"
    elif block.folded:
        yield f"<details><summary>{_text(block.title)}{_stamp(stamp)}</summary>"
        yield from _table(block)
        yield "</details>"
    else:
        if block.title or stamp:
            yield f"<h3>{_text(block.title)}{_stamp(stamp)}</h3>"
        yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    right = [_is_numeric([row[at] for row in table.rows]) for at in range(len(table.header))]
    yield '<div class="wide"><table><thead><tr>'
    yield from (
        f"<th{_class('number' if is_right else '')}>{_text(name)}</th>"
        for name, is_right in zip(table.header, right, strict=True)
    )
    yield "</tr></thead><tbody>"
    for row in table.rows:
        yield f"<tr{_class('ours' if 'autobatch' in row else '')}>"
        for cell, is_right in zip(row, right, strict=True):
            classes = [_meaning(cell), "number" if is_right else ""]
            yield f"<td{_class(' '.join(filter(None, classes)))}>{_text(cell)}</td>"
        yield "</tr>"
    yield "</tbody></table></div>"


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether a column reads best with its ends below each other: no words but those of numbers."""
    told = [cell for cell in cells if cell not in (*_FAINT, *_BAD)]
    words = {word for cell in told for word in re.findall(r"[A-Za-z;]+", cell)}
    return bool(told) and words <= _OF_NUMBERS and all(re.search(r"\d", cell) for cell in told)


def _meaning(cell: str) -> str:
    kinds = (("good", _GOOD), ("bad", _BAD), ("faint", _FAINT))
    return next((name for name, words in kinds if cell in words), "")


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _stamp(stamp: str) -> str:
    return f' <span class="stamp">{_text(stamp)}</span>' if stamp else ""


def _text(text: str) -> str:
    return html.escape(text)
