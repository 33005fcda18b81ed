"""How much memory of the host this process may use."""

from pathlib import Path
from typing import Final

import psutil

_CGROUPS: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")


def host_memory(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> tuple[int, int]:
    """Return the total and the available bytes: the machine's, or a control group's if smaller.

    In a container the machine's figures may be far above the kernel's limit for the container. A
    process that passes that limit is killed; it gets no exception.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for folder, version in _folders(cgroups, membership):
        limit, used = _allowance(folder, version)
        if limit is not None and limit < machine.total:
            total, available = min(total, limit), min(available, max(limit - used, 0))
    return int(total), int(available)


def _folders(cgroups: Path, membership: Path) -> list[tuple[Path, int]]:
    """This process's memory groups, each with its ancestors: any of them may have the limit."""
    folders: list[tuple[Path, int]] = []
    for line in _read(membership).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root, version = (cgroups / "memory", 1) if controllers else (cgroups, 2)
        own = Path(path.lstrip("/"))
        folders += [(root / folder, version) for folder in (own, *own.parents)]
    return folders


def _allowance(folder: Path, version: int) -> tuple[int | None, int]:
    """A group's limit in bytes (None without one), and its use without droppable cache."""
    limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
    usage = "memory.current" if version == 2 else "memory.usage_in_bytes"
    cache = "inactive_file" if version == 2 else "total_inactive_file"
    words = (line.split() for line in _read(folder / "memory.stat").splitlines())
    droppable = next((int(row[1]) for row in words if len(row) == 2 and row[0] == cache), 0)
    used = max(_number(folder / usage, 0) - droppable, 0)
    bytes_allowed = _number(folder / limit, -1)
    return (bytes_allowed if bytes_allowed >= 0 else None), used


def _number(file: Path, absent: int) -> int:
    text = _read(file).strip()
    return int(text) if text.isdigit() else absent


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # The group is missing or not readable: no limit is known.
        return ""
