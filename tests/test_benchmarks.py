import json
import time
from pathlib import Path

import pytest
import torch
from reference import assert_exact, sgd, small_model, undivided_steps
from torch import nn

from benchmarks import __main__ as command
from benchmarks import exactness, search
from benchmarks.engine import plain_step
from benchmarks.findings import Findings, as_json, table_text
from benchmarks.machine import environment, slug, write_atomically
from benchmarks.samples import Samples, alternated

CPU = torch.device("cpu")


def test_samples_are_told_as_median_and_spread_and_all_are_written() -> None:
    samples = Samples([3.0, 1.0, 2.0, 10.0])
    assert str(samples) == "2.5 [1, 10]"
    written = as_json(samples)
    assert written == {"median": 2.5, "minimum": 1, "maximum": 10, "samples": [3, 1, 2, 10]}
    assert (as_json(float("nan")), as_json(0.5), as_json("text")) == ("nan", 0.5, "text")


def test_pairs_take_turns_at_being_the_first() -> None:
    order: list[str] = []
    pairs = list(alternated(lambda: time.sleep(0.02), lambda: order.append("other"), 1))
    assert pairs[0][0] >= 0.02 > pairs[0][1], "the first of a pair is the first argument's"
    order.clear()
    list(alternated(lambda: order.append("one"), lambda: order.append("other"), 3))
    assert order == ["one", "other", "other", "one", "one", "other"]


def test_after_the_deadline_one_pair_is_enough() -> None:
    assert len(list(alternated(lambda: None, lambda: None, 9, deadline=0.0))) == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "device" / "part.json"
    write_atomically(path, {"value": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_atomically(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 1}
    assert [file.name for file in path.parent.iterdir()] == ["part.json"]


def test_a_failure_while_replacing_leaves_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / "part.json").mkdir()  # No file can take the place of a folder.
    with pytest.raises(OSError, match=r"part\.json"):
        write_atomically(tmp_path / "part.json", {})
    assert [file.name for file in tmp_path.iterdir()] == ["part.json"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("CPU Intel(R) Xeon(R) CPU @ 2.20GHz, 2 cores", "cpu-intel-xeon-cpu-2-cores"),
        ("../?", "unknown"),
    ],
)
def test_a_device_s_name_becomes_a_folder(name: str, folder: str) -> None:
    assert slug(name) == folder


def test_a_figure_comes_with_the_machine_and_the_versions() -> None:
    facts = environment(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert {"device", "driver", "autobatch", "commit", "python", "date", "seed"} <= facts.keys()


def test_a_table_has_aligned_columns() -> None:
    text = table_text([{"by": "autobatch", "found_it": True}, {"by": "x", "found_it": 0.125}])
    assert text.splitlines() == [
        "by         found it",
        "---------  --------",
        "autobatch  yes",
        "x          0.12",
    ]


@pytest.mark.parametrize("limit", range(10))
def test_doubling_and_bisection_finds_the_limit(limit: int) -> None:
    assert search.largest_by_doubling(lambda size: size <= limit, 7) == min(limit, 7)


def test_the_plain_loop_takes_the_undivided_step() -> None:
    plain, whole = small_model(), small_model()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (10,), generator=generator)
    loss = plain_step(plain, sgd(plain), x, y, 4)
    (expected,) = undivided_steps(whole, sgd(whole), nn.CrossEntropyLoss(), [(x, y)])
    assert_exact(plain.state_dict(), whole.state_dict())
    assert loss == pytest.approx(expected, rel=1e-6)


def test_exactness_shows_the_law_and_a_control_that_breaks_it() -> None:
    findings = Findings(device=CPU)
    exactness.run(findings)
    assert len(findings.cases) == 6
    for case in findings.cases:
        assert isinstance(ours := case["autobatch"], float)
        assert isinstance(control := case["mean of means"], float)
        assert ours < 1e-12 < 0.01 < control


def test_what_time_does_not_allow_is_named_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["exactness", "--minutes", "0", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("LEFT OUT, no time: ") == 6
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["exactness", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    (file,) = tmp_path.glob("cpu-*/exactness.json")
    written = json.loads(file.read_text())
    assert (written["part"], written["left_out"], len(written["cases"])) == ("exactness", [], 6)
    assert f"written to {file}" in capsys.readouterr().out


def test_a_part_that_fails_does_not_keep_the_others_from_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Findings) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setitem(command.PARTS, "search", fail)
    assert command.main(["search", "exactness", "--quick", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert "no luck" in told.err
    assert "mean of means" in told.out


@pytest.mark.parametrize("wrong", [["speed"], ["--device", "tpu"], ["--device", "cuda:99"]])
def test_a_bad_argument_ends_with_code_2(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(wrong)
    assert end.value.code == 2
