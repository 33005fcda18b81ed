"""What autobatch costs and what it brings, measured on this machine: ``python -m benchmarks``."""

import sys
from pathlib import Path

# The black box, the fingerprint and the slow references that the tests use are measured here too.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
