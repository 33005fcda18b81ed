"""The machine and the versions of a measurement, and the file that states them."""

import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Final

import torch

from autobatch.devices import nvml
from autobatch.files import atomic_file
from benchmarks import ROOT
from benchmarks.harness.records import SEED, Fields

_M_TRIM_THRESHOLD: Final = -1  # From malloc.h.
_M_MMAP_THRESHOLD: Final = -3


def slug(name: str) -> str:
    """Return ``name`` as the name of a folder: ``"Intel(R) Xeon @ 2.0GHz"`` is ``intel-xeon``."""
    plain = re.sub(r"\((r|tm)\)|@[^,]*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def environment(device: torch.device) -> dict[str, object]:
    """Return the device, the versions and the other facts that belong to every figure."""
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
    """Make the C library keep freed memory; return whether it does.

    By default, glibc returns the free top of its heap to the system, and the next step faults it in
    again, page by page: up to a third of a ResNet's step on the CPU. A small block at the top
    prevents the return, so the cost differs by chance between processes and between engines.
    """
    try:
        library = ctypes.CDLL(None)
        kept = library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        return bool(
            kept and library.mallopt(_M_MMAP_THRESHOLD, 2**25)
        )  # The largest value that glibc accepts.
    except (OSError, AttributeError):  # Another C library.
        return False


def write_atomically(path: Path, fields: Fields) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    text = json.dumps(fields, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"CPU {name}, {os.cpu_count()} cores"


def _version() -> str:
    try:
        return importlib.metadata.version("torch-autobatch")
    except importlib.metadata.PackageNotFoundError:  # autobatch runs from a checkout.
        return "(not installed)"


def _commit() -> str | None:
    """Return the measured commit, with "-dirty" if files were changed."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit, changed = (
            subprocess.run([*git, *ask], capture_output=True, text=True, check=True).stdout.strip()
            for ask in (
                ["describe", "--always"],
                # Results are no code, and the part before may just have written some.
                ["status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md"],
            )
        )
        return f"{commit}-dirty" if changed else commit
    except (OSError, subprocess.CalledProcessError):  # No git, or no repository.
        return None
