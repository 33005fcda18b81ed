"""What a GPU's allocator holds at the moment when memory runs out, written down for people."""

import os
import warnings
from pathlib import Path

import torch


def check_directory(name: str, directory: object) -> None:
    """Refuse what names no folder.

    Raises:
        TypeError, ValueError: With the value that came.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"{name} must be a folder's path or None, got {directory!r}")
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ValueError(f"{name} must be a folder, got {os.fspath(directory)!r}, which is a file")


def write_snapshot(directory: str | os.PathLike[str], step: int) -> None:
    """Write what CUDA's allocator holds, for https://pytorch.org/memory_viz.

    Where each block was allocated is in it only if the user has switched that on, with
    ``torch.cuda.memory._record_memory_history()``, which costs time. Warns where nothing can be
    written: training is not to end for it. Without a GPU in use there is nothing to write.

    Args:
        directory: Made if it is missing.
        step: Names the file; a later failure in the same step takes its place.
    """
    if not torch.cuda.is_initialized():
        return
    path = Path(directory) / f"out-of-memory-step-{step}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as error:  # noqa: BLE001  # It is private, and the disk may be full.
        warnings.warn(f"no snapshot was written to {path}: {error!r}", stacklevel=2)
