"""Files that are there whole or not at all, and whether they can be: asked before the work."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def check_file(path: Path, name: str) -> None:
    """Refuse a path that no file can be written to.

    Args:
        path: Of a file that need not be there.
        name: The argument to name in an error.

    Raises:
        ValueError: If it is a folder, its folder is not there, or either cannot be written to.
    """
    folder = path.absolute().parent
    closed = [place for place in (folder, path) if place.exists() and not os.access(place, os.W_OK)]
    if path.is_dir() or not folder.is_dir() or closed:
        raise ValueError(
            f"{name} must name a file in a folder that exists and can be written to, got {path}"
        )


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside it to write to, which takes its place at the end; nothing on an error."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


def check_folder(path: Path, what: str) -> None:
    """Refuse a folder that can neither be written to nor be made.

    Args:
        path: Of a folder that need not be there.
        what: Goes there, for people.

    Raises:
        ValueError: If it, or the nearest one above it that is there, is a file or takes none.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{what} need a directory, and {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{what} cannot be written to {path}: {there} takes none")
