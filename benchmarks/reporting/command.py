"""The commands that read results: report, compare, readme."""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks import ROOT
from benchmarks.reporting import comparison, readme, report
from benchmarks.reporting.markdown import markdown
from benchmarks.reporting.page import page
from benchmarks.reporting.results import read

Command = Callable[[Sequence[str]], int]


_FOLDERS: Final = "a folder, or the name of one under benchmarks/results"


def write_reports(words: Sequence[str]) -> int:
    """Write report.md, report.html and overview.png beside a device's results."""
    reader = _reader("report", write_reports)
    reader.add_argument("folder", nargs="+", help=_FOLDERS)
    asked = reader.parse_args(words)
    for name in asked.folder:
        print(*report.write(_folder(name)), sep="\n")
    return 0


def compare(words: Sequence[str]) -> int:
    """Print several devices side by side, as Markdown."""
    reader = _reader("compare", compare)
    reader.add_argument("folder", nargs="+", help=_FOLDERS)
    reader.add_argument("--html", type=Path, metavar="FILE", help="write a page, too")
    asked = reader.parse_args(words)
    document = comparison.compare([read(_folder(name)) for name in asked.folder])
    print(markdown(document), end="")
    if asked.html is not None:
        asked.html.write_text(page(document), encoding="utf-8")
    return 0


def write_readme(words: Sequence[str]) -> int:
    """Write the committed results' figures into the README."""
    _reader("readme", write_readme).parse_args(words)
    path = ROOT / "README.md"
    path.write_text(readme.updated(path.read_text(encoding="utf-8"), ROOT), encoding="utf-8")
    return 0


def _reader(name: str, command: Command) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=command.__doc__)


def _told(command: Command, words: Sequence[str]) -> int:
    """Run a command; of results that cannot be read, say why and return 2."""
    try:
        return command(words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _folder(name: str) -> Path:
    path = Path(name)
    return path if path.is_dir() else ROOT / "benchmarks" / "results" / name


COMMANDS: Final[dict[str, Command]] = {
    name: functools.partial(_told, command)
    for name, command in (
        ("report", write_reports),
        ("compare", compare),
        ("readme", write_readme),
    )
}
"""By its name: what is handed the words behind it and returns an exit code."""
