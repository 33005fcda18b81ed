"""The README's figures are those of the result files."""

import json
import shutil
from pathlib import Path

import made_up
import pytest

from benchmarks import __main__ as command
from benchmarks.reporting import command as reading
from benchmarks.reporting.readme import BEGIN, END, updated

ROOT = Path(__file__).parent.parent.parent
EMPTY = f"# Title\n\n{BEGIN}\n{END}\n\nThe rest.\n"


def test_the_readme_is_as_the_committed_results_have_it() -> None:
    text = (ROOT / "README.md").read_text()
    assert updated(text, ROOT) == text, "run python -m benchmarks readme"


def copy(tmp_path: Path) -> Path:
    """The committed results and the README, to be changed."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_a_changed_file_shows(tmp_path: Path) -> None:
    root = copy(tmp_path)
    path = root / "benchmarks" / "results" / "cpu-amd-epyc-2-cores" / "exactness.json"
    result = json.loads(path.read_text())
    result["cases"][0]["samples, 10 by 4"] = 0.875
    path.write_text(json.dumps(result))
    text = (root / "README.md").read_text()
    assert updated(text, root) != text


def test_a_changed_readme_shows(tmp_path: Path) -> None:
    root = copy(tmp_path)
    text = (root / "README.md").read_text()
    changed = text.replace("| 18 of 18 |", "| 19 of 18 |")
    assert changed != text
    assert updated(changed, root) == text


def test_the_figures_are_written_between_the_comments_and_nothing_else_moves(
    tmp_path: Path,
) -> None:
    folder = made_up.write(tmp_path / "benchmarks" / "results" / "made-up-9000")
    (folder / "overview.png").write_bytes(b"")
    text = updated(EMPTY, tmp_path)
    assert text.startswith(f"# Title\n\n{BEGIN}\n**Made Up 9000**: driver 1.2.3, torch 2.13.0")
    assert text.endswith(f"{END}\n\nThe rest.\n")
    assert updated(text, tmp_path) == text
    assert "![Made Up 9000 at a glance](benchmarks/results/made-up-9000/overview.png)" in text
    assert "[report](benchmarks/results/made-up-9000/report.md)" in text
    assert "| resnet50 | 3 x 224 x 224 | 25.6 M | 90 | 170 |" in text
    assert "| autobatch | 1 of 1 | 0 | 0 | 2 [2, 2] | 1 of 1 |" in text
    assert "| autobatch | 3e-16 | goes on in 1 of 1, at most 1e-16 off |" in text
    assert "| accelerate | not installed | not installed |" in text


def test_imitations_come_last_and_say_so_at_every_table(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    made_up.write(results / "imitated-rtx-3060", imitated="RTX 3060")
    made_up.write(results / "made-up-9000")
    text = updated(EMPTY, tmp_path)
    measured, imitated = text.split("**imitated RTX 3060**")
    assert "**Made Up 9000**" in measured
    assert "imitated" not in measured
    assert "every figure is imitated, on Made Up 9000" in imitated
    titles = [line for line in imitated.splitlines() if line.endswith(":")]
    assert len(titles) == measured.count("| --- |\n")
    assert all(title.endswith("imitated RTX 3060:") for title in titles)


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_its_place_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="once each"):
        updated(text, tmp_path)


def test_the_command_writes_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up.write(tmp_path / "benchmarks" / "results" / "made-up-9000")
    (tmp_path / "README.md").write_text(EMPTY)
    monkeypatch.setattr(reading, "ROOT", tmp_path)
    assert command.main(["readme"]) == 0
    assert (tmp_path / "README.md").read_text() == updated(EMPTY, tmp_path)
