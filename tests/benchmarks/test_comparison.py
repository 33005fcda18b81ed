"""Several devices side by side, imitated ones never beside measured ones."""

from pathlib import Path

import made_up
import pytest

from benchmarks import __main__ as command


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert command.main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_each_device_has_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = made_up.write(tmp_path / "a")
    smaller = {"capacity": [made_up.capacity(tolerable=44), made_up.capacity("gpt2", tolerable=5)]}
    other = made_up.write(tmp_path / "b", smaller, device="Made Up 1", commit="def5678")
    text = told(capsys, one, other)
    assert "| model | setting | Made Up 9000 | Made Up 1 |" in text
    assert "| resnet50 | fp32 AdamW | 90 | 44 |" in text
    assert "| gpt2 | fp32 AdamW | - | 5 |" in text, "what one has and the other lacks"
    assert "| autobatch | 2 [2, 2] | - |" in text
    assert "| net | autobatch | 24.5 (23.3 to 25.7) [22.1, 27] | - |" in text
    assert "| Lightning | 0.5 | - |" in text
    assert "abc1234" in text
    assert "def5678" in text


def test_a_search_whose_find_does_not_run_costs_nothing_that_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "| toma | - |" in told(capsys, made_up.write(tmp_path))


def test_two_runs_on_one_device_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [made_up.write(tmp_path / name) for name in ("first", "second")]
    text = told(capsys, *folders)
    header = next(line for line in text.splitlines() if line.startswith("| model | setting"))
    assert "/first) | Made Up 9000 (" in header
    assert "/second) |" in header


def test_an_imitation_never_stands_beside_a_measured_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made_up.write(tmp_path / "a")
    other = made_up.write(tmp_path / "b", imitated="RTX 3060")
    assert command.main(["compare", str(one), str(other)]) == 2
    captured = capsys.readouterr()
    assert "imitated figures never stand beside measured ones" in captured.err
    assert captured.out == ""


def test_imitations_beside_each_other_say_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = ("RTX 3060", "RTX 4090")
    folders = [made_up.write(tmp_path / card, imitated=card) for card in cards]
    html = tmp_path / "both.html"
    text = told(capsys, *folders, "--html", html)
    for card in cards:
        assert f"Every figure here is imitated {card}" in text
    assert "imitated RTX 3060, imitated RTX 4090" in html.read_text()


def test_a_device_is_found_by_its_name_among_the_committed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "CPU AMD EPYC, 2 cores" in told(capsys, "cpu-amd-epyc-2-cores")


def test_a_device_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["compare", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
