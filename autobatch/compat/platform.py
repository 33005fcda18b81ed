"""Platforms whose driver keeps in the host's memory what the GPU's cannot hold."""

import platform
import sys


def spilling_platform() -> str:
    """Return ``"Windows"`` or ``"WSL"`` where that is so, or ``""``.

    There nothing runs out: an example just takes many times as long (WSL#11050).
    """
    if sys.platform == "win32":
        return "Windows"
    return "WSL" if "microsoft" in platform.release().lower() else ""
