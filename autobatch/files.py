"""Files that are written whole or not at all, and paths that are checked before the work begins."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: Path, *, temporary: Path | None = None) -> Iterator[Path]:
    """Give a path to write to; what was written there replaces ``path`` at the end of the block.

    After an error ``path`` is as it was, and the temporary file is deleted.

    Args:
        path: The file to write or to replace.
        temporary: Where to write meanwhile, in the same folder; None chooses a hidden name.

    Example:
        >>> with atomic_file(Path("losses.txt")) as unfinished:
        ...     unfinished.write_text("0.25")
    """
    if temporary is None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_file(path: Path, name: str) -> None:
    """Refuse a path that no file can be written to.

    Args:
        path: A file, which need not exist.
        name: The name of the argument, for the error.

    Raises:
        ValueError: If the path is a folder, if its folder does not exist, or if either cannot be
            written to.
    """
    folder = path.absolute().parent
    closed = [place for place in (folder, path) if place.exists() and not os.access(place, os.W_OK)]
    if path.is_dir() or not folder.is_dir() or closed:
        raise ValueError(
            f"{name} must name a file in a folder that exists and can be written to, got {path}"
        )


def check_folder(path: Path, content: str) -> None:
    """Refuse a folder that can neither be written to nor be made.

    Args:
        path: A folder, which need not exist.
        content: What will be written to the folder, for the error.

    Raises:
        ValueError: If the nearest existing parent, or the path itself, is a file or is read-only.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{content} need a directory, and {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{content} cannot be written to {path}: {nearest} is read-only")
