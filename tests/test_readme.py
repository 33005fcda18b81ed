"""The code of README.md and of the pages in docs runs, and what they show is what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import autobatch

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
PAGES = {path.name: path.read_text() for path in FILES}
README = PAGES["README.md"]
MOST_LINES = 150


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


CODE = [
    pytest.param(code, id=f"{page}, {code.strip().splitlines()[-1]}")
    for page in sorted(PAGES)
    for code in blocks(page)
    if page != "README.md"  # Runs in a process of its own.
]


def run(code: str) -> dict[str, object]:
    """Run a program whose only names are its own, and return these."""
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, "a block of code", "exec"), names)
    return names


def of_diff(sign: str) -> str:
    """Return the program of the README's diff: ``-`` before the change, ``+`` after it."""
    (lines,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    return "".join(f"{line[1:]}\n" for line in lines.splitlines() if line[:1] in ("", " ", sign))


@pytest.mark.parametrize("code", CODE)
def test_a_code_block_runs_by_itself(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # One of the programs writes checkpoints.
    run(code)


def test_the_readme_shows_what_its_only_block_prints_in_a_fresh_interpreter() -> None:
    (code,) = blocks("README.md")
    shown = README.partition("```python\n")[2].partition("```\n\n```\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == shown
    assert shown.startswith(f"{autobatch.BatchPlan(desired=256, tolerable=86)}\n")


def test_the_two_programs_of_the_diff_train_the_same_model() -> None:
    def trained(code: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = run(code)["model"]
        assert isinstance(model, nn.Module)
        return list(model.parameters())

    before, after = of_diff("-"), of_diff("+")
    cut = after.replace("criterion)\n", "criterion, micro_batch=100)\n", 1)
    assert cut != after
    torch.set_default_dtype(torch.float64)
    try:
        plain, accumulated, in_parts = trained(before), trained(after), trained(cut)
        control = trained(before.replace("batch_size=256", "batch_size=255"))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(accumulated, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(in_parts, plain, rtol=1e-10, atol=1e-10)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(control, plain, rtol=1e-10, atol=1e-10)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_there_is_code_for_each_way_in() -> None:
    assert len(CODE) == 7
    for name in (
        "find_and_train",
        "find_batch_size",
        "check",
        "find_largest",
        "Accumulator",
        "predict",
        "peak",
    ):
        assert any(f"{name}(" in code for page in PAGES for code in blocks(page)), name


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_leads_somewhere(page: str) -> None:
    (folder,) = [file.parent for file in FILES if file.name == page]
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, heading = link.partition("#")
        if path.startswith("https:"):
            continue
        target = folder / path if path else folder / page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_file_that_a_page_names_exists(page: str) -> None:
    for name in re.findall(r"`((?:tests|benchmarks|docs)/[\w./-]+\.\w+)`", PAGES[page]):
        assert (ROOT / name).exists(), name


def test_what_is_shown_of_the_demo_was_printed_by_it() -> None:
    results = ROOT / "benchmarks" / "results"
    shown = (results / "cpu-amd-epyc-2-cores" / "demo.txt").read_text().rstrip()
    assert shown in PAGES["cli.md"]
    assert "256 = 86 + 85 + 85" in shown
