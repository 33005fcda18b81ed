"""The commands that read results: report, compare, readme."""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks import ROOT
from benchmarks.reporting import comparison, readme, report
from benchmarks.reporting.render import markdown, page
from benchmarks.reporting.results import read

Command = Callable[[Sequence[str]], int]


_FOLDERS: Final = "a folder, or the name of one under benchmarks/results"


def write_reports(words: Sequence[str]) -> int:
    """Write report.md, report.html and overview.png beside a device's results."""
    reader = _reader("report", write_reports)
    reader.add_argument("folder", nargs="+", help=_FOLDERS)
    options = reader.parse_args(words)
    for name in options.folder:
        print(*report.write(_folder(name)), sep="\n")
    return 0


def compare(words: Sequence[str]) -> int:
    """Print several devices side by side, as Markdown."""
    reader = _reader("compare", compare)
    reader.add_argument("folder", nargs="+", help=_FOLDERS)
    reader.add_argument("--html", type=Path, metavar="FILE", help="write a page, too")
    options = reader.parse_args(words)
    document = comparison.compare([read(_folder(name)) for name in options.folder])
    print(markdown(document), end="")
    if options.html is not None:
        options.html.write_text(page(document), encoding="utf-8")
    return 0


def write_readme(words: Sequence[str]) -> int:
    """Write the committed results' figures into README.md and docs/benchmarks.md."""
    _reader("readme", write_readme).parse_args(words)
    path = ROOT / "README.md"
    path.write_text(readme.updated(path.read_text(encoding="utf-8"), ROOT), encoding="utf-8")
    tables = ROOT / "docs" / "benchmarks.md"
    tables.write_text(readme.tables_page(ROOT), encoding="utf-8")
    return 0


def _reader(name: str, command: Command) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=command.__doc__)


def _run(command: Command, words: Sequence[str]) -> int:
    """Run a command; print why results cannot be read, and return 2."""
    try:
        return command(words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _folder(name: str) -> Path:
    path = Path(name)
    return path if path.is_dir() else ROOT / "benchmarks" / "results" / name


COMMANDS: Final[dict[str, Command]] = {
    name: functools.partial(_run, command)
    for name, command in (
        ("report", write_reports),
        ("compare", compare),
        ("readme", write_readme),
    )
}
"""The commands by name; each takes the words behind its name and returns an exit code."""
