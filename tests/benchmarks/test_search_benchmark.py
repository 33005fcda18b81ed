import gc
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from benchmarks import __main__ as command
from benchmarks.harness.records import Records
from benchmarks.harness.timing import Samples
from benchmarks.search import peers as search_peers
from benchmarks.search import suite as search
from benchmarks.search import workloads
from benchmarks.search.measure import (
    OURS,
    SearchMeasurement,
    Tried,
    largest_by_hand,
    largest_possible,
    measure_search,
)
from benchmarks.search.peers import PEERS, SearchTask
from benchmarks.search.workloads import SearchWorkload

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "found", "attempts"),
    [
        ("doubling", 37, 11),
        ("accelerate", 36, 19),
        ("lightning power", 32, 6),
        ("lightning binsearch", 37, 11),
        ("toma", 32, 4),
        ("torch-max-mem", 32, 4),
    ],
)
def test_others_find_what_their_algorithm_can(name: str, found: int, attempts: int) -> None:
    if name not in search_peers.installed():
        pytest.skip(f"{name} is not installed")
    model, tried = nn.Linear(1, 1), []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > 37:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    _, find = PEERS[name]
    with search.light_heap():
        result = find(SearchTask(attempt, 256, model, SGD(model.parameters())))
    assert (result, len(tried)) == (found, attempts)


def test_a_quick_run_has_a_row_for_everyone_and_holds_everyone_to_one_limit(tmp_path: Path) -> None:
    asked = ["search", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    (file,) = tmp_path.glob("cpu-*/search.json")
    cases = json.loads(file.read_text())["cases"]
    rows = {(case["case"], case["by"]): case for case in cases if "case" in case}
    names = dict.fromkeys(name for name, _ in rows)
    assert len(names) == 3 + 1
    assert list(rows) == [(name, by) for name in names for by in (OURS, *PEERS)]
    for name in names:
        ours, doubling = rows[name, OURS], rows[name, "doubling"]
        assert (ours["found"], ours["runs"], ours["unchanged"]) == (ours["possible"], True, True)
        assert (doubling["found"], doubling["runs"]) == (doubling["possible"], True)
        assert doubling["possible"] == pytest.approx(ours["possible"], abs=1)
        assert not doubling["unchanged"]
    assert {case["found"] for case in rows.values() if case.get("error")} == set()
    verdicts = [case["verdict"] for case in cases if "verdict" in case]
    assert len(verdicts) == 4 + 11
    assert set(verdicts) <= {"held", "NOT held"}


def test_who_is_not_installed_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_peers, "installed", lambda: ["doubling"])
    monkeypatch.setattr(search, "real_models", lambda _: ({}, {"a model": "a package"}))
    records = Records(device=CPU, quick=True)
    search.run(records)
    told = {case["by"]: case["found"] for case in records.cases if "case" in case}
    absent = dict.fromkeys((*PEERS, "a package"), "not installed")
    assert told == absent | {OURS: 7, "doubling": 7}
    assert gc.get_freeze_count() == 0


def test_a_model_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    everything, none = workloads.real_models(CPU)
    assert (len(everything), none) == (18, {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    present, missing = workloads.real_models(CPU)
    assert set(missing.values()) == {"transformers"}
    assert {*present, *missing} == {*everything}
    assert len(missing) == 3


def test_the_truth_is_the_same_wherever_it_is_looked_for() -> None:
    workload = _with_state()
    truth = largest_possible(workload, 0)
    assert 20 < truth < workload.ceiling
    assert {largest_possible(workload, found) for found in (2, truth, truth + 1)} == {truth}
    by_hand = largest_by_hand(workload, truth)
    assert abs(by_hand - truth) <= 1
    assert {largest_by_hand(workload, truth + near) for near in (-5, 5)} == {by_hand}


def test_a_size_that_never_ran_beside_the_optimizer_s_state_is_worth_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload = _with_state()
    truth = largest_possible(workload, 0)
    monkeypatch.setitem(PEERS, "other", ("torch", _from(truth + 300)))
    by_hand = largest_by_hand(workload, truth)
    done = replace(measure_search("other", workload, 1), possible=by_hand)
    assert done.tried[-1] == (done.found, True, done.tried[-1].seconds)
    assert truth < done.found < truth + 300
    assert (done.runs, done.share) == (False, 0)
    assert largest_by_hand(workload, done.found) == by_hand


@pytest.mark.parametrize(
    ("search_of_others", "error", "attempts"),
    [
        (lambda task: _forever(task.attempt), "TimeoutError", 500),
        (lambda task: task.attempt(100), "OutOfMemoryError", 1),
    ],
)
def test_a_search_that_does_not_end_or_raises_has_found_nothing(
    search_of_others: Callable[[SearchTask], int],
    error: str,
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PEERS, "other", ("torch", search_of_others))
    workload = workloads.black_boxes(CPU)["K = 3, ceiling 256"]
    result = measure_search("other", workload, 1)
    assert (result.found, len(result.tried), result.share) == (0, attempts, 0)
    assert error in result.error
    assert search._row(result)["found"] == "an error"


def test_passes_outside_trials_count_and_repeats_only_add_seconds() -> None:
    workload = workloads.black_boxes(CPU)["K = 37, ceiling 256"]
    once, twice = measure_search(OURS, workload, 1), measure_search(OURS, workload, 2)
    assert once.forwards > 2 * sum(trial.fits for trial in once.tried)
    assert once.examples > 2 * sum(trial.size for trial in once.tried if trial.fits)
    assert (once.forwards, once.out_of_memory) == (twice.forwards, twice.out_of_memory)
    assert (len(once.seconds), len(twice.seconds), len(twice.cost_seconds)) == (1, 2, 2)


def test_cost_is_in_trial_steps_at_the_found_size() -> None:
    done = _measurement([(4, True), (20, False), (10, True)], examples=8 + 20 + 20, seconds=6.0)
    assert done.cost_examples == 48 / 20
    assert _measurement([], examples=0, found=0).cost_examples is None


def test_all_that_is_wanted_can_be_held() -> None:
    ours = [_measurement([(4, True), (9, True), (10, True)])] * 2
    others = {"slow": [_measurement([(size, True) for size in range(1, 11)], cost=5.0)] * 2}
    lines = search.verdicts({OURS: ours, **others}, 2, on_boxes=False)
    assert {line["verdict"] for line in lines} == {"held"}
    assert len(lines) == 11


_GOOD = [(4, True), (9, True), (10, True)]


@pytest.mark.parametrize(
    ("ours", "other", "wanted"),
    [
        ({"found": 9}, {}, "finds the largest in all 1"),
        ({"found": 11}, {}, "finds the largest in all 1"),
        ({"tried": [(2, True), *_GOOD]}, {}, "trials, median <= 3"),
        ({"tried": [(11, False), *_GOOD[1:]]}, {}, "out of memory, median <= 0"),
        ({"tried": [(11, False), *_GOOD[1:]]}, {}, "out of memory, mean <= 0.5"),
        ({"cost": 2.6}, {}, "trial steps in seconds, median <= 2.5"),
        ({"cost": 2.0}, {"cost": 1.9}, "no one cheaper in seconds, median"),
        ({"cost": 2.0}, {"cost": 1.9}, "no one cheaper in seconds where the largest is found"),
        ({"found": 11, "cost": 0.1}, {}, "trial steps in seconds, median <= 2.5"),
        ({"examples": 41}, {}, "trial steps in examples, median <= 2"),
        ({"examples": 38}, {"examples": 36}, "no one cheaper in examples, median"),
        ({}, {"tried": _GOOD[1:]}, "no one who finds all with fewer trials"),
        (
            {"tried": [(11, False), *_GOOD[1:]]},
            {"tried": [(1, True), *_GOOD]},
            "no one who finds all with fewer out of memory",
        ),
    ],
)
def test_each_thing_that_is_wanted_can_be_missed(
    ours: dict[str, Any], other: dict[str, Any], wanted: str
) -> None:
    slow: dict[str, Any] = {"tried": [(size, True) for size in range(2, 11)] + [(11, False)] * 3}
    slow |= {"cost": 9.0, "examples": 900}
    measurements = {
        OURS: [_measurement(**({"tried": _GOOD} | ours))],
        "other": [_measurement(**(slow | other))],
    }
    lines = {line["wanted"]: line for line in search.verdicts(measurements, 1, on_boxes=False)}
    assert lines[wanted]["verdict"] == "NOT held"


def test_fewer_cases_than_there_are_hold_nothing_and_a_worse_search_is_no_rival() -> None:
    ours = [_measurement(_GOOD)]
    others = {"worse": [_measurement([(5, True)], found=5)]}
    lines = search.verdicts({OURS: ours, **others}, 14, on_boxes=True)
    assert [(line["measured"], line["verdict"]) for line in lines] == [
        ("1 of 1", "NOT held"),
        ("0", "held"),
        ("3; no one else", "held"),
        ("0; no one else", "held"),
    ]


def test_who_finds_less_or_too_much_is_no_rival_in_a_case_though_cheaper() -> None:
    for found in (9, 11):
        others = {
            "other": [_measurement(_GOOD, found=found, cost=0.1), _measurement(_GOOD, cost=5.0)]
        }
        lines = search.verdicts({OURS: [_measurement(_GOOD)] * 2, **others}, 2, on_boxes=False)
        rivals = next(line for line in lines if "largest is found" in str(line["wanted"]))
        assert (rivals["measured"], rivals["verdict"]) == ("0 of 1 such finds", "held")


def test_more_than_43_failures_in_the_boxes_are_too_many() -> None:
    for failures, verdict in ((43, "held"), (44, "NOT held")):
        ours = [_measurement([*[(11, False)] * failures, (10, True)])]
        lines = search.verdicts({OURS: ours}, 1, on_boxes=True)
        assert lines[1]["verdict"] == verdict


def _measurement(
    tried: Sequence[tuple[int, bool]],
    *,
    found: int = 10,
    examples: int = 30,
    seconds: float = 1.0,
    cost: float = 2.0,
) -> SearchMeasurement:
    return SearchMeasurement(
        found=found,
        tried=[Tried(size, fits, 0.5) for size, fits in tried],
        forwards=2 * len(tried),
        examples=examples,
        out_of_memory=sum(not fits for _, fits in tried),
        seconds=Samples([seconds]),
        cost_seconds=Samples([cost]),
        unchanged=True,
        possible=10,
    )


def _with_state() -> SearchWorkload:
    """An MLP with Adam, whose state is as large as the activations."""
    return next(iter(workloads.real_models(CPU)[0].values()))


def _from(start: int) -> Callable[[SearchTask], int]:
    """A search from above, one less at a time."""

    def find(task: SearchTask) -> int:
        size = start
        while not _ran(task.attempt, size):
            size -= 1
        return size

    return find


def _ran(attempt: Callable[[int], None], size: int) -> bool:
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        return False
    return True


def _forever(attempt: Callable[[int], None]) -> int:
    while True:
        attempt(1)
