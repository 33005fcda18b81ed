import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autobatch import SearchResult, SearchTimeoutError, StepInterruptedError, Trial, check
from autobatch.devices.choose import open_device
from autobatch.prediction.gpu_catalogue import custom_gpu, find_gpu
from autobatch.results import Upper
from benchmarks import holdings, holdings_speed, zoo
from benchmarks.findings import Findings
from benchmarks.holdings_beside import predicted, scan
from benchmarks.holdings_case import ON_A_GPU, ON_THE_CPU, Case, Config, allowed_bytes
from benchmarks.holdings_speed import Pool, Window, fastest_of, in_turns, ladder
from benchmarks.zoo import Subject

CPU = torch.device("cpu")
TRAIN = Config("train", "fp32", "AdamW")
FIELDS = {
    *("table", "model", "mode", "precision", "optimizer", "example", "parameters", "limit_bytes"),
    *("tolerable", "upper", "peak_allocated_bytes", "peak_reserved_bytes", "share", "trials"),
    *("out_of_memory", "search_seconds", "memory", "sizes", "fastest", "desired", "scan"),
    *("predicted", "error"),
}
SPREAD = {"median", "minimum", "maximum", "samples"}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 16), torch.randint(0, 4, (8,))


def tiny(config: Config = TRAIN, **changed: Any) -> Case:
    subject = Subject(make=mlp, sample=rows, example="16", loss=nn.CrossEntropyLoss())
    case = Case(name="tiny", subject=subject, config=config, device=CPU)
    return replace(case, **{"ceiling": 110, "room_bytes": 0, **changed})


def measured(case: Case, seconds: float = 60.0) -> dict[str, Any]:
    return holdings.measure(case, time.monotonic() + seconds)


def largest_by_hand(case: Case) -> int:
    """Every size up to the ceiling, one after another."""
    model = case.model()
    data = case.subject.data(case.ceiling)
    fits = [
        check(model, data, size, **case.asked(model)).fits for size in range(1, case.ceiling + 1)
    ]
    assert fits == sorted(fits, reverse=True), "what fits at a size fits below it"
    return sum(fits)


@pytest.mark.parametrize(
    ("config", "room_bytes"),
    [
        (TRAIN, 0),
        (Config("train", "bf16", "SGD"), 0),
        (Config("inference", "fp32", None), -85_000),
    ],
    ids=str,
)
def test_the_tolerable_batch_is_the_largest_that_fits(config: Config, room_bytes: int) -> None:
    case = tiny(config, room_bytes=room_bytes, ceiling=110)
    row = measured(case, seconds=0.0)
    truth = largest_by_hand(case)
    assert 8 < truth < case.ceiling
    assert row["tolerable"] == truth
    assert row["upper"]["size"] == truth + 1
    assert row["peak_allocated_bytes"] <= row["limit_bytes"]
    assert row["share"] == row["peak_allocated_bytes"] / row["limit_bytes"]


def test_a_row_has_the_fields_that_were_agreed() -> None:
    findings = Findings(device=CPU)
    holdings.measure_all({"tiny": tiny()}, findings, later=0)
    (row,) = json.loads(json.dumps(findings.cases, allow_nan=False))
    assert row.keys() >= FIELDS
    assert (row["table"], row["model"], row["error"]) == ("holdings", "tiny", "")
    assert (row["mode"], row["precision"], row["optimizer"]) == ("train", "fp32", "AdamW")
    assert row["parameters"] == sum(weight.numel() for weight in mlp().parameters())
    assert row["search_seconds"].keys() == SPREAD
    assert (row["scan"], row["predicted"]) == (None, None)
    assert row["trials"] == len(row["memory"])
    assert row["out_of_memory"] == sum(not one["passed"] for one in row["memory"])
    assert {"size", "peak_bytes", "passed"} == row["memory"][0].keys()
    assert [one["size"] for one in row["sizes"]] == ladder(row["tolerable"])
    for one in row["sizes"]:
        rates, seconds = one["examples_per_second"]["samples"], one["seconds"]["samples"]
        assert rates == pytest.approx([one["size"] / second for second in seconds])
    assert [one["desired"] for one in row["desired"]] == [256, 1024, 4096]
    for one in row["desired"]:
        assert one["micro_batch"] <= row["fastest"] <= row["tolerable"]
        assert one["accumulation_steps"] == math.ceil(one["desired"] / row["fastest"])
        assert one["fewest_steps"] == math.ceil(one["desired"] / row["tolerable"])
        assert 0 < one["of_best"] < 10


def test_inference_accumulates_nothing() -> None:
    row = measured(tiny(Config("inference", "fp32", None)))
    assert row["desired"] == []
    assert row["sizes"]


def test_without_time_the_search_and_what_follows_from_it_is_all_there_is() -> None:
    row = measured(tiny(), seconds=0.0)
    assert row["tolerable"] > 8
    assert (row["sizes"], row["fastest"]) == ([], None)
    steps = [math.ceil(desired / row["tolerable"]) for desired in (256, 1024, 4096)]
    assert [one["accumulation_steps"] for one in row["desired"]] == steps
    assert [one["fewest_steps"] for one in row["desired"]] == steps
    untimed = {name for one in row["desired"] for name, value in one.items() if value is None}
    assert untimed == {"seconds", "examples_per_second", "of_best"}
    assert len(row["search_seconds"]["samples"]) == 1


def test_a_model_that_fails_is_a_row_with_its_reason_and_the_next_one_is_measured() -> None:
    def fail() -> nn.Module:
        raise RuntimeError("no such layer\nand much more")

    broken = tiny()
    broken = replace(broken, name="broken", subject=replace(broken.subject, make=fail))
    small = tiny(room_bytes=-(10**6))
    cases = {"broken": broken, "small": small, "tiny": tiny()}
    findings = Findings(device=CPU)
    holdings.measure_all(cases, findings, later=0)
    first, second, third = findings.cases
    assert (first["model"], first["error"]) == ("broken", "RuntimeError: no such layer")
    assert first.keys() >= FIELDS
    assert {first[name] for name in ("tolerable", "sizes", "search_seconds", "fastest")} == {None}
    assert str(second["error"]).startswith(("DoesNotFitError", "ValueError"))
    assert third["error"] == ""
    assert findings.done.keys() == cases.keys()
    assert "no such layer" in str(findings)


def test_a_search_that_does_not_end_in_time_is_left_out_and_is_no_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holdings, "search_seconds", lambda _: 0.0)
    findings = Findings(device=CPU, deadline=time.monotonic() + 60)

    def late(*_: object, budget_seconds: float) -> dict[str, object]:
        assert 0 < budget_seconds <= 60
        raise SearchTimeoutError(3, budget_seconds)

    monkeypatch.setattr(holdings, "measure", late)
    holdings.measure_all({"tiny": tiny()}, findings, later=0)
    assert (findings.cases, findings.done) == ([], {})
    assert findings.left_out == ["tiny: no time, the search did not end"]
    assert findings.short


def test_a_case_whose_search_is_expected_to_take_too_long_does_not_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holdings, "search_seconds", {"long": 90.0, "tiny": 1.0}.__getitem__)
    cases: Any = {"long": "long", "tiny": "tiny"}

    def note(name: str, _: Case, until: float, findings: Findings) -> None:
        assert until <= findings.deadline
        findings.add("holdings", {"model": name})

    monkeypatch.setattr(holdings, "_add", note)
    findings = Findings(device=CPU, deadline=time.monotonic() + 60)
    holdings.measure_all(cases, findings, later=0)
    assert list(findings.done) == ["tiny"]
    assert findings.left_out == ["long: no time, it takes about 90 s"]


def test_the_expected_seconds_grow_with_the_memory_that_is_to_be_filled() -> None:
    some = holdings.search_seconds(tiny(ceiling=10**9, room_bytes=10**8))
    many = holdings.search_seconds(tiny(ceiling=10**9, room_bytes=10**10))
    assert 0 < 10 * some < many
    assert holdings.search_seconds(replace(tiny(), device=torch.device("meta"))) == 0


def test_every_model_comes_once_before_any_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def note(name: str, case: Case, _: float, findings: Findings) -> None:
        order.append(name)
        findings.add("holdings", {"model": case.name})

    monkeypatch.setattr(holdings, "_add", note)
    monkeypatch.setattr(holdings, "search_seconds", lambda _: 0.0)
    findings = Findings(device=CPU)
    holdings.run(findings)
    models = list(zoo.subjects(on_a_gpu=False)[0])
    assert order == [f"{name}, {config}" for config in ON_THE_CPU for name in models]
    assert len(order) == len(set(order)) == 9 * len(models)


def test_configurations_are_the_same_on_a_gpu_and_begin_with_the_most_telling() -> None:
    assert set(ON_A_GPU) == set(ON_THE_CPU)
    assert len(set(ON_A_GPU)) == 9
    assert str(ON_A_GPU[0]) == "train, bf16, AdamW"
    assert str(ON_THE_CPU[0]) == "train, fp32, AdamW"


def test_only_the_models_that_are_named_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        holdings, "measure_all", lambda cases, *_, **__: seen.extend(c.name for c in cases.values())
    )
    holdings.run(Findings(device=CPU, models=("swin_t", "resnet18")))
    assert set(seen) == {"swin_t", "resnet18"}


def test_without_time_a_configuration_is_named_once() -> None:
    findings = Findings(device=CPU, deadline=0.0, models=("swin_t", "resnet18"))
    holdings.run(findings)
    assert findings.left_out[0] == "train, fp32, AdamW: no time for swin_t, resnet18"
    assert len(findings.left_out) == 9


def test_without_transformers_gpt_2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    findings = Findings(device=CPU, deadline=0.0)
    holdings.run(findings)
    assert "LEFT OUT: gpt2: transformers not installed" in str(findings)
    assert set(zoo.subjects(on_a_gpu=True)[0]) == set(zoo.NAMES) - {"gpt2"}


def test_an_imitation_is_held_to_what_the_card_lets_an_allocator_hold() -> None:
    card = find_gpu("RTX 3060")
    case = tiny(card=card)
    assert case.imitates
    assert case.asked(case.model())["memory_limit"] == allowed_bytes(card)
    headroom_bytes = 300 * 2**20
    assert allowed_bytes(card) == card.capacity_bytes - card.context_bytes[1] - headroom_bytes
    assert not tiny().imitates
    on_a_gpu = replace(case, device=torch.device("cuda"))
    assert not on_a_gpu.imitates
    assert on_a_gpu.asked(mlp())["memory_limit"] is None


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large"])
def test_a_model_of_torchvision_is_made_and_held(name: str) -> None:
    subject = zoo.vision(name, 32, classes=10)
    assert subject.example == "3 x 32 x 32"
    case = replace(tiny(), subject=subject, ceiling=4, room_bytes=10**9)
    row = measured(case, seconds=0.0)
    assert (row["tolerable"], row["limited_by"]) == (4, "ceiling")


def test_a_gpt_2_is_held_with_its_own_loss_and_in_inference() -> None:
    pytest.importorskip("transformers")
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 32}
    subject = zoo.language(size, 8)
    for config in (TRAIN, Config("inference", "bf16", None)):
        row = measured(replace(tiny(config), subject=subject, ceiling=12), seconds=20.0)
        assert row["tolerable"] >= 1
        assert row["sizes"]


def test_values_of_a_model_are_the_same_each_time() -> None:
    first, second = (zoo.vision("resnet18", 32, classes=3).make() for _ in range(2))
    assert torch.equal(next(first.parameters()), next(second.parameters()))


@given(largest=st.integers(1, 20_000))
def test_the_ladder_has_the_largest_its_halves_and_one(largest: int) -> None:
    sizes = ladder(largest)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, largest)
    assert {largest // 2**power for power in range(15)} - {0} <= set(sizes)


def test_the_fastest_is_the_smallest_within_two_percent() -> None:
    assert fastest_of({1: 10.0, 2: 97.9, 4: 98.1, 8: 100.0}) == 4
    assert fastest_of({}) is None


def test_windows_are_timed_in_turns_and_those_that_fail_are_left_out() -> None:
    ran: list[str] = []

    def window(name: str, run: Callable[[], bool] = lambda: True, seconds: float = 0.0) -> Window:
        def noted() -> bool:
            ran.append(name)
            time.sleep(0.06)
            return run()

        return Window(examples=1, run=noted, seconds=seconds)

    def out_of_memory() -> bool:
        raise torch.OutOfMemoryError("full")

    def half_done() -> bool:
        raise StepInterruptedError("memory ran out")

    windows = {
        "a": window("a"),
        "replayed": window("replayed", lambda: False),
        "full": window("full", out_of_memory),
        "half": window("half", half_done),
        "long": window("long", seconds=1e6),
        "b": window("b"),
    }
    timed = in_turns(windows, open_device(CPU), time.monotonic() + 60)
    assert ran == ["a", "replayed", "full", "half", "b", *["a", "b"] * 5]
    assert list(timed) == ["a", "b"]
    assert [len(one.seconds) for one in timed.values()] == [5, 5]
    assert in_turns({"a": windows["a"]}, open_device(CPU), time.monotonic() - 1) == {}


def test_a_window_that_was_cut_anew_is_no_sample() -> None:
    case = tiny(Config("train", "fp32", "SGD"))
    bench = holdings_speed._Bench(case, case.model())
    assert bench.cut(12, 5, 0.0).run()
    with open_device(CPU).limited_to(2**19):  # So that memory ends, and the step is replayed.
        assert not bench.cut(2000, 2000, 0.0).run()


def test_a_pool_repeats_its_sample() -> None:
    inputs, targets = rows()
    pool = Pool((inputs, targets), CPU)
    (first, _), (again, labels) = (pool_of(pool, size) for size in (19, 3))
    assert torch.equal(first, torch.cat([inputs, inputs, inputs[:3]]))
    assert again.data_ptr() == first.data_ptr(), "a view of the same"
    assert torch.equal(labels, targets[:3])


def pool_of(pool: Pool, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = pool.first(size)
    assert isinstance(batch, tuple)
    return batch


def test_the_scan_tries_every_size_near_and_says_how_much_was_missed() -> None:
    case = tiny(device=torch.device("cuda"), ceiling=10_000)
    tried: list[int] = []

    def trial(largest: int) -> Callable[[int], Trial]:
        def run(size: int) -> Trial:
            tried.append(size)
            return Trial(size=size, fits=size <= largest)

        return run

    later = time.monotonic() + 60
    assert scan(case, trial(1000), found(1000), later) == {
        "largest": 1000,
        "found_over_largest": 1.0,
        "through": 1010,
    }
    assert tried == list(range(1001, 1011))
    missed = scan(case, trial(106), found(100), later)
    assert missed == {"largest": 106, "found_over_largest": 100 / 106, "through": 108}
    assert scan(case, trial(1000), found(1000), 0.0) is None, "no time"
    assert scan(tiny(), trial(1000), found(100), later) is None, "the meter is exact"


def test_a_card_is_predicted_and_a_meter_is_not() -> None:
    card = custom_gpu("2GiB")
    case = tiny(card=card, device=torch.device("cuda"), ceiling=64)
    later = time.monotonic() + 600
    said = predicted(case, mlp(), found(32), later)
    assert said is not None
    assert isinstance(said["tolerable_safe"], int)
    assert said["tolerable_safe"] > 32
    assert said.keys() == {"tolerable_safe", "tolerable_likely", "peak_bytes_at_found"}
    assert predicted(replace(case, device=CPU), mlp(), found(32), later) is None
    assert predicted(case, mlp(), found(32), 0.0) is None
    inference = replace(case, config=Config("inference", "fp32", None))
    assert predicted(inference, mlp(), found(32), later) is None


def found(size: int) -> SearchResult:
    return SearchResult(
        size=size,
        trials=(Trial(size=size, fits=True, peak_bytes=1),),
        ceiling=10_000,
        limit_bytes=10,
        limited_by="memory",
        upper=Upper(reason="ran out", size=size + 1),
    )
