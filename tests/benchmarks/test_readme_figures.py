"""The figures of the README and of docs/benchmarks.md are those of the result files."""

import json
import re
import shutil
from pathlib import Path

import made_up
import pytest

from benchmarks import __main__ as command
from benchmarks.reporting import command as reading
from benchmarks.reporting.readme import BEGIN, END, tables_page, updated

ROOT = Path(__file__).parent.parent.parent
EMPTY = f"# Title\n\n{BEGIN}\n{END}\n\nThe rest.\n"


def test_the_readme_is_as_the_committed_results_have_it() -> None:
    text = (ROOT / "README.md").read_text()
    assert updated(text, ROOT) == text, "run python -m benchmarks readme"


def test_the_tables_are_as_the_committed_results_have_them() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert tables_page(ROOT) == text, "run python -m benchmarks readme"


def test_every_link_of_the_tables_page_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", tables_page(ROOT))
    assert len(targets) > 4
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target


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
    assert tables_page(root) != tables_page(ROOT)


def test_a_changed_readme_shows(tmp_path: Path) -> None:
    root = copy(tmp_path)
    text = (root / "README.md").read_text()
    changed = text.replace("**18 of 18**", "**19 of 18**")
    assert changed != text
    assert updated(changed, root) == text


def test_three_figures_are_written_between_the_comments_and_nothing_else_changes(
    tmp_path: Path,
) -> None:
    folder = made_up.write(tmp_path / "benchmarks" / "results" / "made-up-9000")
    made_up.write(tmp_path / "benchmarks" / "results" / "a-card", imitated="RTX 3060")
    (folder / "overview.png").write_bytes(b"")
    text = updated(EMPTY, tmp_path)
    assert text.startswith(
        f"# Title\n\n{BEGIN}\nMeasured on Made Up 9000 (torch 2.13.0, 2026-01-02)"
    )
    assert text.endswith(f"(docs/benchmarks.md).\n{END}\n\nThe rest.\n")
    assert updated(text, tmp_path) == text
    assert re.findall(r"^\* \*\*(.*?)\*\*", text, re.MULTILINE) == ["1 of 1", "2 steps", "3e-16"]
    assert "![Made Up 9000 at a glance](benchmarks/results/made-up-9000/overview.png)" in text
    assert "imitated" not in text
    assert "| --- |" not in text


def test_a_gpu_is_the_first_device_of_the_readme(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    made_up.write(results / "a", device="CPU Made Up, 2 cores")
    made_up.write(results / "b")
    assert "Measured on Made Up 9000" in updated(EMPTY, tmp_path)


def test_without_a_measured_device_the_readme_has_only_the_link(tmp_path: Path) -> None:
    made_up.write(tmp_path / "benchmarks" / "results" / "a-card", imitated="RTX 3060")
    text = updated(EMPTY, tmp_path)
    assert "(docs/benchmarks.md)" in text
    assert "imitated" not in text
    assert "\n* " not in text


def test_the_page_has_every_table(tmp_path: Path) -> None:
    folder = made_up.write(tmp_path / "benchmarks" / "results" / "made-up-9000")
    (folder / "overview.png").write_bytes(b"")
    text = tables_page(tmp_path)
    assert "## Made Up 9000\n\ndriver 1.2.3, torch 2.13.0, commit abc1234, 2026-01-02" in text
    assert "![Made Up 9000 at a glance](../benchmarks/results/made-up-9000/overview.png)" in text
    assert "[report](../benchmarks/results/made-up-9000/report.md)" in text
    assert "| resnet50 | 3 x 224 x 224 | 25.6 M | 90 | 170 |" in text
    assert "| autobatch | 1 of 1 | 0 | 0 | 2 [2, 2] | 1 of 1 |" in text
    assert "| autobatch | 3e-16 | goes on in 1 of 1, at most 1e-16 off |" in text
    assert "| accelerate | not installed | not installed |" in text


def test_imitations_come_last_and_say_so_at_every_table(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    made_up.write(results / "imitated-rtx-3060", imitated="RTX 3060")
    made_up.write(results / "made-up-9000")
    text = tables_page(tmp_path)
    measured, imitated = text.split("## imitated RTX 3060")
    assert "## Made Up 9000" in measured
    assert "imitated" not in measured
    assert "Every figure is imitated, on Made Up 9000" in imitated
    titles = [line for line in imitated.splitlines() if line.endswith(":")]
    assert len(titles) == measured.count("| --- |\n")
    assert all(title.endswith("imitated RTX 3060:") for title in titles)


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_its_place_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="once each"):
        updated(text, tmp_path)


def test_the_command_writes_the_readme_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.write(tmp_path / "benchmarks" / "results" / "made-up-9000")
    (tmp_path / "README.md").write_text(EMPTY)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(reading, "ROOT", tmp_path)
    assert command.main(["readme"]) == 0
    assert (tmp_path / "README.md").read_text() == updated(EMPTY, tmp_path)
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == tables_page(tmp_path)
