"""Steps, epochs, evaluations, schedules and checkpoints, each at the right moment."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference import assert_exact, small_model
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from autobatch import StepInterruptedError, StepResult, find_and_train
from autobatch.events import (
    EpochEnded,
    Evaluated,
    Event,
    StepEnded,
    TrainingStarted,
)


def rows(examples: int = 42, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def names_of(events: list[Event]) -> list[str]:
    """The events of training, by name."""
    kinds = (StepEnded, EpochEnded, Evaluated)
    return [type(event).__name__ for event in events if isinstance(event, kinds)]


def test_on_step_receives_every_result_in_order() -> None:
    steps: list[StepResult] = []
    events: list[Event] = []
    result = find_and_train(
        small_model(), rows(), 16, epochs=2, on_step=steps.append, progress=events.append
    )
    assert [step.loss for step in steps] == list(result.losses)
    assert [step.examples for step in steps] == [16, 16, 10] * 2
    assert steps == [event.step for event in events if isinstance(event, StepEnded)]


def test_on_step_receives_a_skipped_step_too() -> None:
    steps: list[StepResult] = []
    x, y = rows(32)
    masked = torch.full_like(y, -100)
    result = find_and_train(
        small_model(), [(x, masked), (x, y)], 32, on_step=steps.append, progress=False
    )
    assert [step.skipped for step in steps] == [True, False]
    assert result.steps == 1


def test_an_error_of_on_step_passes_through_untouched() -> None:
    error = LookupError("mine")

    def fail(_: StepResult) -> None:
        raise error

    with pytest.raises(LookupError) as caught:
        find_and_train(small_model(), rows(), 16, on_step=fail, progress=False)
    assert caught.value is error


def test_an_evaluation_is_reported_after_its_epoch() -> None:
    events: list[Event] = []
    result = find_and_train(
        small_model(), rows(), 16, epochs=2, eval_data=rows(20), progress=events.append
    )
    assert names_of(events) == [*["StepEnded"] * 3, "EpochEnded", "Evaluated"] * 2
    evaluations = [event.evaluation for event in events if isinstance(event, Evaluated)]
    assert evaluations == list(result.evaluations)
    ends = [event for event in events if isinstance(event, EpochEnded)]
    assert [end.epoch for end in ends] == [1, 2]
    assert all(end.examples_per_second > 0 for end in ends)
    second = [loss * size for loss, size in zip(result.losses[3:], (16, 16, 10), strict=True)]
    assert_exact(ends[1].loss, sum(second) / 42)


def test_an_epoch_that_max_steps_ended_is_evaluated_and_saved(tmp_path: Path) -> None:
    events: list[Event] = []
    result = find_and_train(
        small_model(),
        rows(),
        16,
        epochs=3,
        max_steps=4,
        eval_data=rows(20),
        checkpoint_dir=tmp_path,
        progress=events.append,
    )
    assert [evaluation.epoch for evaluation in result.evaluations] == [1, 2]
    assert names_of(events)[-3:] == ["StepEnded", "EpochEnded", "Evaluated"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003.pt",
        "step-00000004.pt",
    ]
    [started] = [event for event in events if isinstance(event, TrainingStarted)]
    assert started.steps == 4


@pytest.mark.parametrize(("max_steps", "stepped"), [(None, 2), (4, 1), (2, 0)])
def test_a_schedule_by_epochs_steps_after_whole_epochs(max_steps: int | None, stepped: int) -> None:
    optimizer = torch.optim.SGD((model := small_model()).parameters(), lr=1.0)
    find_and_train(
        model,
        rows(),
        16,
        epochs=2,
        max_steps=max_steps,
        optimizer=optimizer,
        scheduler=StepLR(optimizer, 1, gamma=0.5),
        scheduler_interval="epoch",
        progress=False,
    )
    assert optimizer.param_groups[0]["lr"] == 0.5**stepped


class Noted(ReduceLROnPlateau):
    """Remembers what it was given."""

    def step(self, metrics: float, epoch: None = None) -> None:  # type: ignore[override]
        GIVEN.append(metrics)
        super().step(metrics, epoch)


GIVEN: list[float] = []


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_plateau_is_that_of_the_evaluation_or_else_of_the_epoch(evaluated: bool) -> None:
    GIVEN.clear()
    events: list[Event] = []
    result = find_and_train(
        small_model(),
        rows(),
        16,
        epochs=2,
        scheduler=Noted,
        scheduler_interval="epoch",
        eval_data=rows(20) if evaluated else None,
        progress=events.append,
    )
    own = [event.loss for event in events if isinstance(event, EpochEnded)]
    theirs = [evaluation.loss for evaluation in result.evaluations]
    assert (theirs if evaluated else own) == GIVEN
    assert own != theirs


def test_it_saves_after_each_epoch_and_keeps_two(tmp_path: Path) -> None:
    files: list[list[str]] = []

    def look(_: StepResult) -> None:
        files.append(sorted(path.stem[-1] for path in tmp_path.glob("*.pt")))

    find_and_train(
        small_model(), rows(), 16, epochs=4, checkpoint_dir=tmp_path, on_step=look, progress=False
    )
    assert files[::3] == [[], ["3"], ["3", "6"], ["6", "9"]]
    assert files[::3] == files[1::3] == files[2::3]


def test_it_saves_once_when_it_is_stopped(tmp_path: Path) -> None:
    def stop(_: StepResult) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        find_and_train(
            small_model(), rows(), 16, checkpoint_dir=tmp_path, on_step=stop, progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_a_step_that_was_interrupted_before_any_checkpoint_names_none(tmp_path: Path) -> None:
    class Torn(torch.optim.SGD):
        def step(self, _: object = None) -> None:  # type: ignore[override]  # No closure.
            with torch.no_grad():
                self.param_groups[0]["params"][0] += 1
            if STARTED:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    def start(event: Event) -> None:
        if isinstance(event, TrainingStarted):
            STARTED.append(event)

    STARTED.clear()
    with pytest.raises(StepInterruptedError) as caught:
        find_and_train(
            small_model(),
            rows(),
            16,
            optimizer=lambda parameters: Torn(parameters, lr=0.1),
            checkpoint_dir=tmp_path,
            progress=start,
        )
    assert caught.value.checkpoint is None
    assert list(tmp_path.iterdir()) == []


STARTED: list[Event] = []


class Slow:
    """A batch that takes a second by the clock of the test."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        CLOCK[0] += 1
        yield rows()


CLOCK = [0.0]


def test_seconds_are_those_of_steps_and_data_and_not_of_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(outputs: Tensor, _: Tensor) -> Tensor:
        CLOCK[0] += 100
        return outputs.mean()

    monkeypatch.setattr("time.perf_counter", lambda: CLOCK[0])
    result = find_and_train(
        small_model(),
        Slow(),
        16,
        epochs=3,
        eval_data=rows(),
        metrics={"slow": slow},
        progress=False,
    )
    assert result.seconds == 2, "the first batch was read before the search"
