import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as command
from benchmarks.harness import gpu
from benchmarks.harness.gpu import left_minutes

ROOT = Path(__file__).parent.parent.parent


@given(budget=st.floats(0, 1e4), spent=st.floats(0, 1e4))
def test_both_together_take_no_more_than_the_budget(budget: float, spent: float) -> None:
    left = 60 * left_minutes(budget, spent)
    assert left >= 0
    assert left + spent == pytest.approx(max(budget, spent))


@pytest.mark.parametrize(
    ("tests", "benchmarks", "code"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), ("hang", 0, 124)]
)
def test_tests_come_first_and_benchmarks_get_what_they_leave(
    tests: int | str,
    benchmarks: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    called: list[tuple[Sequence[str], float | None]] = []
    clock = iter([100.0, 100.0 + 90.0])

    def run(words: Sequence[str], *, cwd: Path, timeout: float | None) -> SimpleNamespace:
        assert (cwd, words[0]) == (ROOT, sys.executable)
        called.append((tuple(words[1:]), timeout))
        if "pytest" in words and tests == "hang":
            raise subprocess.TimeoutExpired(list(words), timeout or 0.0)
        return SimpleNamespace(returncode=tests if "pytest" in words else benchmarks)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    words = ["gpu", "capacity", "search", "--minutes", "8", "--out", str(tmp_path)]
    assert command.main(words) == code
    (first, most), (second, none) = called
    assert first[:4] == ("-m", "pytest", "-m", "gpu")
    assert most == 8 * 60 * 0.75
    own = ("capacity", "search", "--out", str(tmp_path))
    assert second == ("-m", "benchmarks", *own, "--minutes", "6.500")
    assert none is None


def test_without_a_gpu_nothing_is_run_and_the_command_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it ran"))
    assert gpu.main(["--minutes", "8"]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_make_gpu_has_one_budget_and_may_choose_parts() -> None:
    def told(*words: str) -> str:
        asked = ["make", "--dry-run", "gpu", "PYTHON=python3", "MINUTES=7", "OUT=/o", *words]
        # Make may have started this: then it tells what folder it enters.
        own = {name: value for name, value in os.environ.items() if "MAKE" not in name}
        done = subprocess.run(asked, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
        return done.stdout

    assert told() == "python3 -m benchmarks gpu all --minutes 7 --out /o\n"
    chosen = told("PARTS=capacity search")
    assert chosen == "python3 -m benchmarks gpu capacity search --minutes 7 --out /o\n"


def test_at_most_eight_files_come_back() -> None:
    reports = 3  # report.md, report.html and overview.png.
    assert len(command.PARTS) + reports <= 8
