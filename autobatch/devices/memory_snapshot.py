"""What a GPU's allocator holds when memory runs out, written to a file for people."""

import os
import warnings
from pathlib import Path

from autobatch.devices.factory import BACKENDS


def check_directory(name: str, directory: object) -> None:
    """Raise unless ``directory`` can name a folder.

    Raises:
        TypeError, ValueError: With the value that was passed.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"{name} must be a folder's path or None, got {directory!r}")
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ValueError(f"{name} must be a folder, got {os.fspath(directory)!r}, which is a file")


def write_snapshot(directory: str | os.PathLike[str], step: int) -> None:
    """Write what the allocators in use hold: CUDA's for https://pytorch.org/memory_viz.

    The file says where each block was allocated only if the user has switched that on, with
    ``torch.cuda.memory._record_memory_history()``, which costs time. Warns where nothing can be
    written, because training must not end for a missing file. Writes nothing where no allocator can
    be written down, as on the CPU.

    Args:
        directory: Made if it is missing.
        step: Names the file; a later failure in the same step replaces it.
    """
    path = Path(directory) / f"out-of-memory-step-{step}.pickle"
    try:
        for backend in BACKENDS.values():
            backend.write_memory_snapshot(path)
    except Exception as error:  # noqa: BLE001  # Torch's function is private; the disk may be full.
        warnings.warn(f"no snapshot was written to {path}: {error!r}", stacklevel=2)
