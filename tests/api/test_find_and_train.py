"""The whole job: the parameters of a plain loop over undivided batches, in pieces that fit."""

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import assert_exact, assert_same_parameters, small_model, twin, undivided_steps
from states import fingerprint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autobatch import (
    DeviceUnavailableError,
    DoesNotFitError,
    InexactStepError,
    SearchOptions,
    StepResult,
    TrainingResult,
    WholeBatch,
    check,
    find_and_train,
    find_batch_size,
)
from autobatch.compat.torchvision import import_torchvision
from autobatch.data.rebatch import logical_batches
from autobatch.data.tree import BatchTree
from autobatch.devices.base import MemoryReading
from autobatch.devices.cpu import CpuDevice
from autobatch.events import Event, StepEnded, TrialEnded
from autobatch.search.bracketing import Confirm
from autobatch.training.engine.prefetch import Prefetcher

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
train = functools.partial(find_and_train, progress=False)


def rows(examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


class Wide(nn.Module):
    """A float64 net whose activations, not its parameters, fill the limit."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 40).exp().view(len(x), 40, 5).mean(1).log()
        scores: Tensor = self.inner(wide)
        return scores


def joined(batches: list[tuple[Tensor, Tensor]], desired: int) -> list[tuple[Tensor, Tensor]]:
    """Undivided batches of ``desired``, made the slow way."""
    x = torch.cat([batch[0] for batch in batches])
    y = torch.cat([batch[1] for batch in batches])
    return list(zip(x.split(desired), y.split(desired), strict=True))


@pytest.mark.parametrize("loader_batch", [7, 16, 40, 100])
def test_it_trains_to_the_parameters_of_a_plain_loop_over_undivided_batches(
    loader_batch: int,
) -> None:
    desired, epochs = 32, 3
    loader = DataLoader(TensorDataset(*rows(75)), batch_size=loader_batch)
    ours, whole = Wide(), Wide()
    result = train(ours, loader, desired, optimizer=SGD, epochs=epochs, memory_limit="20KiB")
    losses = undivided_steps(
        whole, SGD(whole.parameters()), F.cross_entropy, joined(list(loader), desired) * epochs
    )
    assert result.plan.accumulation_steps > 2, "the limit must cut the batch for this to mean much"
    assert result.steps == len(losses) == 9
    assert result.examples == 75 * epochs
    assert_same_parameters(ours, whole)
    assert_exact(list(result.losses), losses)


def test_another_split_of_the_epoch_trains_to_other_parameters() -> None:
    ours, whole = Wide(), Wide()
    loader = DataLoader(TensorDataset(*rows(75)), batch_size=16)
    train(ours, loader, 32, optimizer=SGD, memory_limit="20KiB")
    optimizer = SGD(whole.parameters())
    undivided_steps(whole, optimizer, F.cross_entropy, joined(list(loader), 16))
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(ours, whole)


def test_drop_last_skips_the_short_logical_batch() -> None:
    ours, whole = small_model(), small_model()
    loader = DataLoader(TensorDataset(*rows(75)), batch_size=16)
    result = train(ours, loader, 32, optimizer=SGD, drop_last=True)
    batches = joined(list(loader), 32)[:2]
    undivided_steps(whole, SGD(whole.parameters()), F.cross_entropy, batches)
    assert result.steps == 2
    assert_same_parameters(ours, whole)


def test_max_steps_ends_an_endless_stream() -> None:
    drawn: list[int] = []

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in itertools.count():
            drawn.append(seed)
            yield rows(10, seed)

    result = train(small_model(), endless(), 32, optimizer=SGD, max_steps=3)
    assert (result.steps, result.examples) == (3, 96)
    assert len(drawn) == 10, "no batch is read ahead"


def test_max_steps_counts_over_epochs() -> None:
    result = train(small_model(), rows(40), 16, epochs=3, max_steps=5)
    assert (result.steps, result.epochs) == (5, 2)


# What training sees with the search is what it sees without.


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augments from a generator of its own, or from the global ones."""

    def __init__(self, own: np.random.Generator | None) -> None:
        self.x, self.y = rows(60)
        self.own = own

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = self.own.normal() if self.own else np.random.normal() + random.random()
        return self.x[index] + noise + torch.randn(()).double(), self.y[index]


Loader = DataLoader[tuple[Tensor, Tensor]]
LOADERS: dict[str, Callable[[], Loader]] = {
    "global generators": lambda: DataLoader(Noisy(None), 8, shuffle=True),
    "own generator": lambda: DataLoader(
        Noisy(None), 8, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "workers": lambda: DataLoader(Noisy(None), 8, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        Noisy(None), 8, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "a dataset with its own generator": lambda: DataLoader(
        Noisy(np.random.default_rng(5)), 8, shuffle=True
    ),
}


SEEN: list[Tensor] = []  # A global: no search puts it back.


class Recorder(nn.Module):
    """Remembers what it was shown, and draws dropout masks between one batch and the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(small_model(), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.clone())
        scores: Tensor = self.inner(x)
        return scores


def seed_everything() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_training_sees_what_it_would_have_seen_without_the_search(
    make: Callable[[], Loader],
) -> None:
    model = Recorder()
    without = twin(model)
    desired, epochs = 20, 2

    loader = make()
    seed_everything()
    SEEN.clear()
    optimizer = torch.optim.Adam(without.parameters())
    for _ in range(epochs):
        undivided_steps(
            without, optimizer, F.cross_entropy, pairs(logical_batches(loader, desired))
        )
    expected = list(SEEN)

    loader = make()
    seed_everything()
    trials: list[Event] = []

    def forget_trials(event: Event) -> None:
        if isinstance(event, TrialEnded):
            trials.append(event)
            SEEN.clear()

    find_and_train(
        model, loader, desired, optimizer=torch.optim.Adam, epochs=epochs, progress=forget_trials
    )
    assert trials
    torch.testing.assert_close(SEEN, expected, rtol=0, atol=0)
    assert_same_parameters(model, without)


def pairs(batches: Iterator[object]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        assert isinstance(batch, list)
        yield batch[0], batch[1]


# Any kind of data.


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*rows(50), strict=True)


@pytest.mark.parametrize(
    "data",
    [
        rows(50),
        tuple(tensor.numpy() for tensor in rows(50)),
        TensorDataset(*rows(50)),
        DataLoader(TensorDataset(*rows(50)), batch_size=8),
        Stream(),
        [rows(20), rows(20), rows(10)],
    ],
    ids=["tensors", "arrays", "Dataset", "DataLoader", "IterableDataset", "list of batches"],
)
def test_any_kind_of_data_is_seen_whole_each_epoch(data: object) -> None:
    result = train(small_model(), data, 16, epochs=2)  # type: ignore[arg-type]  # Every kind.
    assert (result.examples, result.steps) == (100, 8)


def test_a_mapping_is_called_by_keyword_and_its_target_kept_back() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model()

        def forward(self, *, inputs: Tensor, scale: Tensor) -> Tensor:
            scores: Tensor = self.inner(inputs) * scale
            return scores

    x, y = rows(40)
    data = {"inputs": x, "scale": torch.ones(40, 1, dtype=torch.float64), "labels": y}
    assert train(Named(), data, 16).examples == 40


def test_floating_targets_mean_squared_error_by_default() -> None:
    ours = nn.Linear(5, 1).double()
    whole = twin(ours)
    x = rows(24)[0]
    y = x.sum(1, keepdim=True)
    batches = [(x[:16], y[:16]), (x[16:], y[16:])]
    result = train(ours, batches, 16, optimizer=SGD, memory_limit="3KiB")
    undivided_steps(whole, SGD(whole.parameters()), F.mse_loss, batches)
    assert_same_parameters(ours, whole)
    assert any("so the loss is the mean squared error" in note for note in result.notes)


def test_only_an_inferred_squared_error_is_noted() -> None:
    x, classes = rows(24)
    for y, loss in ((classes, None), (x.sum(1, keepdim=True), F.mse_loss)):
        model = nn.Linear(5, 3 if loss is None else 1).double()
        assert not any("squared" in note for note in train(model, (x, y), 16, loss=loss).notes)


def test_memory_that_training_has_fragmented_is_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """USERS 1.8.4: batches of many lengths."""
    real = CpuDevice.read

    def read(self: CpuDevice) -> MemoryReading:
        return replace(real(self), peak_bytes=2**30, peak_reserved_bytes=3 * 2**30)

    assert not any("torn" in note for note in train(small_model(), rows(24), 16).notes)
    monkeypatch.setattr(CpuDevice, "read", read)
    notes = train(small_model(), rows(24), 16).notes
    assert any(note.startswith("training held 2.0 GiB more than its tensors") for note in notes)


def test_data_smaller_than_desired_is_one_logical_batch_an_epoch_and_noted() -> None:
    result = train(small_model(), rows(10), 256, epochs=3)
    assert result.steps == 3
    assert str(result.plan).startswith("10 = 10")
    assert any("fewer than desired=256" in note for note in result.notes)


def test_a_seed_makes_a_run_repeatable() -> None:
    results = [train(small_model(), rows(50), 16, epochs=2, seed=7) for _ in range(2)]
    assert results[0].losses == results[1].losses
    assert results[0].losses != train(small_model(), rows(50), 16, epochs=2, seed=8).losses


def test_evaluation_mode_is_put_back_after_training() -> None:
    model = nn.Sequential(small_model(), nn.Dropout(0.5)).eval()
    train(model, rows(20), 8)
    assert not any(module.training for module in model.modules())


def test_events_tell_of_every_trial_and_step() -> None:
    events: list[Event] = []
    result = find_and_train(small_model(), rows(40), 16, progress=events.append)
    assert [e.trial for e in events if isinstance(e, TrialEnded)] == list(result.search.trials)
    assert [e.step.loss for e in events if isinstance(e, StepEnded)] == list(result.losses)


def test_progress_false_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    find_and_train(small_model(), rows(40), 16, progress=False)
    assert capfd.readouterr() == ("", "")


def test_split_batch_norm_is_noted_and_whole_batch_norm_is_not() -> None:
    model = nn.Sequential(nn.Linear(5, 200), nn.BatchNorm1d(200), nn.Linear(200, 3)).double()
    split = train(twin(model), rows(64), 64, memory_limit="200KiB")
    whole = train(twin(model), rows(64), 64)
    assert split.plan.accumulation_steps > 1
    assert any("BatchNorm" in note for note in split.notes)
    assert whole.notes == ()


def test_a_frozen_batch_norm_is_not_noted() -> None:
    model = nn.Sequential(nn.Linear(5, 200), nn.BatchNorm1d(200), nn.Linear(200, 3)).double()
    model[1].eval()
    result = train(model, rows(64), 64, memory_limit="200KiB")
    assert result.plan.accumulation_steps > 1
    assert result.notes == ()


def test_any_other_buffer_that_changes_once_a_micro_batch_is_noted_by_name() -> None:
    layer = nn.utils.spectral_norm(nn.Linear(5, 200))
    model = nn.Sequential(layer, nn.Linear(200, 3)).double()
    result = train(model, rows(64), 64, memory_limit="200KiB")
    assert result.plan.accumulation_steps > 1
    assert any("0.weight_u" in note for note in result.notes)


def test_an_unknown_loss_is_checked_beside_the_limit_and_changes_no_plan() -> None:
    def unknown(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    torch.manual_seed(0)
    model = nn.Linear(16, 2000)
    x, y = torch.randn(256, 16), torch.randint(0, 2000, (256,))
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    for limit in ("1MB", "2MB"):
        known, other = (
            train(twin(model), (x, y), 256, loss=loss, optimizer=sgd, memory_limit=limit)
            for loss in (None, unknown)
        )
        assert known.plan == other.plan
        assert known.plan.accumulation_steps > 1
        assert (known.replays, other.replays) == (0, 0)
        assert known.notes == ()
        assert any("autobatch does not know this loss" in note for note in other.notes)


@pytest.mark.parametrize("desired", [3, 5, 9])
def test_a_plan_with_a_single_example_is_rehearsed_with_it(desired: int) -> None:
    class Holds2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            scores: Tensor = self.inner(x)
            return scores

    model = Holds2()
    before = fingerprint(model)

    def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    with pytest.raises(DoesNotFitError, match="more than 1 value per channel"):
        train(model, [rows(desired)], desired, batch_loss=summed)  # It cannot borrow a neighbour.
    assert fingerprint(model) == before
    assert train(Holds2(), [rows(desired)], desired).plan.micro_batch_sizes[-1] == 1
    assert train(Holds2(), [rows(4)], 4).plan.micro_batch_sizes == (2, 2)


def test_an_optimizer_factory_may_read_the_parameters_twice() -> None:
    def two_groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1]},
        ]
        return torch.optim.SGD(groups, lr=0.1)

    model = small_model()
    before = twin(model).state_dict()
    train(model, rows(16), 8, optimizer=two_groups)
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("seed", "error"), [(2.5, TypeError), ("a", TypeError), (True, TypeError), (-1, ValueError)]
)
def test_a_bad_seed_is_refused_before_anything_is_seeded(seed: int, error: type[Exception]) -> None:
    model = small_model()
    before = fingerprint()
    with pytest.raises(error, match="seed must be"):
        train(model, rows(8), 4, seed=seed)
    assert fingerprint() == before


def test_without_a_limit_the_host_s_own_batches_count_on_the_cpu() -> None:
    wide = torch.randn(4, 4000, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    model = nn.Linear(4000, 2).double()
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    host = check(model, wide, 64, optimizer=sgd)
    beside = check(model, wide, 64, optimizer=sgd, memory_limit="1GiB")
    assert host.peak_bytes is not None
    assert beside.peak_bytes is not None
    assert host.peak_bytes >= beside.peak_bytes + 64 * 4000 * 8


def test_losses_that_are_not_finite_are_noted() -> None:
    x, y = rows(16)
    result = train(small_model(), [(x * torch.inf, y), (x, y)], 16, nonfinite="ignore")
    assert any("losses are not finite" in note for note in result.notes)


def test_an_inexact_loss_is_refused_and_nothing_has_been_trained() -> None:
    def biggest(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none").max()

    model = nn.Sequential(Wide(), nn.BatchNorm1d(3).double())
    optimizer = torch.optim.Adam(model.parameters())
    x, y = rows(64)
    seed_everything()
    before = fingerprint(model, optimizer)
    with pytest.raises(InexactStepError):
        train(model, [(x, y)], 64, loss=biggest, optimizer=optimizer, memory_limit="30KiB")
    assert fingerprint(model, optimizer) == before


@pytest.mark.slow
def test_resnet_101_with_adam_takes_two_steps_of_50() -> None:
    torch.manual_seed(0)
    model = import_torchvision().models.resnet101(num_classes=10)
    adam = functools.partial(torch.optim.Adam, lr=5e-4)
    data = torch.randn(100, 3, 48, 48), torch.randint(0, 10, (100,))
    result = train(model, data, 100, optimizer=adam, memory_limit="970MiB")
    assert result.plan.micro_batch_sizes == (50, 50)
    assert result.steps == 1
    assert result.replays == 0


# Bad input: a clear error, at once, and nothing is changed.


@pytest.mark.parametrize(
    ("desired", "error"),
    [(0, ValueError), (-1, ValueError), (2.5, TypeError), ("256", TypeError), (True, TypeError)],
)
def test_a_bad_size_is_refused_with_the_value_that_came(
    desired: int, error: type[Exception]
) -> None:
    model = small_model()
    for call in (
        lambda: train(model, rows(8), desired),
        lambda: train(model, rows(8), 4, epochs=desired),
        lambda: train(model, rows(8), 4, max_steps=desired),
        lambda: find_batch_size(model, rows(8), ceiling=desired),
    ):
        with pytest.raises(error, match=f"at least 1, got {desired!r}"):
            call()


class Empty(Dataset[Tensor]):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Tensor:
        raise IndexError(index)


def frozen() -> nn.Module:
    return small_model().requires_grad_(False)


def no_reduction(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


BAD: dict[str, tuple[Callable[[], TrainingResult], type[Exception], str]] = {
    "an empty dataset": (lambda: train(small_model(), Empty()), ValueError, "empty"),
    "empty tensors": (lambda: train(small_model(), rows(0)), ValueError, "empty"),
    "an empty list": (lambda: train(small_model(), []), ValueError, "empty"),
    "an empty iterator": (lambda: train(small_model(), iter([])), ValueError, "empty"),
    "a loss of the wrong shape": (
        lambda: train(small_model(), rows(8), 4, loss=no_reduction),
        ValueError,
        "shape",
    ),
    "a loss without reduction": (
        lambda: train(small_model(), rows(8), 4, loss=nn.CrossEntropyLoss(reduction="none")),
        TypeError,
        "none",
    ),
    "a loss that is no function": (
        lambda: train(small_model(), rows(8), 4, loss="mse"),  # type: ignore[arg-type]
        TypeError,
        "mse",
    ),
    "a model without parameters": (
        lambda: train(nn.ReLU(), rows(8), 4),
        ValueError,
        "no parameters",
    ),
    "a frozen model": (lambda: train(frozen(), rows(8), 4), ValueError, "frozen"),
    "no model": (lambda: train(len, rows(8), 4), TypeError, "Module"),  # type: ignore[arg-type]
    "lengths that disagree": (
        lambda: train(small_model(), (rows(8)[0], rows(7)[1]), 4),
        ValueError,
        "agree in length",
    ),
    "batches whose lengths disagree": (
        lambda: train(small_model(), [(rows(8)[0], rows(7)[1])], 4),
        ValueError,
        "agree in length",
    ),
    "a limit below the model's own size": (
        lambda: train(small_model(), rows(8), 4, memory_limit=100),
        DoesNotFitError,
        "does not fit in 100 B: it needs at least 2.2 KiB more",
    ),
    "a limit that cannot be read": (
        lambda: train(small_model(), rows(8), 4, memory_limit="8GB?"),
        ValueError,
        "8GB",
    ),
    "a headroom that leaves nothing": (
        lambda: train(small_model(), rows(8), 4, memory_limit="64KiB", headroom="1MiB"),
        ValueError,
        "headroom of 1.0 MiB .* leaves nothing",
    ),
    "a headroom that cannot be read": (
        lambda: train(small_model(), rows(8), 4, headroom="much"),
        ValueError,
        "much",
    ),
    "a batch without target": (lambda: train(small_model(), [rows(8)[0]], 4), TypeError, "target"),
    "an unknown device": (
        lambda: train(small_model(), rows(8), 4, device="quantum"),
        ValueError,
        "quantum",
    ),
    "a device that is not here": (
        lambda: train(small_model(), rows(8), 4, device="cuda:63"),
        DeviceUnavailableError,
        "not here",
    ),
    "an optimizer of another model": (
        lambda: train(small_model(), rows(8), 4, optimizer=SGD(small_model().parameters())),
        ValueError,
        "none of the model's parameters",
    ),
    "epochs over a one-pass iterable": (
        lambda: train(small_model(), iter([rows(8)]), 4, epochs=2),
        ValueError,
        "one-pass",
    ),
    "text as data": (lambda: train(small_model(), "digits", 4), TypeError, "data must be"),
    "nothing left": (lambda: train(small_model(), rows(8), 9, drop_last=True), ValueError, "9"),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_what_came(
    call: Callable[[], TrainingResult], error: type[Exception], text: str
) -> None:
    seed_everything()
    with pytest.raises(error, match=text):
        call()


def test_bad_input_changes_nothing() -> None:
    model = nn.Sequential(small_model(), nn.BatchNorm1d(3).double())
    optimizer = torch.optim.Adam(model.parameters())
    train(model, rows(8), 4, optimizer=optimizer)
    model(rows(8)[0]).sum().backward()
    before = fingerprint(model, optimizer)
    for options in ({"loss": no_reduction}, {"memory_limit": 1500}, {"memory_limit": "8GB?"}):
        with pytest.raises((ValueError, DoesNotFitError)):
            train(model, [rows(8)], 4, optimizer=optimizer, **options)
        assert fingerprint(model, optimizer) == before


def test_an_error_of_the_loader_passes_through_untouched() -> None:
    def torn() -> Iterator[tuple[Tensor, Tensor]]:
        yield rows(8)
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        train(small_model(), torn(), 4)


def test_training_in_multiples_of_eight_takes_the_undivided_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 3)).double()
    data = torch.randn(300, 64, dtype=torch.float64), torch.randint(0, 3, (300,))
    start = copy.deepcopy(model.state_dict())

    def trained(**options: Any) -> tuple[TrainingResult, list[StepResult]]:
        model.load_state_dict(start)
        steps: list[StepResult] = []
        result = find_and_train(
            model,
            data,
            desired=100,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            epochs=8,  # Longer than timing six sizes takes.
            seed=1,
            on_step=steps.append,
            progress=False,
            **options,
        )
        return result, steps

    whole, _ = trained()
    eights, steps = trained(
        search=SearchOptions(multiple_of=8), memory_limit="1.4MiB", prefer="fastest"
    )
    assert eights.plan.accumulation_steps > 1
    for step in steps:
        assert all(size % 8 == 0 for size in step.micro_batch_sizes[:-1])
    assert all(trial.size % 8 == 0 for trial in eights.search.trials if trial.size < 100)
    assert eights.losses == pytest.approx(whole.losses, rel=1e-12)


def ahead(
    self: Prefetcher,
    parts: Sequence[BatchTree],
    *,
    only_reads_targets: bool = False,  # noqa: ARG001  # On the CPU alone is that of interest.
    more_follow: bool = False,
) -> Iterator[BatchTree]:
    """What a GPU does: the next one is there while the current one computes."""
    following = self.move(parts[0])
    for part in (*parts[1:], *(parts[-1:] if more_follow else ())):
        current, following = following, self.move(part)
        yield current
        del current
    if not more_follow:
        yield following


@pytest.mark.parametrize("kib", [300, 390, 400, 430, 500, 700, 790])
def test_a_short_logical_batch_is_not_taken_to_need_more_when_batches_are_prefetched(
    kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs are all there is: undivided, half of what the line says is enough."""
    monkeypatch.setattr(Prefetcher, "__call__", ahead)
    monkeypatch.setattr(Prefetcher, "copies_ahead", True)
    data = torch.randn(96, 1024), torch.randn(96, 1)

    def found(confirm: Confirm) -> int:
        model = nn.Linear(1024, 1)
        return train(
            model, data, 96, optimizer=functools.partial(torch.optim.SGD, lr=1e-9), max_steps=1,
            memory_limit=kib * 1024, search=SearchOptions(confirm=confirm),
        ).search.size  # fmt: skip

    assert found("extrapolated") == found("failed")


@pytest.mark.parametrize("kib", range(590, 800, 30))
def test_the_loss_of_a_whole_batch_rules_nothing_out(kib: int) -> None:
    """Undivided, its outputs are alive once; divided, joined as well: less is needed, not more."""
    data = torch.randn(96, 64), torch.randn(96, 1)

    def found(confirm: Confirm) -> int:
        return train(
            nn.Linear(64, 512), data, 96, loss=WholeBatch(lambda out, _: out.mean()), max_steps=1,
            optimizer=functools.partial(torch.optim.SGD, lr=1e-9), memory_limit=kib * 1024,
            search=SearchOptions(confirm=confirm),
        ).search.size  # fmt: skip

    assert found("extrapolated") == found("failed")


@pytest.mark.parametrize("kib", [480, 560, 620])
def test_the_loss_of_a_whole_batch_may_fit_undivided_where_no_part_does(kib: int) -> None:
    data = torch.randn(96, 64), torch.randn(96, 1)
    result = train(
        nn.Linear(64, 512), data, 96, loss=WholeBatch(lambda out, _: out.mean()), max_steps=1,
        optimizer=functools.partial(torch.optim.SGD, lr=1e-9), memory_limit=kib * 1024,
    )  # fmt: skip
    assert result.search.size == 96
    assert result.plan.accumulation_steps == 1
