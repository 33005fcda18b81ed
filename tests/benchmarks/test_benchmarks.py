import itertools
import json
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_exact, sgd, small_model, twin, undivided_steps
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks import __main__ as command
from benchmarks.engine import peers
from benchmarks.engine import suite as engine
from benchmarks.engine.suite import Spread, plain_step, turn
from benchmarks.exactness import suite as exactness
from benchmarks.harness.environment import environment, slug, write_atomically
from benchmarks.harness.records import Records, as_json, table_text
from benchmarks.harness.runner import Part
from benchmarks.harness.timing import Samples
from benchmarks.search import peers as search_peers

CPU = torch.device("cpu")
OTHERS = {"accelerate", "lightning", "transformers"}


def test_samples_are_told_as_median_and_spread_and_all_are_written() -> None:
    samples = Samples([3.0, 1.0, 2.0, 10.0])
    assert str(samples) == "2.5 [1, 10]"
    written = as_json(samples)
    assert written == {"median": 2.5, "minimum": 1, "maximum": 10, "samples": [3, 1, 2, 10]}
    assert (as_json(float("nan")), as_json(0.5), as_json("text")) == ("nan", 0.5, "text")


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
    assert search_peers.largest_by_doubling(lambda size: size <= limit, 7) == min(limit, 7)


def test_the_plain_loop_takes_the_undivided_step() -> None:
    plain, whole = small_model(), small_model()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (10,), generator=generator)
    loss = plain_step(plain, sgd(plain), x, y, 4)
    (expected,) = undivided_steps(whole, sgd(whole), nn.CrossEntropyLoss(), [(x, y)])
    assert_exact(plain.state_dict(), whole.state_dict())
    assert loss == pytest.approx(expected, rel=1e-6)


@given(people=st.integers(1, 7))
def test_over_enough_rounds_everyone_has_each_place_equally_often(people: int) -> None:
    names = [f"engine {number}" for number in range(people)]
    rounds = [turn(names, place) for place in range(2 * people)]
    assert all(sorted(order) == names for order in rounds)
    places = Counter((by, place) for order in rounds for place, by in enumerate(order))
    assert set(places.values()) == {2}
    if people > 2:
        follows = {order.index(names[1]) - order.index(names[0]) for order in rounds}
        assert {1, -1} <= follows, "somebody always follows the same one"


def test_a_spread_tells_the_quartiles_too() -> None:
    assert str(Spread([3.0, 1.0, 2.0, 1000.4])) == "2.5 (1.75 to 252) [1, 1000]"
    assert Spread([3.0]).quartiles == (3, 3)


@pytest.mark.parametrize(("ratio", "verdict"), [(0.99, "held"), (0.98, "NOT held")])
def test_the_verdict_is_of_the_median(ratio: float, verdict: str) -> None:
    found = engine._held_at_least("plain / autobatch", 0.99, Samples([0, ratio, 9e9]))
    assert found == {
        "wanted": "plain / autobatch >= 0.99",
        "measured": f"{ratio:.4g}",
        "verdict": verdict,
    }


def test_the_ratio_is_required_from_5_ms_a_micro_batch_on() -> None:
    cases = engine._cases(Records(device=CPU))
    assert {name: case.requires_ratio for name, case in cases.items() if "MLP" in name} == {
        "MLP 32-64-10, 8 x 32": False,
        "MLP 32-64-10, 1 x 32": False,
    }
    assert all(case.requires_ratio for name, case in cases.items() if "resnet" in name)


def test_work_that_was_not_done_shows_as_a_difference() -> None:
    start = small_model()
    one, other = twin(start), twin(start)
    for model in (one, other):
        plain_step(model, sgd(model), *_batch(8), 4)
    assert engine._difference(one, other, start) == 0
    assert engine._difference(start, other, start) == pytest.approx(1)


@pytest.mark.parametrize("name", peers.ALL)
def test_a_peer_takes_the_undivided_step_if_all_pieces_are_equal(name: str) -> None:
    model, whole = small_model(), small_model()
    batch = _batch(12)
    _three_windows(name, model, [4, 4, 4])
    optimizer = SGD(whole.parameters(), lr=peers.LEARNING_RATE)
    undivided_steps(whole, optimizer, nn.CrossEntropyLoss(), [batch] * 3)
    assert_exact(model.state_dict(), whole.state_dict())
    model = small_model()
    _three_windows(name, model, [5, 5, 2])  # The control: here a mean of means is another step.
    with pytest.raises(AssertionError, match="not close"):
        assert_exact(model.state_dict(), whole.state_dict())


def test_lightning_s_window_lasts_from_the_first_forward_until_the_step_is_taken() -> None:
    model, micro_batches = small_model(), [_batch(4)] * 3
    fit = _fit(model, micro_batches)
    start = twin(model)
    moved: list[bool] = []

    def work() -> Iterator[peers.Pair]:
        for pair in fit.window():
            moved.append(not _same(model, start))
            yield pair
        moved.append(not _same(model, start))

    fit.drive(work())
    assert moved == [False, False, False, True]


def test_an_error_between_lightning_s_batches_comes_out() -> None:
    fit = _fit(small_model(), [_batch(4)])

    def work() -> Iterator[peers.Pair]:
        yield from fit.window()
        raise LookupError("in a turn of someone else's")

    with pytest.raises(LookupError, match="someone else's"):
        fit.drive(work())


def test_a_fit_that_ends_before_the_work_does_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers._Feed, "__len__", lambda _: 2)
    fit = _fit(small_model(), [_batch(4)])
    with pytest.raises(RuntimeError, match="ended before"):
        fit.drive(pair for _ in range(3) for pair in fit.window())


def test_lightning_is_silent_while_it_is_measured_and_may_speak_afterwards() -> None:
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    fit = _fit(small_model(), [_batch(4)])
    logger, ear = logging.getLogger("lightning.pytorch"), Ear()
    before = logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.DEBUG)
    try:
        fit.drive(iter(fit.window()))
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(before)
        logger.removeHandler(ear)
    assert said == []


def test_a_quick_run_of_the_engine_compares_everyone_with_the_plain_loop(tmp_path: Path) -> None:
    asked = ["engine", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    (file,) = tmp_path.glob("cpu-*/engine.json")
    cases = json.loads(file.read_text())["cases"]
    figures = {(case["model"], case["by"]): case for case in cases if "by" in case}
    verdicts = [case for case in cases if "verdict" in case]
    models = [f"MLP 32-64-10, {k} x 32" for k in (8, 1)]
    wanted = [f"{by} / autobatch >= 1" for by in peers.installed()]
    assert [
        (case["model"], case["wanted"].startswith(w))
        for case, w in zip(verdicts, 2 * wanted, strict=True)
    ] == [(model, True) for model in models for _ in wanted]
    assert {case["verdict"] for case in verdicts} <= {"held", "NOT held"}
    assert len(figures) == 2 * 5
    for (model, by), case in figures.items():
        if by in peers.ALL and by not in peers.installed():
            assert case["rounds"] == "not installed"
        else:
            _assert_measured(case, beside=figures[model, "plain"])


def test_without_peers_the_others_are_measured_and_the_absence_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "installed", list)
    records = Records(device=CPU, quick=True)
    engine.run(records)
    told = {case["by"]: case["rounds"] for case in records.cases if "by" in case}
    absent = dict.fromkeys(peers.ALL, "not installed")
    assert told == dict.fromkeys(("plain", "autobatch", "plain again"), "6 of 6") | absent
    assert "not installed" in str(records)


def test_after_the_deadline_one_round_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", list)
    late = SimpleNamespace(monotonic=lambda: math.inf, perf_counter=time.perf_counter)
    monkeypatch.setattr(engine, "time", late)
    records = Records(device=CPU, quick=True, deadline=time.monotonic() + 3600)
    engine.run(records)
    told = {case["rounds"] for case in records.cases if "by" in case}
    assert told == {"1 of 6", "not installed"}


def test_a_sample_s_seconds_are_divided_among_its_32_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "installed", list)
    seconds = SimpleNamespace(monotonic=time.monotonic, perf_counter=itertools.count().__next__)
    monkeypatch.setattr(engine, "time", seconds)  # Every sample takes one.
    records = Records(device=CPU, quick=True)
    engine.run(records)
    measured = [case for case in records.cases if case.get("rounds") == "6 of 6"]
    assert len(measured) == 2 * 3
    for case in measured:
        assert _samples(case["us per micro-batch"]) == [1e6 / 32] * 6


def test_what_time_does_not_allow_is_named_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["exactness", "--minutes", "0", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(": no time") == 13
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exactness, "absent", lambda package: package in OTHERS)
    asked = ["exactness", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    (file,) = tmp_path.glob("cpu-*/exactness.json")
    written = json.loads(file.read_text())
    assert (written["part"], written["left_out"], len(written["cases"])) == ("exactness", [], 17)
    assert f"written to {file}" in capsys.readouterr().out


def test_a_part_that_fails_does_not_keep_the_others_from_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exactness, "absent", lambda package: package in OTHERS)

    def fail(_: Records) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setitem(command.PARTS, "search", Part(run=fail, weight=1))
    assert command.main(["search", "exactness", "--quick", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert "no luck" in told.err
    assert "mean of means" in told.out


@pytest.mark.parametrize("wrong", [["speed"], ["--device", "tpu"], ["--device", "cuda:99"]])
def test_a_bad_argument_ends_with_code_2(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(wrong)
    assert end.value.code == 2


def _assert_measured(case: Mapping[str, object], *, beside: Mapping[str, object]) -> None:
    own, plain = _samples(case["us per micro-batch"]), _samples(beside["us per micro-batch"])
    ratio, on_top = (
        _samples(case[key]) for key in ("plain / it", "on top of plain, us per micro-batch")
    )
    assert case["rounds"] == "6 of 6"
    assert ratio == pytest.approx([one / other for one, other in zip(plain, own, strict=True)])
    assert on_top == pytest.approx(
        [other - one for one, other in zip(plain, own, strict=True)], abs=1e-6
    )
    assert 1 < min(own) < max(own) < 1e6, "in microseconds"
    assert isinstance(quartiles := case["quartiles"], dict)
    assert quartiles["plain / it"] == list(Spread(ratio).quartiles)
    assert isinstance(difference := case["update differs by"], float)
    assert difference < 1e-5


def _samples(written: object) -> list[float]:
    assert isinstance(written, dict)
    samples = written["samples"]
    assert isinstance(samples, list)
    return samples


def _batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (size,), generator=generator)


def _fit(model: nn.Module, micro_batches: list[peers.Pair]) -> peers.Fit:
    if peers.LIGHTNING not in peers.installed():
        pytest.skip("lightning is not installed")
    return peers.Fit(model, micro_batches, CPU)


def _three_windows(name: str, model: nn.Module, sizes: list[int]) -> None:
    if name not in peers.installed():
        pytest.skip(f"{name} is not installed")
    x, y = (part.split(sizes) for part in _batch(sum(sizes)))
    micro_batches = list(zip(x, y, strict=True))
    if name == peers.LIGHTNING:
        fit = _fit(model, micro_batches)
        fit.drive(pair for _ in range(3) for pair in fit.window())
    else:
        window = peers.accelerate_window(model, micro_batches, CPU)
        deque((pair for _ in range(3) for pair in window()), maxlen=0)


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)
