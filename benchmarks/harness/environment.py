"""What was measured on, and the file that keeps it."""

import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch

from autobatch.devices import nvml
from benchmarks import ROOT
from benchmarks.harness.records import SEED, Fields

_M_TRIM_THRESHOLD: Final = -1  # Of malloc.h.
_M_MMAP_THRESHOLD: Final = -3


def slug(name: str) -> str:
    """Return ``name`` as a folder: ``"Intel(R) Xeon @ 2.0GHz"`` is ``intel-xeon``."""
    plain = re.sub(r"\((r|tm)\)|@[^,]*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def environment(device: torch.device) -> dict[str, object]:
    """Return what a figure must not be read without."""
    return {
        "device": _name(device),
        "driver": nvml.survey().driver,
        "torch": torch.__version__,
        "autobatch": _version(),
        "commit": _commit(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # Processes that wanted a core in the last minute.
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": SEED,
    }


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed; return whether it does.

    Left alone, glibc gives the top of its heap back to the system when enough of it is free, and
    the next window faults it in again, page by page: up to a third of a ResNet's step on the CPU.
    Whether the top is free when gradients go is a matter of where some small block happens to lie,
    so it comes and goes between processes, and between two engines in one.
    """
    try:
        library = ctypes.CDLL(None)
        kept = library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        return bool(kept and library.mallopt(_M_MMAP_THRESHOLD, 2**25))  # The most it takes.
    except (OSError, AttributeError):  # Another C library.
        return False


def write_atomically(path: Path, fields: Fields) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    text = json.dumps(fields, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)  # Else nobody but the owner could read it.
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    told = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    name = told[1] if told else platform.processor() or platform.machine()
    return f"CPU {name}, {os.cpu_count()} cores"


def _version() -> str:
    try:
        return importlib.metadata.version("torch-autobatch")
    except importlib.metadata.PackageNotFoundError:  # A checkout that was not installed.
        return "(not installed)"


def _commit() -> str | None:
    """The code that was measured; its version number seldom moves."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit, changed = (
            subprocess.run([*git, *ask], capture_output=True, text=True, check=True).stdout.strip()
            for ask in (
                ["describe", "--always"],
                # Results are no code: those of the part before may just have been written.
                ["status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md"],
            )
        )
        return f"{commit}-dirty" if changed else commit
    except (OSError, subprocess.CalledProcessError):  # No git, or no repository.
        return None
