"""A scheduler is stepped after each step that was taken, or after each epoch, and never else."""

import functools
import warnings
from typing import SupportsFloat

import pytest
import torch
from reference import Pair, assert_exact, sgd, small_model, token_model
from torch import nn
from torch.optim import lr_scheduler

from autobatch import Accumulator, find_and_train
from autobatch.training.engine.lr_schedule import Schedule, resolve_schedule

halved = functools.partial(lr_scheduler.ExponentialLR, gamma=0.5)


def samples(examples: int = 10) -> Pair:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("as_factory", [True, False])
def test_it_is_stepped_once_a_step_however_finely_the_batch_is_cut(as_factory: bool) -> None:
    model = small_model()
    optimizer = sgd(model)
    scheduler = halved if as_factory else halved(optimizer)
    accumulator = Accumulator(model, optimizer, micro_batch=2, scheduler=scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()".
        for taken in (1, 2, 3):
            accumulator.step(samples())
            assert rate(optimizer) == 0.5**taken


def test_each_step_is_taken_at_the_rate_that_a_plain_loop_has() -> None:
    ours, whole = small_model(), small_model()
    optimizer, theirs = sgd(ours), sgd(whole)
    accumulator = Accumulator(ours, optimizer, micro_batch=4, scheduler=halved)
    scheduler = halved(theirs)
    for _ in range(3):
        accumulator.step(samples())
        theirs.zero_grad()
        nn.functional.cross_entropy(whole(samples()[0]), samples()[1]).backward()
        theirs.step()
        scheduler.step()
    assert_exact(ours.state_dict(), whole.state_dict())


def test_a_step_that_is_skipped_does_not_step_it() -> None:
    model = small_model()
    optimizer = sgd(model)
    accumulator = Accumulator(model, optimizer, micro_batch=4, scheduler=halved, nonfinite="skip")
    x, y = samples()
    assert accumulator.step((x * float("nan"), y)).skipped
    assert rate(optimizer) == 1
    accumulator.step((x, y))
    assert rate(optimizer) == 0.5


def test_a_batch_without_valid_terms_does_not_step_it() -> None:
    model = token_model()
    optimizer = sgd(model)
    accumulator = Accumulator(model, optimizer, scheduler=halved)
    step = accumulator.step((torch.zeros(4, 6).long(), torch.full((4, 6), -100)))
    assert (step.skipped, rate(optimizer)) == (True, 1)


def test_an_overflow_does_not_step_it() -> None:
    model = nn.Linear(5, 3)
    optimizer = sgd(model)
    accumulator = Accumulator(
        model,
        optimizer,
        scheduler=halved,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127),
    )
    x, y = samples()
    assert accumulator.step((x.float() * 1e6, y)).reason == "overflow"
    assert rate(optimizer) == 1


def test_one_cycle_takes_the_steps_that_it_was_made_for_however_the_batch_is_cut() -> None:
    model = small_model()
    optimizer, plain = sgd(model), sgd(small_model())
    cycle = functools.partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=4)
    result = find_and_train(
        model,
        samples(32),
        8,
        optimizer=optimizer,
        scheduler=cycle,
        memory_limit="3KB",
        progress=False,
    )
    scheduler = cycle(plain)
    for _ in range(4):
        plain.step()
        scheduler.step()
    assert result.plan.accumulation_steps > 1
    assert rate(optimizer) == rate(plain)


# Once an epoch.


class Plateau(lr_scheduler.ReduceLROnPlateau):
    """Records the losses that it is stepped with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, factor=0.5, patience=0)
        self.told: list[float] = []

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]  # As torch does.
        self.told.append(float(metrics))
        super().step(metrics, epoch)


def test_once_an_epoch_means_once_an_epoch() -> None:
    model = small_model()
    optimizer = sgd(model)
    schedule = resolve_schedule(halved, optimizer, "epoch")
    optimizer.step()
    for _ in range(5):
        schedule.after_step()
    assert rate(optimizer) == 1
    schedule.after_epoch(0.3)
    assert rate(optimizer) == 0.5


def test_per_step_is_not_stepped_by_an_epoch() -> None:
    model = small_model()
    optimizer = sgd(model)
    schedule = resolve_schedule(halved, optimizer)
    schedule.after_epoch(0.3)
    assert rate(optimizer) == 1


def test_find_and_train_steps_it_after_each_epoch() -> None:
    model = small_model()
    optimizer = sgd(model)
    find_and_train(
        model,
        samples(),
        4,
        optimizer=optimizer,
        scheduler=halved,
        scheduler_interval="epoch",
        epochs=2,
        progress=False,
    )
    assert rate(optimizer) == 0.25


def test_a_plateau_is_stepped_with_the_epoch_s_loss() -> None:
    model = small_model()
    optimizer = sgd(model)
    plateau = Plateau(optimizer)
    schedule = resolve_schedule(plateau, optimizer, "epoch")
    for loss in (1.0, 2.0):
        schedule.after_epoch(loss)
    assert plateau.told == [1.0, 2.0]
    assert rate(optimizer) == 0.5


@pytest.mark.parametrize("evaluated", [True, False])
def test_find_and_train_tells_a_plateau_the_evaluation_s_loss_or_the_epoch_s_mean(
    evaluated: bool,
) -> None:
    model = small_model()
    optimizer = sgd(model)
    plateau = Plateau(optimizer)
    result = find_and_train(
        model,
        [samples()],
        10,
        optimizer=optimizer,
        scheduler=plateau,
        scheduler_interval="epoch",
        epochs=2,
        eval_data=[samples(4)] if evaluated else None,
        progress=False,
    )
    expected = [e.loss for e in result.evaluations] if evaluated else list(result.losses)
    assert_exact(plateau.told, expected)


# What is taken, and what is refused.


class Own:
    """A scheduler that is none of torch's: nothing says which optimizer it drives."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, object]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, object], /) -> None:
        self.steps = int(str(state_dict["steps"]))


def test_any_object_that_can_do_what_a_scheduler_does_is_one() -> None:
    model, own = small_model(), Own()
    Accumulator(model, sgd(model), scheduler=own).step(samples())
    assert own.steps == 1


def test_none_is_nobody_s_business() -> None:
    schedule = resolve_schedule(None, sgd(small_model()), "epoch")
    schedule.after_step()
    schedule.after_epoch(1.0)
    assert schedule == Schedule(interval="epoch")


def lambda_of_a_class(_: torch.optim.Optimizer) -> object:
    return Own


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (3, TypeError, "got int"),
        (lambda_of_a_class, TypeError, "got type"),
        (lambda _: None, TypeError, "got NoneType"),
        (halved(sgd(small_model())), ValueError, "belongs to another optimizer"),
        (lambda _: halved(sgd(small_model())), ValueError, "belongs to another optimizer"),
        (lr_scheduler.ReduceLROnPlateau, ValueError, "ReduceLROnPlateau is stepped on a loss"),
    ],
)
def test_what_is_no_scheduler_for_this_optimizer_is_refused(
    given: object, error: type[Exception], text: str
) -> None:
    model = small_model()
    with pytest.raises(error, match=text):
        Accumulator(model, sgd(model), scheduler=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [lr_scheduler.ExponentialLR, Own])
def test_a_class_that_needs_more_than_the_optimizer_is_refused_by_name(kind: type) -> None:
    model = small_model()
    with pytest.raises(TypeError, match=kind.__name__):
        Accumulator(model, sgd(model), scheduler=kind)


def test_a_class_that_needs_the_optimizer_alone_is_a_factory() -> None:
    model = small_model()
    optimizer = sgd(model)
    Accumulator(model, optimizer, scheduler=lr_scheduler.ConstantLR).step(samples())
    assert rate(optimizer) == pytest.approx(1 / 3)


@pytest.mark.parametrize("interval", ["batch", None, 1])
def test_an_unknown_interval_is_refused(interval: object) -> None:
    with pytest.raises(ValueError, match="scheduler_interval must be one of"):
        resolve_schedule(None, sgd(small_model()), interval)


def test_an_error_of_the_user_s_factory_passes_through() -> None:
    def broken(_: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        raise KeyError("mine")

    model = small_model()
    with pytest.raises(KeyError, match="mine"):
        Accumulator(model, sgd(model), scheduler=broken)
