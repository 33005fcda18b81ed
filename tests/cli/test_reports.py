import json
import math

import pytest

from autobatch.cli.reports import Journal, search_fields, training_fields
from autobatch.events import EpochEnded, Event, StepEnded, TrainingStarted
from autobatch.results.plan import BatchPlan
from autobatch.results.search import OtherProcess, SearchResult, Trial, Upper
from autobatch.results.training import StepResult, TrainingResult
from autobatch.results.verdict import Verdict
from autobatch.units import count

PLAN = BatchPlan(desired=10, tolerable=4)
SEARCH = SearchResult(
    size=4,
    trials=(
        Trial(size=4, fits=True, peak_bytes=90, seconds=0.5),
        Trial(size=5, fits=False, failure=Verdict.TOO_LARGE, message="too many elements"),
    ),
    ceiling=10,
    limit_bytes=100,
    limited_by="kernel",
    upper=Upper(reason="ran out", size=5),
    others=(OtherProcess(pid=7, used_bytes=None), OtherProcess(pid=8, used_bytes=9)),
)


def step(loss: float, *, epoch: int = 1, skipped: bool = False) -> StepEnded:
    done = StepResult(
        loss=loss, terms=10, examples=10, micro_batch_sizes=(4, 3, 3), skipped=skipped
    )
    return StepEnded(step=done, epoch=epoch, plan=PLAN)


def journal(*events: Event) -> Journal:
    kept = Journal()
    for event in (TrainingStarted(plan=PLAN, steps=None, epochs=2), *events):
        kept(event)
    return kept


def test_a_search_survives_json() -> None:
    fields = json.loads(json.dumps(search_fields(SEARCH), allow_nan=False))
    assert fields["upper"] == {"reason": "ran out", "size": 5, "bytes": None}
    assert (fields["size"], fields["limited_by"], fields["peak_bytes"]) == (4, "kernel", 90)
    assert fields["trials"][1]["failure"] == "too_large"
    assert fields["trials"][0]["failure"] is None
    assert fields["others"] == [{"pid": 7, "used_bytes": None}, {"pid": 8, "used_bytes": 9}]


def test_a_training_survives_json_and_a_loss_that_is_no_number_is_null() -> None:
    result = TrainingResult(
        plan=PLAN,
        search=SEARCH,
        losses=(1.0, math.nan, math.inf),
        epochs=1,
        examples=30,
        seconds=2.0,
        notes=("a note",),
    )
    fields = json.loads(json.dumps(training_fields(result), allow_nan=False))
    assert fields["losses"] == [1.0, None, None]
    assert (fields["steps"], fields["examples_per_second"]) == (3, 15.0)
    assert (fields["plan"]["micro_batch_sizes"], fields["notes"]) == ([4, 3, 3], ["a note"])


def test_skipped_steps_are_not_counted_as_done() -> None:
    kept = journal(step(0.5), step(math.nan, skipped=True))
    assert (kept.steps, kept.examples, kept.last_loss) == (1, 10, 0.5)
    assert str(kept) == "in epoch 1 of 2, after 1 optimizer step (10 examples): last loss 0.5000"


def test_between_two_epochs_the_next_one_counts_but_none_after_the_last() -> None:
    ends = [EpochEnded(epoch=epoch, loss=0.5, examples_per_second=1) for epoch in (1, 2)]
    assert str(journal(step(0.5), ends[0])).startswith("in epoch 2 of 2")
    assert str(journal(step(0.5), *ends)).startswith("in epoch 2 of 2")


def test_what_was_done_survives_json() -> None:
    fields = json.loads(json.dumps(journal(step(math.nan)).fields, allow_nan=False))
    assert fields == {"trials": [], "steps": 1, "examples": 10, "last_loss": None}


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 classes"), (1, "1 class"), (10, "10 classes")]
)
def test_nouns_follow_their_numbers(number: int, words: str) -> None:
    assert count(number, "class", "classes") == words
