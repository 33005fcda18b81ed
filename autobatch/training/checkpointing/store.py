"""The checkpoint files of a training in a folder; a damaged file is never read.

A file is what ``torch.save`` writes, with a comment at its end, as zip files may have one: a mark,
the version of the format, and the sha256 of all bytes before it. Anybody's ``torch.load`` reads the
file, and autobatch refuses a file that was cut short or has one wrong bit.
"""

import copy
import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np
import torch
from torch import Tensor

from autobatch.devices.base import HOST
from autobatch.errors import CheckpointError
from autobatch.files import atomic_file, check_folder

_NAME: Final = re.compile(r"step-(\d{8,})\.pt")
_TEMPORARY: Final = re.compile(r"step-\d{8,}\.pt\.tmp")
_KEPT: Final = 2
_CHUNK_BYTES: Final = 1 << 20
_MARK: Final = b"autobatch checkpoint "
_VERSION: Final = b"2"
_SEAL_BYTES: Final = 2 + len(_MARK + _VERSION + b" sha256 ") + 64
# A learning rate may be a NumPy number; ``weights_only`` allows torch's own types anyway.
_NUMPY_SCALARS: Final = (
    cast("type", np.float64(0).__reduce__()[0]),  # Its module differs between NumPy's versions.
    np.dtype,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefdFD"),
)


class CheckpointStore:
    """The two newest checkpoints of one training, in a folder of their own.

    Args:
        directory: The folder. ``save`` creates it if it is missing.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._refused: set[Path] = set()
        check_folder(self.directory, "checkpoints")

    def save(self, fields: Mapping[str, object], *, step: int) -> Path:
        """Write a checkpoint, remove all older ones except the newest, and return the path.

        If anything fails, the earlier files are kept, and no half-written file is left.

        Args:
            fields: Tensors, numbers, text, and dicts, lists, tuples and sets of these.
            step: The number of optimizer steps so far.

        Raises:
            CheckpointError: A value of ``fields`` could not be loaded again, or the folder holds a
                checkpoint of a later step that ``latest`` has not refused.
            OSError: The file cannot be written.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        later = [path for path in self._own() if _step_of(path) > step]
        if later:
            raise CheckpointError(
                f"{later[-1]} is of a later step than step {step}, which is to be saved; continue "
                "from that checkpoint, or choose another directory"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step-{step:08d}.pt"
        for file in self.directory.iterdir():
            if _TEMPORARY.fullmatch(file.name):
                file.unlink()
        with atomic_file(path, temporary=path.with_name(f"{path.name}.tmp")) as temporary:
            _write(temporary, {name: _on_host(value) for name, value in fields.items()})
        self._refused.discard(path)
        _sync_directory(self.directory)
        for old in self._own()[:-_KEPT]:
            old.unlink()
        return path

    def latest(self) -> tuple[Path, dict[str, object]] | None:
        """Return the newest undamaged checkpoint, on the CPU; None if the folder holds none.

        Warns of each newer file that is damaged.

        Raises:
            CheckpointError: The folder holds checkpoints, and all of them are damaged.
        """
        refused: dict[Path, str] = {}
        for path in reversed(self._files()):
            try:
                fields = _read(path)
            except (CheckpointError, OSError) as error:
                refused[path] = str(error)
                continue
            self._refused.update(refused)
            for bad, reason in refused.items():
                warnings.warn(f"{bad} is refused: {reason}; {path.name} is used", stacklevel=2)
            return path, fields
        if refused:
            each = "; ".join(f"{path.name}: {reason}" for path, reason in refused.items())
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be used ({each}); remove these files to "
                "train from the beginning, or choose another directory"
            )
        return None

    def _files(self) -> list[Path]:
        """Return all files with the name of a checkpoint, the newest last."""
        if not self.directory.is_dir():
            return []
        named = (path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))
        return sorted(named, key=_step_of)

    def _own(self) -> list[Path]:
        """Return the files with the mark that were not refused; other files are never removed."""
        return [path for path in self._files() if path not in self._refused and _is_marked(path)]


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _on_host(value: object) -> object:
    """Return a value in host memory; a tensor that is part of a larger storage is copied."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        own_bytes = tensor.numel() * tensor.element_size()
        if tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > own_bytes:
            return tensor.clone()
        return tensor
    if isinstance(value, dict):
        twin = copy.copy(value)  # The same class and attributes, which a state_dict has.
        for key, item in value.items():  # No update: a Counter would add.
            twin[key] = _on_host(item)
        return twin
    if type(value) in (list, tuple):
        items = [_on_host(item) for item in cast("list[object]", value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _write(path: Path, fields: dict[str, object]) -> None:
    """Write a complete file to the disk."""
    with path.open("w+b") as file:
        try:
            torch.save(fields, file)
            file.flush()
            _load(path, mmap=True)  # Fail now if the file cannot be loaded. Reads no tensor.
        except (pickle.PickleError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"this training holds a value that a checkpoint cannot hold: {_reason(error)}"
            ) from error
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # Torch's error for a full disk.
                raise error.__context__ from None
            raise
        end = file.seek(-2, os.SEEK_END)  # A zip file ends with the length of its comment.
        seal = _seal(file, end)
        file.seek(end)
        file.write(seal)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        end = max(0, file.seek(0, os.SEEK_END) - _SEAL_BYTES)
        file.seek(end)
        found = file.read()
        if _MARK not in found:
            raise CheckpointError(
                "autobatch's mark is not at its end: the file was cut short, or another program "
                "wrote it"
            )
        if found != _seal(file, end):
            version = found.partition(_MARK)[2].partition(b" ")[0]
            what = "its bytes differ from those that were written"
            if version != _VERSION:
                known, other = _VERSION.decode(), version.decode(errors="replace")
                what = f"its format is {other}, and this version of autobatch reads {known}"
            raise CheckpointError(what)
        file.seek(0)
        try:
            return _load(file)
        except pickle.UnpicklingError as error:
            raise CheckpointError(_reason(error)) from error


def _load(file: Path | BinaryIO, *, mmap: bool = False) -> dict[str, object]:
    with torch.serialization.safe_globals(list(_NUMPY_SCALARS)):
        loaded = torch.load(file, map_location=HOST, weights_only=True, mmap=mmap)
    return cast("dict[str, object]", loaded)


def _reason(error: Exception) -> str:
    """Return the line that names the cause; torch adds many lines on security."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unpickler = [line for line in lines if "WeightsUnpickler error: " in line]
    short = (unpickler or lines or [type(error).__name__])[0]
    return short.partition("WeightsUnpickler error: ")[2].partition(". ")[0] or short


def _seal(file: BinaryIO, end: int) -> bytes:
    """Return the comment that ends a file, from its first ``end`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(min(_CHUNK_BYTES, end - file.tell())):
        digest.update(chunk)
    comment = _MARK + _VERSION + b" sha256 " + digest.hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment


def _is_marked(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _SEAL_BYTES))
        return _MARK in file.read()


def _sync_directory(directory: Path) -> None:
    """Write the new name to the disk too, if the system can open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
