"""Platforms whose driver moves data to host memory when GPU memory is full."""

import platform
import sys


def spilling_platform() -> str:
    """Return the platform's name if its GPU driver spills to host memory, and ``""`` if not.

    On such a platform no allocation fails: an example only takes many times as long (WSL#11050).

    Returns:
        ``"Windows"``, ``"WSL"`` or ``""``.

    Example:
        >>> headroom_factor = 2 if spilling_platform() else 1
    """
    if sys.platform == "win32":
        return "Windows"
    return "WSL" if "microsoft" in platform.release().lower() else ""
