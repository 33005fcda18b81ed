"""``make gpu``: run the GPU's tests and then the benchmarks, within one budget of time."""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

import torch

from benchmarks import ROOT

_TESTS: Final = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu")
_OF_TESTS: Final = 0.75  # Tests that hang must not take the benchmarks' time.
_TOO_LONG: Final = 124  # What timeout(1) returns.


def main(arguments: Sequence[str]) -> int:
    """Run the GPU's tests, then the benchmarks in the remaining time; return 0 if both succeed."""
    handed_on = "other arguments, such as PART and --out, go to python -m benchmarks"
    reader = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, epilog=handed_on
    )
    reader.add_argument("--minutes", type=float, default=8.0, help="for both together")
    own, others = reader.parse_known_args(list(arguments))
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    began = time.monotonic()
    seconds = 60 * own.minutes
    tests = _run(_TESTS, seconds * _OF_TESTS)
    left = left_minutes(seconds, time.monotonic() - began)
    measured = _run(("-m", "benchmarks", *others, "--minutes", f"{left:.3f}"), None)
    print(f"tests ended with {tests}, benchmarks with {measured}")
    return tests or measured


def left_minutes(budget_seconds: float, spent_seconds: float) -> float:
    """Return the minutes of a budget that the tests left, at least 0."""
    return max(budget_seconds - spent_seconds, 0.0) / 60


def _run(arguments: Sequence[str], most_seconds: float | None) -> int:
    try:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, timeout=most_seconds)
    except subprocess.TimeoutExpired:
        print(f"ended after {most_seconds:.0f} s: {' '.join(arguments)}", file=sys.stderr)
        return _TOO_LONG
    return done.returncode
