"""The exactness tables: the law by everyone, with the engines that must be off beside it."""

import pytest
import torch

from benchmarks.exactness import suite as exactness
from benchmarks.exactness.peers import FAILURES, GRADIENTS, Engine, absent
from benchmarks.exactness.suite import FAILURE_TABLE, GRADIENT_TABLE, difference, gradient_tasks
from benchmarks.exactness.tasks import ObservedTraining
from benchmarks.harness.records import Fields, Records

CPU = torch.device("cpu")
TASKS = gradient_tasks(CPU)
SUM_BY_HAND = "accelerate, its recipe by hand", "transformers, model takes num_items_in_batch"
OTHERS = {"accelerate", "lightning", "transformers"}


def engine(table: str, by: str) -> Engine:
    package, made = (GRADIENTS if table == GRADIENT_TABLE else FAILURES)[by]
    if absent(package):
        pytest.skip(f"{package} is not installed")
    return made


@pytest.mark.parametrize("case", TASKS)
def test_autobatch_takes_the_undivided_step_and_the_usual_loop_does_not(case: str) -> None:
    ours, control = (GRADIENTS[by][1] for by in ("autobatch", "mean of means, by hand"))
    assert difference(ours, TASKS[case]) < 1e-12 < 0.01 < difference(control, TASKS[case])


@pytest.mark.parametrize("by", ["accelerate, accumulate()", "Lightning"])
def test_a_mean_of_means_is_what_peers_take_by_default(by: str) -> None:
    task = TASKS["samples, 10 by 4"]
    control = difference(GRADIENTS["mean of means, by hand"][1], task)
    assert difference(engine(GRADIENT_TABLE, by), task) == pytest.approx(control, rel=1e-9)


@pytest.mark.parametrize("by", SUM_BY_HAND)
def test_a_peer_that_is_told_the_count_of_terms_is_exact(by: str) -> None:
    for case in ("tokens, 8 by 3", "sum loss, 10 by 4", "short last batch, 8 of 12 by 4"):
        assert difference(engine(GRADIENT_TABLE, by), TASKS[case]) < 1e-12


def test_transformers_counts_the_micro_batches_of_a_short_last_step_but_not_their_terms() -> None:
    made = engine(GRADIENT_TABLE, "transformers, any model")
    assert difference(made, TASKS["short last batch, 8 of 12 by 4"]) < 1e-12
    assert difference(made, TASKS["samples, 10 by 4"]) > 0.01


def outcomes(by: str) -> dict[str, Fields]:
    package, _ = FAILURES[by]
    return exactness._outcomes(package, engine(FAILURE_TABLE, by), CPU)


def test_autobatch_goes_on_as_if_memory_had_not_run_out() -> None:
    for what, row in outcomes("autobatch").items():
        assert (row["outcome"], row["steps"]) == ("goes on", 3), what
        off = row["parameters off by"]
        assert isinstance(off, float)
        assert off < 1e-12, what


@pytest.mark.parametrize("by", ["plain loop", "Lightning"])
def test_who_has_no_answer_to_a_failure_ends_after_one_step(by: str) -> None:
    for row in outcomes(by).values():
        assert (row["outcome"], row["steps"]) == ("ends: OutOfMemoryError", 1)


@pytest.mark.parametrize("by", ["accelerate, model outside", "transformers, auto_find_batch_size"])
def test_who_starts_again_from_a_moved_model_ends_elsewhere(by: str) -> None:
    for row in outcomes(by).values():
        assert row["outcome"] == "goes on"
        assert isinstance(steps := row["steps"], int)
        assert isinstance(off := row["parameters off by"], float)
        assert steps > 3
        assert off > 0.01


def test_a_failure_that_never_came_is_said() -> None:
    def idle(training: ObservedTraining) -> None:
        _, optimizer = training.begin()
        optimizer.step()

    calm = ObservedTraining(TASKS["samples, 10 by 4"])
    idle(calm)
    assert exactness.outcome(idle, "never", calm)["outcome"] == "memory did not run out"


def test_an_absent_peer_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "absent", lambda package: package in OTHERS)
    records = Records(device=CPU)
    exactness.run(records)
    gradients, failures = (records.tables[title] for title in (GRADIENT_TABLE, FAILURE_TABLE))
    assert [row["by"] for row in gradients] == list(GRADIENTS)
    for row in gradients[2:]:
        assert set(row.values()) == {row["by"], "not installed"}
    told = {str(row["by"]): row["outcome"] for row in failures}
    assert list(told) == list(FAILURES)
    assert [by for by, outcome in told.items() if outcome == "not installed"] == list(FAILURES)[2:]
