"""Published runs beside what is predicted of them: the benchmark's own tests."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from autobatch.prediction.gpu_catalogue import find_gpu
from autobatch.prediction.trace import Recorder, Trace
from benchmarks import programs, published
from benchmarks.findings import Findings
from benchmarks.programs import PublishedLoop

CPU = torch.device("cpu")
MIB = 2**20
RUN: dict[str, Any] = {
    "torchvision": "mobilenet_v3_small",
    "num_classes": 10,
    "optimizer": "SGD",
    "batch": 4,
    "gpu": "RTX 3060",
    "zero_grad_mode": None,
    "measured_peak_bytes": 100 * MIB,
    "xmem_bytes": 90 * MIB,
}
LIMIT: dict[str, Any] = {"by": "xMem", "fraction": 0.5, "ran": True, "peak_bytes": 100 * MIB}


def read(name: str) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((published.DATA / name).read_text()))


def test_the_published_figures_agree_with_one_another() -> None:
    told = read("published_runs.json")
    runs = {(published._name_of(run), run["zero_grad_mode"]): run for run in told["runs"]}
    assert len(runs) == len(told["runs"]) > 90
    for run in runs.values():
        total = told["gpu_total_bytes"][run["gpu"]]
        assert find_gpu(run["gpu"]).name == run["gpu"]
        assert 0 < run["measured_peak_bytes"] < total
        assert run["measured_peak_bytes"] % MIB == run["xmem_bytes"] % MIB == 0
        for limit in run["capped"]:
            assert 0 < limit["fraction"] < 1
            assert limit["ran"] or limit["peak_bytes"] is None
            assert (limit["peak_bytes"] or 0) <= limit["fraction"] * total + 2 * MIB


def test_the_first_thirteen_are_among_them_with_the_same_figures() -> None:
    first = read("measured_peaks.json")
    told = read("published_runs.json")
    assert first["gpu_total_bytes"] == told["gpu_total_bytes"]
    for run in first["runs"]:
        (same,) = [r for r in told["runs"] if published._mark_of(r) == published._mark_of(run)]
        assert (same["xmem_bytes"], same["num_classes"]) == (run["xmem_bytes"], run["num_classes"])


class Watched(nn.Module):
    """Notes in each forward pass whether there are gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.had: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.had.append(self.linear.weight.grad is not None)
        return cast("Tensor", self.linear(images.mean((2, 3))))


@pytest.mark.parametrize(("zero_grad", "held"), [(0, False), (1, True), (2, False)])
def test_the_loop_lets_go_of_gradients_when_the_published_one_did(
    zero_grad: int, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(batch: int, pixels: int, recorder: Recorder) -> tuple[Tensor, Tensor]:
        images = torch.zeros(batch, 3, pixels, pixels, device=recorder.device)
        return images, torch.zeros(batch, dtype=torch.long)

    monkeypatch.setattr(programs, "_batch", zeros)  # What is empty may be no class.
    net = Watched()
    loop = PublishedLoop(model=net, optimizer="SGD", pixels=2, zero_grad=zero_grad)
    loop(2, cast("Recorder", SimpleNamespace(device=CPU)))
    assert net.had == [False, held, held, held]
    assert (net.linear.weight.grad is None) is (zero_grad == 2)


class Constant:
    """A trace of one allocation, freed again."""

    def __init__(self, mebibytes: int) -> None:
        self.bytes = mebibytes * MIB

    def events(self, batch: int, *, workspace_bytes: int) -> list[tuple[int, int]]:
        assert (batch, workspace_bytes) == (4, find_gpu("RTX 3060").workspace_bytes)
        return [(1, self.bytes), (1, 0)]

    def allocated_bytes(self, batch: int) -> int:
        assert batch == 4
        return self.bytes


def trace(mebibytes: int) -> Trace:
    return cast("Trace", Constant(mebibytes))


def test_a_peak_is_held_against_what_was_measured_and_a_limit_against_what_became_of_it() -> None:
    findings = Findings(device=CPU)
    for mebibytes, first in ((110, True), (95, False), (50, False)):
        published._add_peak(RUN, trace(mebibytes), 2**30, findings, first=first)
    ran_out = {**LIMIT, "ran": False, "peak_bytes": None}
    for mebibytes, limit in ((98, LIMIT), (90, LIMIT), (600, LIMIT), (520, ran_out), (98, ran_out)):
        published._add_limited(RUN, limit, trace(mebibytes), 2**30, findings)
    published._sum_up(findings)

    peaks: list[Any] = findings.rows(published._PEAKS)
    assert [row["error_%"] for row in peaks] == [10.0, -4.0, -50.0]  # 95 takes 96 of the driver.
    together: list[Any] = findings.rows(published._PEAKS_ALL)
    medians = {(row["runs"], row["by"]): (row["median"], row["number"]) for row in together}
    allocator = "autobatch, allocator only"
    assert medians[published._FIRST, allocator] == (pytest.approx(10), 1)
    assert medians["all", allocator] == (pytest.approx(10), 3)
    assert medians["all", "xMem"] == (pytest.approx(10), 3)
    assert medians["under a limit", allocator] == (pytest.approx(6), 2)  # Of those that run.

    limited: list[Any] = findings.rows(published._LIMITED)
    assert [row["right"] for row in limited] == [True, True, False, True, False]
    assert [row["error_%"] for row in limited] == [-2.0, -10.0, None, None, None]
    of_need = [row["of what is needed"] for row in limited]
    expected = [512 / needed for needed in (98, 90, 600, 520, 98)]
    assert of_need == pytest.approx(expected, rel=2e-3)
    answers: list[Any] = findings.rows(published._LIMITED_ALL)
    assert [tuple(row.values())[1:] for row in answers] == [
        ("ran", 3, 2, 0, 0),
        ("ran out of memory", 2, 1, 1, 1),
    ]


def test_a_run_is_traced_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cloudpickle")
    few = {**LIMIT, "fraction": 0.001, "ran": False, "peak_bytes": None}
    told = {"gpu_total_bytes": {"RTX 3060": 2**33}, "runs": [{**RUN, "capped": [few, LIMIT]}]}
    (tmp_path / "published_runs.json").write_text(json.dumps(told))
    (tmp_path / "measured_peaks.json").write_text(json.dumps({"runs": [RUN]}))
    monkeypatch.setattr(published, "DATA", tmp_path)
    findings = Findings(device=CPU)
    published.compare(findings)
    (row,) = cast("list[Any]", findings.rows(published._PEAKS))
    assert row["run"] == "mobilenet_v3_small, SGD, 4, RTX 3060"
    assert (row["zero_grad"], row[published._FIRST], row["fits"]) == (None, True, True)
    assert 20 < row["allocated"] < row["reserved"] < 100  # Weights of 6 MiB, gradients, and more.
    limited = cast("list[Any]", findings.rows(published._LIMITED))
    assert [row["predicted"] for row in limited] == [False, True]
    assert findings.done == {"mobilenet_v3_small, SGD, zero_grad 1": [0, 1, 2]}
