"""Measure what autobatch costs and gains on this machine: ``python -m benchmarks``."""

import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent  # The repository.

# The benchmarks use the tests' black box, fingerprint and reference implementations.
sys.path.append(str(ROOT / "tests"))
