"""The report of one device: Markdown, one page, and a picture for the README."""

import os
from pathlib import Path

from benchmarks.reporting import chapters, overview, pictures
from benchmarks.reporting.markdown import markdown
from benchmarks.reporting.page import page
from benchmarks.reporting.results import read


def write(folder: Path) -> list[Path]:
    """Write report.md, report.html and, with matplotlib, overview.png; return what was written.

    Raises:
        ValueError: If there is no result in the folder, or several that must not be mixed.
    """
    results = read(folder)
    drawn = pictures.available()
    document = chapters.document(results, drawn=drawn)
    files = {
        folder / "report.md": markdown(document).encode(),
        folder / "report.html": page(document).encode(),
    }
    panels = overview.panels(results) if drawn else {}
    if panels:
        files[folder / "overview.png"] = pictures.png(panels, overview.stamp(results))
    for path, content in files.items():
        _write(path, content)
    return list(files)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
