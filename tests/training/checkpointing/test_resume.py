"""A training that was stopped at any step, and called again, ends as one that was not."""

import functools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import assert_exact, small_model
from states import fingerprint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset

from autobatch import (
    CheckpointError,
    DoesNotFitError,
    StepInterruptedError,
    StepResult,
    TrainingResult,
    WholeBatch,
    find_and_train,
)
from autobatch.events import Event, Resumed, TrainingStarted
from autobatch.training.checkpointing.manager import CheckpointManager
from autobatch.training.engine.lr_schedule import SchedulerFactory
from autobatch.training.workload import OptimizerFactory

ROWS, DESIRED, EPOCHS, STEPS = 42, 16, 2, 6  # Three steps an epoch, the last one short.

Call = dict[str, Any]  # The arguments of find_and_train, which are of every kind.


def seed_everything(seed: int = 1) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def rows(examples: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augments at random: from the global generators, or from one of its own."""

    def __init__(self, own: np.random.Generator | None = None) -> None:
        self.x, self.y = rows()
        self.own = own

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(()) + np.random.rand() + random.random()
        if self.own is not None:
            noise = noise + self.own.random()
        return self.x[row] + noise, self.y[row]


class Plain(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.x, self.y = rows()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row], self.y[row]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(*rows(), strict=True):
            yield x + torch.rand(()), y


class Buffered(IterableDataset[tuple[Tensor, Tensor]]):
    """Shuffles as streams do: an example leaves a buffer at random when the next one comes."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        waiting: list[tuple[Tensor, Tensor]] = []
        for example in zip(*rows(), strict=True):
            waiting.append(example)
            if len(waiting) == 10:
                yield waiting.pop(int(torch.randint(10, ())))
        yield from waiting


class Shuffled:
    """Batches in an order that is drawn anew each time, from a generator of its own."""

    def __init__(self) -> None:
        self.own = random.Random(3)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        places = list(range(6))
        self.own.shuffle(places)
        for place in places:
            yield rows(7, place)


class Restless(nn.Module):
    """Dropout, BatchNorm, a buffer outside of the state_dict and a generator of its own."""

    own_buffer: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3)
        ).double()
        self.register_buffer("own_buffer", torch.zeros((), dtype=torch.float64), persistent=False)
        self.own = torch.Generator().manual_seed(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.own_buffer += 0.5
            x = x + torch.rand(x.shape, generator=self.own, dtype=x.dtype) + self.own_buffer
        scores: Tensor = self.layers(x)
        return scores


class Wide(nn.Module):
    """A float64 net whose activations, not its parameters, fill the limit."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 40).exp().view(len(x), 40, 5).mean(1).log()
        scores: Tensor = self.inner(wide)
        return scores


class Starved(nn.Module):
    """Runs out of memory with more than ten examples, but only from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(small_model(), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        if TRAINING and STEPS_TAKEN and len(x) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        scores: Tensor = self.inner(x)
        return scores


class Contrast(nn.Module):
    """A loss that compares examples with one another, with a temperature that is trained."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.seen += 1
        near = (outputs @ outputs.T / self.temperature).log_softmax(1)
        same = (targets[:, None] == targets[None]).double()
        return -(near * same).sum() / same.sum()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def basic(**options: object) -> Call:
    model = small_model()
    return {"model": model, "data": rows(), "optimizer": sgd(model), **options}


def tensors() -> Call:
    return basic()


def adam() -> Call:
    model = Restless()
    return basic(model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def with_data(make: Callable[[], object]) -> Callable[[], Call]:
    """Steps draw random numbers too, in between."""

    def call() -> Call:
        model = nn.Sequential(nn.Dropout(0.3), small_model())
        return basic(model=model, optimizer=sgd(model), data=make())

    return call


def with_options(**makes: object) -> Callable[[], Call]:
    return lambda: {**basic(), **makes}


def plateau() -> Call:
    return basic(
        scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, threshold=1.0),
        scheduler_interval="epoch",
        eval_data=rows(20, seed=5),
    )


def whole_batch() -> Call:
    model, contrast = Wide(), Contrast()
    both = torch.optim.SGD([*model.parameters(), *contrast.parameters()], lr=0.1, momentum=0.9)
    return basic(model=model, optimizer=both, loss=WholeBatch(contrast), memory_limit="24KiB")


def cut() -> Call:
    model = nn.Sequential(Wide(), nn.Dropout(0.3))
    return basic(model=model, optimizer=sgd(model), memory_limit="20KiB", clip_grad_norm=0.5)


def fp16() -> Call:
    model = small_model().float()
    x, y = rows()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2)
    return {
        "model": model,
        "data": (x.float(), y),
        "optimizer": sgd(model),
        "precision": "fp16",
        "scaler": scaler,
    }


def replayed() -> Call:
    model = Starved()
    return basic(model=model, optimizer=sgd(model))


STEPS_TAKEN: list[StepResult] = []  # Globals: no checkpoint brings them back.
TRAINING: list[Event] = []

KINDS: dict[str, Callable[[], Call]] = {
    "tensors": tensors,
    "dropout, BatchNorm, a model's own generator and buffer, Adam": adam,
    "a Dataset that augments": with_data(Noisy),
    "a loader that shuffles": with_data(lambda: DataLoader(Plain(), 8, shuffle=True)),
    "a loader with a generator": with_data(
        lambda: DataLoader(
            Noisy(np.random.default_rng(5)),
            10,
            shuffle=True,
            generator=torch.Generator().manual_seed(4),
        )
    ),
    "an IterableDataset": with_data(Stream),
    "a shuffle buffer": with_data(lambda: DataLoader(Buffered(), 5)),
    "a loader that augments more than a step takes": with_data(lambda: DataLoader(Noisy(), 11)),
    "batches with their own order": with_data(Shuffled),
    "a list of batches": with_data(lambda: [rows(20), rows(15, 1), rows(7, 2)]),
    "a schedule by steps": with_options(scheduler=lambda o: CosineAnnealingLR(o, 6)),
    "a schedule by epochs": with_options(
        scheduler=functools.partial(StepLR, step_size=1), scheduler_interval="epoch"
    ),
    "a plateau of the evaluation": plateau,
    "fp16": fp16,
    "cut": cut,
    "a whole batch": whole_batch,
    "a window that was replayed": replayed,
}
WORKERS: dict[str, Callable[[], Call]] = {
    "workers that augment": with_data(lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=1)),
    "persistent workers": with_data(
        lambda: DataLoader(Plain(), 8, shuffle=True, num_workers=1, persistent_workers=True)
    ),
}


@dataclass(frozen=True)
class Ran:
    """What is left when a training has ended."""

    result: TrainingResult
    state: Mapping[str, object]
    steps: int  # In this call.


def run(call: Call, directory: Path | None = None, *, stop_at: int = 0, how: int = 0) -> Ran:
    """Train; in step ``stop_at`` of this call the process gets the signal ``how``."""
    steps = 0

    def on_step(step: StepResult) -> None:
        nonlocal steps
        STEPS_TAKEN.append(step)
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), how)

    def observe(event: Event) -> None:
        if isinstance(event, TrainingStarted):
            TRAINING.append(event)

    TRAINING.clear()
    options = {"desired": DESIRED, "epochs": EPOCHS, "progress": observe, **call}
    result = find_and_train(**options, checkpoint_dir=directory, on_step=on_step)
    owners = [call[name] for name in ("model", "optimizer", "scaler", "loss") if name in call]
    owners = [owner.loss if isinstance(owner, WholeBatch) else owner for owner in owners]
    state = fingerprint(*owners, call["data"])
    state.pop("1:attribute _opt_called", None)  # A note of torch's own for one of its warnings.
    return Ran(result, state, steps)


@functools.cache
def uninterrupted(make: Callable[[], Call]) -> Ran:
    STEPS_TAKEN.clear()
    seed_everything()
    return run(make())


def stopped(make: Callable[[], Call], directory: Path, step: int, how: int) -> None:
    STEPS_TAKEN.clear()
    seed_everything()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(make(), directory, stop_at=step, how=how)


def resumed(make: Callable[[], Call], directory: Path) -> Ran:
    """The same call again, in a process that has drawn other numbers since."""
    seed_everything(99)
    return run(make(), directory)


def assert_same(one: Ran, other: Ran) -> None:
    assert one.result.losses == other.result.losses
    assert one.result.evaluations == other.result.evaluations
    assert one.result.replays == other.result.replays
    assert one.result.plan == other.result.plan
    assert (one.result.steps, one.result.examples) == (other.result.steps, other.result.examples)
    assert one.state == other.state


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, kind: str) -> None:
    make, step = KINDS[kind], 5
    whole = uninterrupted(make)
    stopped(make, tmp_path, step, signal.SIGINT)
    again = resumed(make, tmp_path)
    assert_same(again, whole)
    assert again.steps == STEPS - step


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_it_may_be_stopped_at_any_step(tmp_path: Path, step: int) -> None:
    stopped(plateau, tmp_path, step, signal.SIGINT if step % 2 else signal.SIGTERM)
    assert_same(resumed(plateau, tmp_path), uninterrupted(plateau))


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("kind", WORKERS)
def test_the_same_with_workers(tmp_path: Path, kind: str, step: int) -> None:
    make = WORKERS[kind]
    stopped(make, tmp_path, step, signal.SIGINT)
    assert_same(resumed(make, tmp_path), uninterrupted(make))


@pytest.mark.parametrize("kind", ["a Dataset that augments", "fp16", "a window that was replayed"])
def test_it_may_be_stopped_in_each_step(tmp_path: Path, kind: str) -> None:
    make = KINDS[kind]
    whole = uninterrupted(make)
    stopped(make, tmp_path, 1, signal.SIGINT)
    for _ in range(STEPS - 1):
        with pytest.raises(KeyboardInterrupt):
            run(make(), tmp_path, stop_at=1, how=signal.SIGINT)
    again = resumed(make, tmp_path)
    assert_same(again, whole)
    assert again.steps == 0


def test_the_kinds_are_what_they_claim_to_be() -> None:
    assert uninterrupted(KINDS["cut"]).result.plan.accumulation_steps > 1
    assert uninterrupted(KINDS["a whole batch"]).result.plan.accumulation_steps > 1
    assert uninterrupted(KINDS["a window that was replayed"]).result.replays == 1
    assert any("overflowed" in note for note in uninterrupted(KINDS["fp16"]).result.notes)


def test_without_its_random_numbers_it_ends_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = uninterrupted(adam)
    stopped(adam, tmp_path, 2, signal.SIGINT)
    monkeypatch.setattr(CheckpointManager, "restore_random", lambda *_: None)
    assert resumed(adam, tmp_path).result.losses != whole.result.losses


# A training that has ended is longer wished.

LONGER = {
    **{name: KINDS[name] for name in ("tensors", "a plateau of the evaluation", "cut")},
    **{name: KINDS[name] for name in ("a loader with a generator", "a schedule by epochs")},
    **WORKERS,
    "own order": KINDS["batches with their own order"],
}


def longer(make: Callable[[], Call], **options: object) -> Call:
    return {**make(), **options}


@pytest.mark.parametrize("kind", LONGER)
def test_one_more_epoch_is_the_epoch_that_would_have_come(tmp_path: Path, kind: str) -> None:
    three = functools.partial(longer, LONGER[kind], epochs=3)
    seed_everything()
    whole = run(three())
    seed_everything()
    run(LONGER[kind](), tmp_path)
    again = resumed(three, tmp_path)
    assert_same(again, whole)
    assert again.steps == 3


def test_one_more_epoch_may_be_stopped_too(tmp_path: Path) -> None:
    make = KINDS["a loader that shuffles"]
    three = functools.partial(longer, make, epochs=3)
    seed_everything()
    whole = run(three())
    seed_everything()
    run(make(), tmp_path)
    seed_everything(98)
    with pytest.raises(KeyboardInterrupt):
        run(three(), tmp_path, stop_at=2, how=signal.SIGINT)
    assert_same(resumed(three, tmp_path), whole)


@pytest.mark.parametrize("kind", ["a plateau of the evaluation", "a schedule by epochs", "tensors"])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_more_steps_are_those_that_would_have_come(tmp_path: Path, kind: str, steps: int) -> None:
    make = KINDS[kind]
    seed_everything()
    first = run(longer(make, max_steps=steps), tmp_path)
    assert first.steps == steps
    seed_everything(98)
    assert run(longer(make, max_steps=steps), tmp_path).steps == 0
    again = resumed(make, tmp_path)
    assert_same(again, uninterrupted(make))
    assert again.steps == STEPS - steps


def test_a_training_that_is_complete_returns_at_once(tmp_path: Path) -> None:
    whole = uninterrupted(plateau)
    seed_everything()
    run(plateau(), tmp_path)
    events: list[Event] = []
    seed_everything(99)
    again = run({**plateau(), "progress": events.append}, tmp_path)
    assert again.steps == 0
    assert [type(event) for event in events] == [Resumed]
    assert_same(again, whole)
    assert any("nothing was left to do" in note for note in again.result.notes)


def test_data_that_does_not_fill_a_batch_goes_on_not_filling_it(tmp_path: Path) -> None:
    small = functools.partial(longer, tensors, desired=64)
    seed_everything()
    whole = run(small())
    seed_everything()
    run(longer(small, max_steps=1), tmp_path)
    again = resumed(small, tmp_path)
    assert_same(again, whole)
    assert any("fewer than desired=64" in note for note in again.result.notes)


def test_it_says_from_where_it_goes_on(tmp_path: Path) -> None:
    stopped(tensors, tmp_path, 4, signal.SIGINT)
    events: list[Event] = []
    seed_everything(99)
    result = run({**tensors(), "progress": events.append}, tmp_path).result
    [resumed] = [event for event in events if isinstance(event, Resumed)]
    assert (resumed.steps, resumed.epoch) == (4, 2)
    assert Path(resumed.checkpoint).name == "step-00000004.pt"
    [started] = [event for event in events if isinstance(event, TrainingStarted)]
    assert started.steps == 2
    assert any("continued from a checkpoint" in note and "step 4" in note for note in result.notes)


def plain_sgd(lr: float = 0.1, **settings: Any) -> OptimizerFactory:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **settings)


def cosine(steps: int, lowest: float = 0.0) -> SchedulerFactory:
    return lambda optimizer: CosineAnnealingLR(optimizer, T_max=steps, eta_min=lowest)


def in_turn(first: int) -> SchedulerFactory:
    def make(optimizer: Optimizer) -> SequentialLR:
        both = [LinearLR(optimizer, total_iters=first), StepLR(optimizer, step_size=2)]
        return SequentialLR(optimizer, both, milestones=[2])

    return make


def to_be_noted(before: dict[str, Any], now: dict[str, Any], tmp_path: Path) -> list[str]:
    """Return the notes of a training that continues with other arguments than it began with."""

    def trained(epochs: int, **changes: Any) -> TrainingResult:
        torch.manual_seed(0)
        own = {"data": (rows()[0].float(), rows()[1]), "optimizer": plain_sgd(), **changes}
        return find_and_train(
            nn.Linear(5, 3), desired=DESIRED, epochs=epochs, seed=1, checkpoint_dir=tmp_path,
            device="cpu", **{"progress": False, **own},
        )  # fmt: skip

    trained(1, **before)
    events: list[Event] = []
    notes = trained(2, **now, progress=events.append).notes
    [resumed] = [event for event in events if isinstance(event, Resumed)]
    assert set(resumed.differences) <= set(notes), (
        "reported at the beginning, and not in the result"
    )
    return list(resumed.differences)


@pytest.mark.parametrize(
    ("before", "now", "noted"),
    [
        ({}, {}, []),
        (
            {},
            {"optimizer": plain_sgd(0.5)},
            ["lr continues as 0.1 from the checkpoint, not as 0.5"],
        ),
        (
            {"optimizer": plain_sgd(momentum=0.9)},
            {"optimizer": plain_sgd(momentum=0.8, weight_decay=0.5)},
            [
                "momentum continues as 0.9 from the checkpoint, not as 0.8",
                "weight_decay continues as 0 from the checkpoint, not as 0.5",
            ],
        ),
        ({"scheduler": cosine(8)}, {"scheduler": cosine(8)}, []),
        (
            {"scheduler": cosine(8)},
            {"scheduler": cosine(40, 0.01), "optimizer": plain_sgd(0.5)},
            [
                "lr continues as 0.1 from the checkpoint, not as 0.5",
                "CosineAnnealingLR's T_max continues as 8 from the checkpoint, not as 40",
                "CosineAnnealingLR's eta_min continues as 0.0 from the checkpoint, not as 0.01",
            ],
        ),
        ({"scheduler": in_turn(3)}, {"scheduler": in_turn(3)}, []),
        (
            {"scheduler": in_turn(3)},
            {"scheduler": in_turn(4)},
            ["LinearLR 0's total_iters continues as 3 from the checkpoint, not as 4"],
        ),
        ({}, {"precision": "bf16"}, ["precision was fp32 before the checkpoint, and is bf16 now"]),
        (
            {},
            {"clip_grad_norm": 1.0},
            ["clip_grad_norm was None before the checkpoint, and is 1.0 now"],
        ),
        (
            {},
            {"data": (torch.randn(40, 5), torch.zeros(40, dtype=torch.long))},
            [
                f"the number of examples in data was {len(rows()[0])} before the checkpoint, and "
                "is 40 now"
            ],
        ),
    ],
)
def test_a_note_names_each_setting_that_differs_from_the_call(
    before: dict[str, Any], now: dict[str, Any], noted: list[str], tmp_path: Path
) -> None:
    """A checkpoint's optimizer and scheduler win, as with their own load_state_dict, and say so."""
    assert to_be_noted(before, now, tmp_path) == noted


def test_a_learning_rate_that_a_schedule_has_changed_is_no_difference(tmp_path: Path) -> None:
    one_cycle: SchedulerFactory = lambda o: OneCycleLR(o, max_lr=0.2, total_steps=50)  # noqa: E731
    same = {"scheduler": one_cycle, "optimizer": plain_sgd(momentum=0.9)}
    assert to_be_noted(same, same, tmp_path) == []


def test_the_seconds_of_a_stopped_training_count(tmp_path: Path) -> None:
    model = Sleepy()
    call = basic(model=model, optimizer=sgd(model))
    seed_everything()
    with pytest.raises(KeyboardInterrupt):
        run(call, tmp_path, stop_at=4, how=signal.SIGINT)
    model = Sleepy()
    assert run(basic(model=model, optimizer=sgd(model)), tmp_path).result.seconds >= 6 * 0.02


class Sleepy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(self, x: Tensor) -> Tensor:
        if TRAINING:
            time.sleep(0.02)
        scores: Tensor = self.inner(x)
        return scores


# Stopped elsewhere than in a step.


def test_a_stop_in_the_evaluation_waits_for_its_end(tmp_path: Path) -> None:
    def with_metric(*, stops: bool) -> Call:
        sent: list[int] = []

        def metric(outputs: Tensor, targets: Tensor) -> Tensor:
            if stops and len(STEPS_TAKEN) == 3 and not sent:
                sent.append(signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return (outputs.argmax(1) == targets).double().mean()

        return {**plateau(), "metrics": {"right": metric}}

    STEPS_TAKEN.clear()
    seed_everything()
    with pytest.raises(SystemExit) as exit_info:
        run(with_metric(stops=True), tmp_path)
    assert exit_info.value.code == 143
    again = resumed(functools.partial(with_metric, stops=False), tmp_path)
    assert again.steps == 3
    assert again.result.losses == uninterrupted(plateau).result.losses
    assert again.state == uninterrupted(plateau).state


def test_an_error_in_on_step_passes_through_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    count = 0

    def fail(_: StepResult) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise LookupError("mine")

    seed_everything()
    with pytest.raises(LookupError, match="mine"):
        find_and_train(
            **tensors(),
            desired=DESIRED,
            epochs=2,
            checkpoint_dir=tmp_path,
            on_step=fail,
            progress=False,
        )
    again = resumed(tensors, tmp_path)
    assert again.steps == 3, "the second epoch, once more"
    assert_same(again, uninterrupted(tensors))


# What is in the directory is not to be trusted.


def test_a_damaged_file_costs_the_steps_since_the_one_before(tmp_path: Path) -> None:
    stopped(adam, tmp_path, 5, signal.SIGINT)
    newest = max(tmp_path.glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"step-00000005.pt is refused.*step-00000003.pt is used"):
        again = resumed(adam, tmp_path)
    assert again.steps == 3
    assert_same(again, uninterrupted(adam))


def foreign(directory: Path) -> None:
    for file in directory.glob("*.pt"):
        torch.save({"model": small_model().state_dict()}, file)


def no_change(directory: Path) -> None:
    pass


def another_model() -> Call:
    model = small_model(inputs=5, classes=4)
    return basic(model=model, optimizer=sgd(model))


def another_loss() -> Call:
    call = whole_batch()
    call["loss"].loss.seen.resize_(2)
    return call


def other_generators() -> Call:
    return {**tensors(), "data": DataLoader(Noisy(np.random.default_rng(1)), 8)}


@pytest.mark.parametrize(
    ("first", "spoil", "then", "text"),
    [
        (tensors, foreign, tensors, "no checkpoint in .* can be used"),
        (tensors, no_change, another_model, "2.weight"),
        (
            tensors,
            no_change,
            functools.partial(longer, tensors, desired=8),
            "training with desired=16, got desired=8",
        ),
        (tensors, no_change, other_generators, "the random generators of"),
        (tensors, no_change, KINDS["a schedule by steps"], "scheduler is none"),
        (whole_batch, no_change, another_loss, "the loss of .* holds"),
    ],
    ids=["a foreign file", "model", "desired", "generators", "scheduler", "loss"],
)
def test_what_is_of_another_training_is_refused_and_nothing_has_changed(
    tmp_path: Path,
    first: Callable[[], Call],
    spoil: Callable[[Path], None],
    then: Callable[[], Call],
    text: str,
) -> None:
    stopped(first, tmp_path, 2, signal.SIGINT)
    spoil(tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    call = then()
    seed_everything(7)
    before = fingerprint(call["model"], call["optimizer"], call["data"], call.get("loss"))
    with pytest.raises(CheckpointError, match=text):
        run(call, tmp_path)
    assert fingerprint(call["model"], call["optimizer"], call["data"], call.get("loss")) == before
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_data_that_is_shorter_than_what_was_seen_is_refused(tmp_path: Path) -> None:
    stopped(tensors, tmp_path, 3, signal.SIGINT)
    with pytest.raises(CheckpointError, match=r"3 logical batches of epoch 1 were done.* holds 1"):
        run({**tensors(), "data": rows(10)}, tmp_path)


# Another device.


@pytest.mark.parametrize(("first", "then"), [("30KiB", "14KiB"), ("14KiB", "30KiB")])
def test_on_another_device_it_searches_again_and_keeps_what_is_desired(
    tmp_path: Path, first: str, then: str
) -> None:
    def on(limit: str) -> Call:
        model = Wide()
        return basic(model=model, optimizer=sgd(model), memory_limit=limit)

    seed_everything()
    whole = run(on(first))
    stopped(functools.partial(on, first), tmp_path, 4, signal.SIGINT)
    again = resumed(functools.partial(on, then), tmp_path)
    assert again.result.search.size != whole.result.search.size
    assert again.result.search.trials
    assert again.result.replays == 0, "the size of the larger device must not come back"
    assert again.result.plan.desired == DESIRED
    assert again.result.plan.tolerable == min(whole.result.search.size, again.result.search.size)
    assert_exact(list(again.result.losses), list(whole.result.losses))


def test_a_micro_batch_that_was_made_smaller_stays_so(tmp_path: Path) -> None:
    sizes: list[tuple[int, ...]] = []
    stopped(replayed, tmp_path, 2, signal.SIGINT)
    seed_everything(99)
    find_and_train(
        **replayed(),
        desired=DESIRED,
        epochs=2,
        checkpoint_dir=tmp_path,
        progress=False,
        on_step=lambda step: sizes.append(step.micro_batch_sizes),
    )
    assert sizes[1:] == [(8, 8), (8, 8), (5, 5)]
    assert sizes[0] == (5, 5)


# A search that fails.


def test_a_search_that_fails_writes_nothing_and_takes_the_schedule_back(tmp_path: Path) -> None:
    call = basic(memory_limit=100, scheduler=lambda o: CosineAnnealingLR(o, 6))
    before = fingerprint(call["model"], call["optimizer"])
    with pytest.raises(DoesNotFitError):
        find_and_train(**call, desired=DESIRED, checkpoint_dir=tmp_path / "new", progress=False)
    assert fingerprint(call["model"], call["optimizer"]) == before
    assert not (tmp_path / "new").exists()


def test_a_schedule_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    call = basic(scheduler=lambda o: ReduceLROnPlateau(CosineAnnealingLR(o, 6).optimizer))
    before = fingerprint(call["model"], call["optimizer"])
    with pytest.raises(ValueError, match="scheduler_interval"):
        find_and_train(**call, desired=DESIRED, progress=False)
    assert fingerprint(call["model"], call["optimizer"]) == before


def test_memory_that_runs_out_in_a_step_names_the_last_checkpoint(tmp_path: Path) -> None:
    class Torn(torch.optim.SGD):
        def step(self, _: object = None) -> None:  # type: ignore[override]  # No closure.
            first, *_ = self.param_groups[0]["params"]
            with torch.no_grad():
                first += 1
            if len(STEPS_TAKEN) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    STEPS_TAKEN.clear()
    model = small_model()
    call = basic(model=model, optimizer=Torn(model.parameters(), lr=0.1))
    with pytest.raises(
        StepInterruptedError, match=r"the last checkpoint is .*step-00000003.pt"
    ) as e:
        run(call, tmp_path)
    assert e.value.checkpoint == str(tmp_path / "step-00000003.pt")
