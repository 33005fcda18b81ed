"""What was done is counted, and survives being written down."""

import io
import math
from collections.abc import Callable
from typing import cast

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_exact

from autobatch import StepResult
from autobatch.results.training import Evaluation
from autobatch.training.progress import DataPosition, Progress


def step(
    loss: float | Callable[[], float], examples: int = 4, replays: int = 0, *, skipped: bool = False
) -> StepResult:
    return StepResult(
        loss=cast("float", loss),
        terms=examples,
        examples=examples,
        micro_batch_sizes=(examples,),
        replays=replays,
        skipped=skipped,
        reason="overflow" if skipped else "",
    )


def evaluation(epoch: int, loss: float = 0.5) -> Evaluation:
    return Evaluation(epoch=epoch, loss=loss, metrics={"accuracy": 0.25}, examples=9)


steps = st.lists(
    st.builds(
        step,
        st.floats(-5, 5),
        st.integers(1, 9),
        st.integers(0, 2),
        skipped=st.booleans(),
    ),
    max_size=9,
)


@given(steps)
def test_steps_and_skipped_batches_are_counted_separately(done: list[StepResult]) -> None:
    progress = Progress()
    for result in done:
        progress.count(result)
    progress.read()
    taken = [result for result in done if not result.skipped]
    assert progress.losses == [result.loss for result in taken]
    assert progress.steps == len(taken)
    assert progress.examples == sum(result.examples for result in taken)
    assert progress.replays == sum(result.replays for result in done)
    assert sum(progress.skipped.values()) == len(done) - len(taken)


@given(steps, steps)
def test_the_loss_of_an_epoch_is_the_mean_of_its_own_steps(
    before: list[StepResult], done: list[StepResult]
) -> None:
    progress = Progress()
    for result in before:
        progress.count(result)
    progress.epoch_begins = progress.steps
    for result in done:
        progress.count(result)
    taken = [result for result in done if not result.skipped]
    expected = math.nan
    if taken:
        total = sum(result.loss * result.examples for result in taken)
        expected = total / sum(result.examples for result in taken)
    assert_exact(progress.epoch_loss() if taken else 0.0, expected if taken else 0.0)
    assert math.isnan(progress.epoch_loss()) is not bool(taken)


def test_a_loss_is_read_when_the_next_step_has_been_counted() -> None:
    read: list[str] = []

    def late(name: str) -> float:
        read.append(name)
        return 1.0

    progress = Progress()
    progress.count(step(lambda: late("first")))
    assert read == []
    progress.count(step(lambda: late("second")))
    assert read == ["first"]
    assert progress.losses == [1.0]
    assert progress.steps == 2
    progress.state_dict()
    assert read == ["first", "second"]


@given(steps, st.lists(st.floats(allow_nan=False), max_size=3), st.floats(0, 1e9))
def test_what_is_written_down_is_what_is_read(
    done: list[StepResult], losses: list[float], seconds: float
) -> None:
    progress = Progress(seconds=seconds, epoch_begins=len(done) // 2)
    for result in done:
        progress.count(result)
    for epoch, loss in enumerate(losses):
        progress.add_evaluation(evaluation(epoch, loss))
    file = io.BytesIO()
    torch.save(progress.state_dict(), file)
    file.seek(0)
    again = Progress.from_state_dict(torch.load(file, weights_only=True))
    assert again == progress


def test_what_is_written_down_does_not_grow_with_what_comes_after() -> None:
    progress = Progress()
    progress.count(step(1.0))
    again = Progress.from_state_dict(progress.state_dict())
    again.count(step(2.0))
    again.read()
    again.count(step(3.0, skipped=True))
    assert (again.losses, again.sizes, dict(again.skipped)) == (
        [1.0, 2.0],
        [4, 4],
        {"overflow": 1},
    )


def test_an_evaluation_takes_the_place_of_one_of_the_same_epoch() -> None:
    progress = Progress()
    for epoch, loss in [(1, 0.5), (2, 0.4), (2, 0.3), (3, 0.2)]:
        progress.add_evaluation(evaluation(epoch, loss))
    assert [(e.epoch, e.loss) for e in progress.evaluations] == [(1, 0.5), (2, 0.3), (3, 0.2)]


def test_a_position_advances_to_the_beginning_of_the_next_epoch() -> None:
    position = DataPosition(epoch=2, windows=5, random={"torch": 1})
    position.next_epoch()
    assert position == DataPosition(epoch=3)
    assert DataPosition(**cast("dict[str, int]", position.state_dict())) == position  # type: ignore[arg-type]
