"""The commands that read results: report, compare, readme."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.reporting import comparison, readme
from benchmarks.reporting.markdown import markdown
from benchmarks.reporting.page import page
from benchmarks.reporting.results import Results, read

COMMANDS: Final = ("report", "compare", "readme")
_ROOT: Final = Path(__file__).parent.parent.parent


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    reader = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = reader.add_subparsers(dest="command", required=True)
    told = "write report.md, report.html and overview.png beside a device's results"
    one = commands.add_parser("report", help=told, description=told)
    one.add_argument("folder", nargs="+", help="a folder, or a device under benchmarks/results")
    told = "print several devices side by side, as Markdown"
    several = commands.add_parser("compare", help=told, description=told)
    several.add_argument("folder", nargs="+", help="a folder, or a device under benchmarks/results")
    several.add_argument("--html", type=Path, metavar="FILE", help="write a page, too")
    told = "write the committed results' figures into the README"
    commands.add_parser("readme", help=told, description=told)
    return reader


def main(arguments: Sequence[str]) -> int:
    """Do one command; return 2 if what it was given cannot be read."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "readme":
            path = _ROOT / "README.md"
            path.write_text(readme.updated(path.read_text(encoding="utf-8"), _ROOT), "utf-8")
        elif options.command == "report":
            for name in options.folder:
                print(*report.write(_folder(name)), sep="\n")
        else:
            _compare([read(_folder(name)) for name in options.folder], options.html)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _compare(cards: Sequence[Results], html: Path | None) -> None:
    document = comparison.compare(cards)
    print(markdown(document), end="")
    if html is not None:
        html.write_text(page(document), encoding="utf-8")


def _folder(name: str) -> Path:
    path = Path(name)
    return path if path.is_dir() else _ROOT / "benchmarks" / "results" / name
