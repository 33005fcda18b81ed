"""Predictions for a GPU that is not here: what they say, and what they leave alone."""

import copy
import functools
import inspect
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from states import fingerprint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch import BatchPlan, DoesNotFitError, SearchOptions, predict
from autobatch.prediction import fake_cuda, tracing_worker
from autobatch.prediction import traced_step as module
from autobatch.prediction.gpu_catalogue import Gpu, custom_gpu
from autobatch.prediction.result import Prediction
from autobatch.prediction.tracing_worker import TracingRequest, TracingResult
from autobatch.units import format_bytes

CARD = custom_gpu("3GiB")
SMALL = custom_gpu("2GiB")
IMAGES = torch.zeros(16, 3, 64, 64), torch.zeros(16, dtype=torch.long)


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, 10),
    )


@pytest.fixture(scope="module")
def found() -> Prediction:
    return predict(cnn(), IMAGES, gpu=[CARD, SMALL, "T4"], desired=1000)


def test_the_tolerable_batch_is_the_last_that_fits(found: Prediction) -> None:
    context = CARD.context_bytes[1]
    headroom = 300 * 2**20
    limit = CARD.capacity_bytes - context - headroom
    assert found.peak_allocated_bytes <= found.peak_reserved_bytes <= limit
    assert found.peak_bytes(found.tolerable + found.tolerable // 2) > limit
    assert 1 < found.tolerable < found.largest
    assert found.plan == BatchPlan(desired=1000, tolerable=found.tolerable)


def test_the_peak_grows_with_the_batch(found: Prediction) -> None:
    peaks = [found.peak_bytes(batch) for batch in (1, 2, 10, 100, 100_000)]
    assert peaks == sorted(set(peaks))
    assert found.peak_bytes(found.size) == pytest.approx(found.peak_allocated_bytes, rel=0.01)


def test_the_breakdown_adds_up_to_the_card(found: Prediction) -> None:
    parts = found.breakdown
    assert parts.total_bytes == parts.needed_bytes == CARD.capacity_bytes
    assert parts.outside_bytes == CARD.context_bytes[1]
    assert parts.parameter_bytes == sum(-(-p.nbytes // 512) * 512 for p in cnn().parameters())
    assert parts.optimizer_state_bytes == 2 * parts.parameter_bytes
    held = found.peak_allocated_bytes + parts.cached_bytes
    assert held == found.peak_reserved_bytes
    assert parts.activation_bytes > 0.9 * found.peak_allocated_bytes
    assert found.at_peak.phase in {"forward", "backward"}


def test_what_would_allow_more(found: Prediction) -> None:
    allowed = {what_if.change: what_if.tolerable for what_if in found.what_ifs}
    assert allowed.keys() == {
        *("expandable segments", "fused AdamW", "SGD with momentum", "bf16"),
    }
    assert allowed["bf16"] > 1.3 * found.tolerable
    assert allowed["fused AdamW"] >= found.tolerable
    assert allowed["SGD with momentum"] >= found.tolerable


def test_several_gpus_are_predicted_from_the_same_traces(found: Prediction) -> None:
    small, turing = found.others
    assert small.tolerable < found.tolerable < turing.tolerable
    assert turing.gpu.name == "T4"
    assert "bf16" not in {what_if.change for what_if in turing.what_ifs}
    assert small.peak_bytes(5) == found.peak_bytes(5)


def test_a_search_takes_the_safe_end_as_its_first_guess(found: Prediction) -> None:
    guess = SearchOptions(prior=found).first_guess
    assert guess == found.prior
    assert guess.tolerable == found.tolerable
    for batch, peak_bytes in guess.peaks:
        assert peak_bytes == found.peak_bytes(batch)
    expected = found.peak_bytes(4)
    assert guess.corrected(4, expected, guess.limit_bytes) == found.tolerable
    unseen = found.peak_bytes(found.tolerable) - found.peak_bytes(found.tolerable // 2)
    halved = guess.corrected(4, expected + unseen, guess.limit_bytes)
    assert abs(halved - found.tolerable // 2) <= 1
    at_most = guess.limit_bytes * found.peak_bytes(halved) // found.peak_bytes(found.tolerable)
    assert guess.corrected(4, expected, at_most + 2**20) in (halved, halved + 1)
    bound = predict(cnn(), IMAGES, gpu=CARD, ceiling=7).prior
    assert bound.corrected(4, expected, guess.limit_bytes) == 7


def test_it_prints_what_matters(found: Prediction) -> None:
    text = str(found)
    assert f"3.0 GiB, fp32: tolerable batch {found.tolerable} to {found.largest}" in text
    assert str(found.plan) in text
    assert f"in {found.at_peak.phase}" in text
    assert "what if bf16: " in text
    assert "T4, fp32: tolerable batch " in text


def test_nothing_is_touched() -> None:
    model = cnn().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(IMAGES[0][:2]).sum().backward()
    optimizer.step()
    before, twin = fingerprint(model, optimizer), copy.deepcopy(optimizer.state_dict())
    prediction = predict(model, IMAGES, gpu=CARD, optimizer=optimizer, precision="bf16")
    assert fingerprint(model, optimizer) == before
    assert twin["param_groups"] == optimizer.state_dict()["param_groups"]
    assert not model.training
    changes = {what_if.change for what_if in prediction.what_ifs}
    assert changes == {"expandable segments", "fused SGD"}


def test_what_does_not_fit_is_told_with_a_way_out() -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(28)))  # 448 MiB.
    data = torch.zeros(4, 2048), torch.zeros(4, 2048)
    with pytest.raises(DoesNotFitError, match=r"SGD with momentum would allow \d+") as raised:
        predict(model, data, gpu=replace(SMALL, context_bytes=(0, 0)))
    assert raised.value.size == 1
    assert raised.value.breakdown_bytes["parameters"] > 448 * 2**20
    told = raised.value.breakdown
    assert told is not None
    assert told.total_bytes == SMALL.capacity_bytes == raised.value.limit_bytes
    first, *_, last = str(raised.value).splitlines()
    missing, needed = format_bytes(told.missing_bytes), format_bytes(told.needed_bytes)
    start = f"a batch of 1 does not fit in 2.0 GiB (2.0 GiB): it needs at least {missing} more; "
    assert first.startswith(start), "one limit and one shortfall"
    assert last == f"  a GPU with more memory: at least {needed} in all"
    for absent in ("memory_limit", "headroom", "failure"):
        assert absent not in str(raised.value), "predict knows no such thing"
    copied = pickle.loads(pickle.dumps(raised.value))
    assert str(copied) == str(raised.value)


class Parting(nn.Module):
    """Takes another way above 12 examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out.exp().log() if len(x) > 12 else out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TracingRequest]:
    """Requests, traced in this process as on the CPU, which is the fall-back too, and quick."""
    seen: list[TracingRequest] = []

    def here(parts: list[list[TracingRequest]]) -> list[TracingResult]:
        seen.extend(request for part in parts for request in part)
        return [tracing_worker.trace_requests(part) for part in parts]

    monkeypatch.setattr(fake_cuda, "works", lambda: False)
    monkeypatch.setattr(module, "trace_in_processes", here)
    return seen


def test_a_step_that_batches_take_differently_is_traced_at_each(
    asked: list[TracingRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST", 64)
    data = torch.zeros(16, 64), torch.zeros(16, dtype=torch.long)
    sgd = functools.partial(torch.optim.SGD, lr=0.1, fused=True)
    found = predict(Parting(), data, gpu=CARD, optimizer=sgd, precision="bf16")
    assert found.tolerable == 64
    assert {request.batches for request in asked} >= {(64,), (6, 9, 33)}
    assert any("different ways" in note for note in found.notes)
    assert any("traced as on the CPU" in note for note in found.notes)
    before = len(asked)
    assert 33 in [batch for batch, _ in found.curve(40)]
    assert len(asked) == before, "a picture costs no trace"


WIDE = torch.zeros(20, 2**20), torch.zeros(20, 2)  # 4 MiB an example.
sgd = functools.partial(torch.optim.SGD, lr=0.1, fused=True)


def wide(data: Any, **arguments: Any) -> Prediction:
    net = nn.Linear(2**20, 2)
    return predict(net, data, gpu=CARD, optimizer=sgd, precision="bf16", **arguments)


@pytest.mark.usefixtures("asked")
def test_a_data_set_bounds_what_is_tolerable_and_a_sample_does_not() -> None:
    free = wide(WIDE)
    assert free.tolerable > 20
    assert free.limited_by == "memory"
    said = f"memory alone would allow {free.tolerable} to {free.largest}"
    for data in (TensorDataset(*WIDE), DataLoader(TensorDataset(*WIDE), batch_size=5)):
        found = wide(data)
        assert (found.tolerable, found.largest, found.limited_by) == (20, 20, "data")
        assert found.notes[0] == f"the data holds 20; {said}"
        assert found.what_ifs == free.what_ifs, "of memory alone"
    assert wide([WIDE]).tolerable == free.tolerable
    few = wide(TensorDataset(*WIDE), ceiling=7, desired=14)
    assert (few.tolerable, few.largest, few.limited_by, few.size) == (7, 7, "ceiling", 7)
    assert few.notes[0] == f"the ceiling is 7; {said}"
    assert few.plan == BatchPlan(desired=14, tolerable=7)
    more = wide(TensorDataset(*WIDE), desired=4096)
    assert more.plan == wide(WIDE, desired=4096).plan, "no step of 20 is what is desired"


@pytest.mark.usefixtures("asked")
def test_of_several_cards_each_has_its_notes_and_what_all_note_comes_last() -> None:
    net, cards = nn.Linear(2**20, 2), ["T4", "RTX 3060", "RTX 4090"]
    found = predict(net, TensorDataset(*WIDE), gpu=cards, optimizer=sgd, precision="bf16")
    lines = found.lines.splitlines()
    assert [line for line in lines if not line.startswith((" ", "note"))] == [
        each.line for each in (found, *found.others)
    ]
    slow = next(place for place, line in enumerate(lines) if "no bfloat16" in line)
    assert lines[slow].startswith("  note: T4")
    assert slow < lines.index(found.others[0].line)
    [common] = [place for place, line in enumerate(lines) if "traced as on the CPU" in line]
    assert common > lines.index(found.others[-1].line)
    assert set(found.notes) <= {line.removeprefix("  ").removeprefix("note: ") for line in lines}


class Curious(nn.Module):
    """Wants to know values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.mean() > 0:
            x = x * x.std().item()
        out: torch.Tensor = self.inner(x)
        return out


@pytest.mark.usefixtures("asked")
def test_what_was_guessed_is_told_with_its_line() -> None:
    data = torch.zeros(4, 8), torch.zeros(4, 2)
    found = predict(Curious(), data, gpu=CARD, optimizer=sgd, precision="bf16")
    lines, first = inspect.getsourcelines(Curious)
    asks = first + next(n for n, line in enumerate(lines) if "if x.mean()" in line)
    start = "the step needs a value that is not known; guessed: "
    assert {
        f"{start}a condition holds at test_predict.py:{asks}, 2 times",
        f"{start}a value of float32 is 1 at test_predict.py:{asks + 1}, 2 times",
    } <= set(found.notes)


class Fussy(nn.Module):
    """A block that refuses to be run again in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError("not again")
        out: torch.Tensor = self.inner(x)
        return out


@pytest.mark.usefixtures("asked")
def test_what_else_a_step_could_be_ends_nothing_where_it_fails() -> None:
    data = torch.zeros(4, 8), torch.zeros(4, 8)
    net = nn.Sequential(Fussy(), Fussy())
    found = predict(net, data, gpu=CARD, optimizer=sgd, precision="bf16")
    assert [what_if.change for what_if in found.what_ifs] == ["expandable segments"]
    assert "activation checkpointing was not tried: the step fails with it" in found.notes


def test_a_forward_pass_needs_neither_gradients_nor_state() -> None:
    """A net whose peak is known: two layers' outputs, and the input while it is used."""
    net = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 512)).train()
    data = torch.zeros(4, 256), torch.zeros(4, dtype=torch.long)
    found = predict(net, data, gpu=["T4", "L4"], mode="inference")
    assert net.training
    assert found.line.startswith("T4, fp32, inference: tolerable batch ")
    assert found.breakdown.gradient_bytes == found.breakdown.optimizer_state_bytes == 0
    batch = 2**16
    fixed = sum(-(-p.nbytes // 512) * 512 for p in net.parameters()) + found.gpu.workspace_bytes
    row_bytes = 8 + 4 * (256 + 1024 + 1024)  # Targets are sent too, as in a search.
    assert found.peak_bytes(batch) == fixed + batch * row_bytes
    (ampere,) = found.others
    assert [what_if.change for what_if in ampere.what_ifs] == ["expandable segments", "bf16"]


def test_it_is_drawn_into_a_file(found: Prediction, tmp_path: Path) -> None:
    picture = tmp_path / "peak.png"
    for drawn in (found, replace(found, others=())):
        assert drawn.plot(picture).axes
        assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.png, \.svg or \.pdf, got .*peak\.txt"):
        found.plot(tmp_path / "peak.txt")
    batches, peaks = zip(*found.curve(1000), strict=True)
    assert (batches[0], batches[-1]) == (1, 1000)
    assert list(peaks) == sorted(peaks)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gpu": "RTX 4091"}, ValueError, "RTX 4091"),
        ({"gpu": []}, TypeError, r"gpu must be a name .* got \[\]"),
        ({"gpu": 24}, TypeError, "got 24"),
        ({"gpu": CARD, "mode": "test"}, ValueError, "mode must be .* got 'test'"),
        ({"gpu": CARD, "mode": "inference", "desired": 8}, ValueError, "pass ceiling=8"),
        ({"gpu": CARD, "ceiling": 0}, ValueError, "ceiling must be at least 1, got 0"),
        ({"gpu": CARD, "desired": 0}, ValueError, "desired must be at least 1, got 0"),
        ({"gpu": CARD, "precision": "fp8"}, ValueError, "precision must be"),
        ({"gpu": CARD, "data": iter([IMAGES])}, TypeError, "one-pass"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_traced(
    arguments: dict[str, object],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "trace_in_processes", lambda _: pytest.fail("traced"))
    with pytest.raises(error, match=message):
        predict(cnn(), **{"data": IMAGES, **arguments})  # type: ignore[arg-type]


def test_a_gpu_of_one_s_own_is_a_value() -> None:
    assert isinstance(CARD, Gpu)
    assert CARD.capacity_bytes == 3 * 2**30
