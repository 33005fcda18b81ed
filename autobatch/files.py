"""Write files atomically, and check output paths before the work starts."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: Path, *, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; at the end of the block its file replaces ``path`` atomically.

    After an error, ``path`` is unchanged and the temporary file is deleted.

    Args:
        path: The file to write or to replace.
        temporary: The temporary path, in the same folder; None chooses a hidden name.

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
    """Raise unless a file can be written to ``path``.

    Args:
        path: A file, which need not exist.
        name: The name of the argument, for the error.

    Raises:
        ValueError: If the path is a folder, its folder does not exist, or either is read-only.
    """
    folder = path.absolute().parent
    closed = [place for place in (folder, path) if place.exists() and not os.access(place, os.W_OK)]
    if path.is_dir() or not folder.is_dir() or closed:
        raise ValueError(
            f"{name} must name a file in a folder that exists and can be written to, got {path}"
        )


def check_folder(path: Path, content: str) -> None:
    """Raise unless the folder can be written to or created.

    Args:
        path: A folder, which need not exist.
        content: The files to write, in the plural, for the error: ``"checkpoints"``.

    Raises:
        ValueError: If the nearest existing parent, or the path itself, is a file or is read-only.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{content} need a directory, and {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{content} cannot be written to {path}: {nearest} is read-only")
