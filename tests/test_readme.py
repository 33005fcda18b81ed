"""The README's code runs, and what it shows is what is there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import autobatch

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.strip().splitlines()[-1])
def test_a_code_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # One of them writes checkpoints.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
    data = (torch.randn(300, 1, 5, 5), torch.randint(0, 3, (300,)))
    exec(compile(code, "README.md", "exec"), {"model": model, "data": data})


def test_there_is_code_for_each_way_in() -> None:
    assert len(BLOCKS) == 7
    for name in ("find_and_train", "find_batch_size", "check", "Accumulator"):
        assert any(f"{name}(" in block for block in BLOCKS)


def test_the_plan_in_the_readme_is_the_plan() -> None:
    assert str(autobatch.BatchPlan(desired=256, tolerable=86)) in README


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target


def test_what_the_readme_shows_of_the_demo_was_printed_by_it() -> None:
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    shown = (results / "cpu-amd-epyc-2-cores" / "demo.txt").read_text().rstrip()
    assert shown in README
    assert "256 = 86 + 85 + 85" in shown
