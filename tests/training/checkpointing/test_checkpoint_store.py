"""A training that was stopped goes on bit for bit, and a file that is not whole is never used."""

import itertools
import os
import random
import resource
import signal
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import bits, fingerprint, identities
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    lr_scheduler,
)

from autobatch.errors import CheckpointError
from autobatch.training.checkpointing.state_dict import (
    Stateful,
    packed,
    packed_random_state,
    restore_random_state,
    unpack,
)
from autobatch.training.checkpointing.store import CheckpointStore

TENTH: Final = cast("float", np.float32(0.1))  # No subclass of float, as people pass it.
Parameters = Iterator[nn.Parameter]
Undo = Callable[[], object]

OPTIMIZERS: Final[dict[str, Callable[[Parameters], Optimizer]]] = {
    "sgd": lambda p: SGD(p, 0.1),
    "sgd momentum": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd foreach": lambda p: SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: SGD(p, 0.1, momentum=0.9, fused=True),
    "sgd with numpy's numbers": lambda p: SGD(p, TENTH, momentum=np.float64(0.9)),
    "adam": lambda p: Adam(p, 0.1),
    "adam amsgrad": lambda p: Adam(p, 0.1, amsgrad=True),
    "adam foreach": lambda p: Adam(p, 0.1, foreach=True),
    "adam fused": lambda p: Adam(p, 0.1, amsgrad=True, fused=True),
    "adam with its rate in a tensor": lambda p: Adam(p, torch.tensor(0.1), foreach=False),
    "adamw": lambda p: AdamW(p, 0.1),
    "adamw fused": lambda p: AdamW(p, 0.1, fused=True),
    "adamax": lambda p: Adamax(p, 0.1),
    "nadam": lambda p: NAdam(p, 0.1),
    "nadam foreach": lambda p: NAdam(p, 0.1, foreach=True),
    "radam": lambda p: RAdam(p, 0.1),
    "rmsprop": lambda p: RMSprop(p, 0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: Adagrad(p, 0.1),
    "adagrad fused": lambda p: Adagrad(p, 0.1, fused=True),
    "adadelta": lambda p: Adadelta(p, 0.1),
    "adafactor": lambda p: Adafactor(p, 0.1),
    "asgd": lambda p: ASGD(p, 0.1, t0=2),
    "asgd foreach": lambda p: ASGD(p, 0.1, t0=2, foreach=True),
    "rprop": lambda p: Rprop(p, 0.1),
}

SCHEDULERS: Final[dict[str, Callable[[Optimizer], Stateful]]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 6, 6, 9]),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "lambda that is an object": lambda o: lr_scheduler.LambdaLR(o, Countdown()),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 1 - n / 100),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "exponential of numpy": lambda o: lr_scheduler.ExponentialLR(o, 9 * TENTH),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=30),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "cyclic of one's own": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=4, scale_fn=lambda x: 0.5**x
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=20),
    "constant": lambda o: lr_scheduler.ConstantLR(o, total_iters=7),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 20, power=2.0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 9)], [6]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=7), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


class Countdown:
    """A schedule with a memory."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1 / (1 + step + self.calls)


class Network(nn.Module):
    """All that a module may hold: parameters tied and not, statistics, and what is not saved."""

    table: Tensor
    moving: Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(6, 6)
        self.tied = self.last
        self.register_buffer("table", torch.ones(1).expand(6), persistent=False)
        self.register_buffer("moving", torch.zeros(6), persistent=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.drop(self.norm(self.first(x)))
        with torch.no_grad():
            self.moving.lerp_(hidden.mean(0), 0.1)
        hidden = hidden + 0.1 * self.moving * self.table + 0.01 * self.calls
        return cast("Tensor", self.tied(self.last(hidden).relu()))

    def get_extra_state(self) -> object:
        return torch.ones(self.calls)  # One that grows.

    def set_extra_state(self, state: object) -> None:
        assert isinstance(state, Tensor)
        self.calls = len(state)


@dataclass
class Training:
    """All that goes into a checkpoint, and its step."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Stateful | None
    scaler: torch.amp.GradScaler | None
    generator: torch.Generator

    @classmethod
    def fresh(
        cls,
        optimizer: str = "adam",
        scheduler: str | None = None,
        *,
        scaler: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> "Training":
        torch.manual_seed(seed)
        model = Network().to(dtype)
        own = OPTIMIZERS[optimizer](model.parameters())
        return cls(
            model=model,
            optimizer=own,
            scheduler=None if scheduler is None else SCHEDULERS[scheduler](own),
            scaler=torch.amp.GradScaler("cpu", growth_interval=2) if scaler else None,
            generator=torch.Generator().manual_seed(seed),
        )

    def step(self) -> None:
        parameter = next(self.model.parameters())
        x = torch.randn(8, 4, generator=self.generator).to(parameter.dtype)
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss.item())
        elif isinstance(self.scheduler, lr_scheduler.LRScheduler):
            self.scheduler.step()

    def fields(self) -> dict[str, object]:
        own = packed(self.model, self.optimizer, self.scheduler, self.scaler)
        return {**own, "random": packed_random_state([self])}

    def put(self, fields: dict[str, object]) -> None:
        unpack(fields, self.model, self.optimizer, self.scheduler, self.scaler)
        random_state = fields["random"]
        assert isinstance(random_state, dict)
        restore_random_state(random_state, [self])

    def prints(self) -> dict[str, object]:
        """Every bit of it, but an optimizer's defaults: loading adds some, for groups to come."""
        everything = (self.model, self.optimizer, self.scheduler, self.scaler, self.generator)
        prints = fingerprint(*everything)
        return {name: value for name, value in prints.items() if "defaults" not in name}


def stopped_and_resumed(
    directory: Path, fresh: Callable[[int], Training], *, before: int = 3, after: int = 3
) -> tuple[Training, Training]:
    """A training that never stopped, and one that was saved and went on in another."""
    straight = fresh(0)
    for _ in range(before):
        straight.step()
    CheckpointStore(directory).save(straight.fields(), step=before)
    for _ in range(after):
        straight.step()
    straight_prints = straight.prints()
    resumed = fresh(1)
    found = CheckpointStore(directory).latest()
    assert found is not None
    resumed.put(found[1])
    for _ in range(after):
        resumed.step()
    assert resumed.prints() == straight_prints
    return straight, resumed


def contents(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def stored(directory: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(directory)
    for step in steps:
        store.save({"step": step, "values": torch.full((8,), float(step))}, step=step)
    return store


def latest_step(store: CheckpointStore) -> object:
    found = store.latest()
    return None if found is None else found[1]["step"]


# Files


def test_where_nothing_was_saved_there_is_nothing_and_nothing_is_made(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").latest() is None
    assert CheckpointStore(str(tmp_path)).latest() is None
    assert contents(tmp_path) == []


def test_a_file_in_place_of_the_directory_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="file is a file"):
            CheckpointStore(path)


@pytest.mark.parametrize("name", [".", "below", "below/that"])
def test_where_nothing_can_be_written_is_refused_at_once(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(ValueError, match=f"cannot be written to .*: {tmp_path} is read-only"):
        CheckpointStore(tmp_path / name)
    CheckpointStore(tmp_path.parent)


def test_a_negative_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 0, got -1"):
        CheckpointStore(tmp_path).save({}, step=-1)


def test_what_was_saved_is_loaded_and_by_plain_torch_as_well(tmp_path: Path) -> None:
    fields = {
        "model": OrderedDict(a=torch.arange(3.0), b=torch.ones(2, dtype=torch.bfloat16)),
        "odd": [1, (2, {3: None}), {4}, 2**200, -0.0, float("inf"), "text", b"bytes", 1j, True],
        "counts": Counter({3: 1}),
        "sparse": torch.eye(3).to_sparse(),
    }
    path = CheckpointStore(tmp_path / "new" / "one").save(fields, step=12)
    assert path == tmp_path / "new" / "one" / "step-00000012.pt"
    found = CheckpointStore(path.parent).latest()
    assert found is not None
    assert found[0] == path
    for loaded in (found[1], torch.load(path, weights_only=True)):
        assert fingerprint(loaded) == fingerprint(fields)


def test_a_number_of_numpy_comes_back_as_it_was(tmp_path: Path) -> None:
    numbers = [kind(1) for kind in (np.float16, np.float32, np.float64, np.int8, np.uint64, bool)]
    CheckpointStore(tmp_path).save({"numbers": numbers}, step=0)
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    loaded = found[1]["numbers"]
    assert isinstance(loaded, list)
    assert loaded == numbers
    assert [*map(type, loaded)] == [*map(type, numbers)]


def test_a_slice_does_not_drag_all_its_memory_along(tmp_path: Path) -> None:
    large = torch.zeros(1_000, 1_000)
    views = {"row": large[3], "turned": large[:4].T, "one": large[0, 0].expand(9)}
    path = CheckpointStore(tmp_path).save({"nested": [(views,)]}, step=0)
    assert path.stat().st_size < 40_000
    loaded = torch.load(path, weights_only=True)["nested"][0][0]
    for name, view in views.items():
        assert torch.equal(loaded[name], view)


def test_what_is_saved_is_no_parameter_and_the_caller_keeps_his(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    fields: dict[str, object] = {"one": {"weight": parameter}}
    path = CheckpointStore(tmp_path).save(fields, step=0)
    assert type(torch.load(path, weights_only=True)["one"]["weight"]) is Tensor
    assert fields == {"one": {"weight": parameter}}


def test_the_two_newest_are_kept_and_only_leftovers_of_its_own_are_removed(tmp_path: Path) -> None:
    others = ["notes.txt", "step-1.pt", "step-00000000.pt", "step-00000001.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"somebody's")
    (tmp_path / "step-00000003.pt.tmp").write_bytes(b"half")
    stored(tmp_path, 1, 2, 30, 99_999_999)
    stored(tmp_path, 100_000_000)
    assert contents(tmp_path) == sorted([*others, "step-100000000.pt", "step-99999999.pt"])
    assert latest_step(CheckpointStore(tmp_path)) == 100_000_000


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    store = stored(tmp_path, 1, 2)
    store.save({"step": "again"}, step=2)
    assert latest_step(store) == "again"
    assert contents(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]


def damaged(directory: Path, content: bytes) -> CheckpointStore:
    """Checkpoints 1 and 2, of which the second's file holds something else."""
    (directory / "step-00000002.pt").write_bytes(content)
    return CheckpointStore(directory)


def whole(directory: Path) -> bytes:
    """The second's file as it should be."""
    stored(directory, 1, 2)
    return (directory / "step-00000002.pt").read_bytes()


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    directory = tmp_path_factory.mktemp("damaged")
    return directory, whole(directory)


@given(data=st.data())
def test_a_file_cut_short_anywhere_is_refused(
    second: tuple[Path, bytes], data: st.DataObject
) -> None:
    directory, content = second
    end = data.draw(st.integers(0, len(content) - 1))
    with pytest.warns(UserWarning, match=r"2\.pt is refused: .*; step-00000001\.pt is used"):
        assert latest_step(damaged(directory, content[:end])) == 1
    assert latest_step(damaged(directory, content)) == 2, "the control: a whole one is used"


@given(data=st.data())
def test_a_file_with_one_wrong_bit_anywhere_is_refused(
    second: tuple[Path, bytes], data: st.DataObject
) -> None:
    directory, content = second
    wrong = bytearray(content)
    near_the_end = st.integers(len(content) - 110, len(content) - 1)
    wrong[data.draw(st.integers(0, len(content) - 1) | near_the_end)] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    with pytest.warns(UserWarning, match=r"2\.pt is refused: .*; step-00000001\.pt is used"):
        assert latest_step(damaged(directory, bytes(wrong))) == 1


def test_torch_alone_would_not_see_a_wrong_bit(tmp_path: Path) -> None:
    content = bytearray(whole(tmp_path))
    content[content.index(torch.full((8,), 2.0).numpy().tobytes())] ^= 1
    damaged(tmp_path, bytes(content))
    assert torch.load(tmp_path / "step-00000002.pt", weights_only=True)["values"][0] != 2.0


def test_bytes_after_the_end_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="differ from those that were written"):
        assert latest_step(damaged(tmp_path, whole(tmp_path) + b"\0")) == 1


def test_a_file_of_another_program_is_refused_and_never_removed(tmp_path: Path) -> None:
    store = stored(tmp_path, 1, 2)
    torch.save({"step": 9}, tmp_path / "step-00000009.pt")
    with pytest.warns(UserWarning, match=r"9\.pt is refused: autobatch's mark is not at its end"):
        assert latest_step(store) == 2
    stored(tmp_path, 10, 11, 12)
    assert contents(tmp_path) == ["step-00000009.pt", "step-00000011.pt", "step-00000012.pt"]


def test_another_version_of_the_format_is_named(tmp_path: Path) -> None:
    content = whole(tmp_path).replace(b"autobatch checkpoint 2", b"autobatch checkpoint 7")
    with pytest.warns(UserWarning, match=r"its format is 7, and this version of autobatch reads 2"):
        assert latest_step(damaged(tmp_path, content)) == 1


def test_where_none_is_whole_each_is_named_with_its_reason(tmp_path: Path) -> None:
    stored(tmp_path, 1)
    (tmp_path / "step-00000001.pt").write_bytes(b"")
    (tmp_path / "step-00000002.pt").mkdir()
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(tmp_path).latest()
    for part in ("1.pt: autobatch's mark", "2.pt: [Errno", str(tmp_path), "remove", "another"):
        assert part in str(caught.value)


def test_after_a_refusal_the_training_goes_on_from_the_one_before(tmp_path: Path) -> None:
    content = bytearray(whole(tmp_path))
    content[100] ^= 1
    store = damaged(tmp_path, bytes(content))
    with pytest.warns(UserWarning, match="is refused"):
        assert latest_step(store) == 1
    store.save({"step": "between"}, step=1)
    store.save({"step": "again"}, step=2)
    assert latest_step(store) == "again"
    assert contents(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]
    for step in (3, 4):
        store.save({"step": step}, step=step)
    assert contents(tmp_path) == ["step-00000003.pt", "step-00000004.pt"]


def test_a_refused_file_of_a_later_step_is_not_in_the_way(tmp_path: Path) -> None:
    content = bytearray(whole(tmp_path))
    content[100] ^= 1
    stored(tmp_path, 3, 30)
    (tmp_path / "step-00000030.pt").write_bytes(content)
    store = CheckpointStore(tmp_path)
    with pytest.warns(UserWarning, match="is refused"):
        assert latest_step(store) == 3
    for step in (4, 5):
        store.save({"step": step}, step=step)
    with pytest.warns(UserWarning, match="is refused"):
        assert latest_step(store) == 5


def test_a_training_never_writes_below_another_that_got_further(tmp_path: Path) -> None:
    stored(tmp_path, 5, 6)
    with pytest.raises(CheckpointError, match=r"6\.pt is of a later step than step 2"):
        stored(tmp_path, 2)
    assert contents(tmp_path) == ["step-00000005.pt", "step-00000006.pt"]


# Writing that fails


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "torch.save"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    store = stored(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(broken, no_space)
        with pytest.raises(OSError, match="No space"):
            store.save({"step": 3}, step=3)
    assert contents(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]
    assert latest_step(store) == 2
    assert latest_step(stored(tmp_path, 3)) == 3


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_another_failure_passes_through_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    store = stored(tmp_path, 1, 2)

    def fails(_: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise error("odd")

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", fails)
        with pytest.raises(error, match="odd"):
            store.save({"step": 3}, step=3)
    assert contents(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]
    assert latest_step(store) == 2


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    store = stored(tmp_path, 1, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    default = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            store.save({"large": torch.ones(1_000_000)}, step=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, default)
    assert contents(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]
    assert latest_step(store) == 2


def test_nothing_older_goes_before_the_new_name_has_lasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path, 1, 2)
    synced: list[bool] = []

    def fails_for_directories(descriptor: int) -> None:
        synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))
        if synced[-1]:
            no_space()

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails_for_directories)
        with pytest.raises(OSError, match="No space"):
            store.save({"step": 3}, step=3)
    assert synced == [False, True], "first what is in the file, then its name"
    assert contents(tmp_path) == [f"step-0000000{step}.pt" for step in (1, 2, 3)]


def test_a_crash_before_the_renaming_is_as_if_nothing_had_been_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", no_space)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # Nobody is left to clean up.
        with pytest.raises(OSError, match="No space"):
            store.save({"step": 3}, step=3)
    assert contents(tmp_path)[-1] == "step-00000003.pt.tmp"
    assert latest_step(CheckpointStore(tmp_path)) == 2
    stored(tmp_path, 4)
    assert contents(tmp_path) == ["step-00000002.pt", "step-00000004.pt"]


class Odd:
    """What no checkpoint can hold."""


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (lambda: 0, "lambda"),
        (deque([1]), "deque"),
        (Odd(), "test_checkpoint_store.Odd"),
        ((n for n in range(3)), "generator"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(
    tmp_path: Path, odd: object, named: str
) -> None:
    store = stored(tmp_path, 1)
    with pytest.raises(CheckpointError, match=named):
        store.save({"state": [odd]}, step=2)
    assert contents(tmp_path) == ["step-00000001.pt"]


def test_a_atomic_file_with_a_class_that_is_not_trusted_here_is_refused(tmp_path: Path) -> None:
    store = stored(tmp_path, 1)
    with torch.serialization.safe_globals([Odd]):
        store.save({"step": 2, "odd": Odd()}, step=2)
        assert latest_step(store) == 2
    with pytest.warns(UserWarning, match=r"is refused: Unsupported global: .*\.Odd was not an all"):
        assert latest_step(store) == 1


# Training goes on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(
    tmp_path: Path, optimizer: str, dtype: torch.dtype
) -> None:
    if (optimizer, dtype) == ("sgd fused", torch.bfloat16):
        # Torch 2.13 reads memory that nobody wrote: github.com/pytorch/pytorch/issues/191763
        optimizer = "sgd foreach"
    stopped_and_resumed(tmp_path, lambda seed: Training.fresh(optimizer, dtype=dtype, seed=seed))


def rates(training: Training, steps: int) -> list[object]:
    """What the scheduler makes of the groups, step by step."""
    torch.manual_seed(7)
    found: list[object] = []
    for _ in range(steps):
        training.step()
        [group] = training.optimizer.param_groups
        kinds = ("lr", "momentum", "betas")
        found.append([repr(group.get(kind)) for kind in kinds])
    return found


@pytest.mark.parametrize("before", [1, 5])
@pytest.mark.parametrize("optimizer", ["sgd momentum", "adam with its rate in a tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_schedule_goes_on_bit_for_bit(
    tmp_path: Path, scheduler: str, optimizer: str, before: int
) -> None:
    straight, resumed = stopped_and_resumed(
        tmp_path, lambda seed: Training.fresh(optimizer, scheduler, seed=seed), before=before
    )
    assert rates(straight, 8) == rates(resumed, 8)


def test_a_fresh_schedule_would_differ() -> None:
    straight = Training.fresh("sgd", "cosine")
    rates(straight, 5)
    assert rates(straight, 5) != rates(Training.fresh("sgd", "cosine"), 5)


def test_the_same_fields_can_be_put_back_twice(tmp_path: Path) -> None:
    straight = Training.fresh("sgd momentum", "cyclic")
    CheckpointStore(tmp_path).save(straight.fields(), step=1)
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    for _ in range(2):
        Training.fresh("sgd momentum", "cyclic").put(found[1])


@settings(max_examples=25)
@given(before=st.integers(0, 7), after=st.integers(1, 5))
def test_scaler_schedule_and_statistics_go_on_wherever_it_stopped(
    tmp_path_factory: pytest.TempPathFactory, before: int, after: int
) -> None:
    stopped_and_resumed(
        tmp_path_factory.mktemp("stopped"),
        lambda seed: Training.fresh("adamw", "one cycle", scaler=True, seed=seed),
        before=before,
        after=after,
    )


class Master(Optimizer):
    """Keeps float32 values of bfloat16 parameters, as mixed precision does, and text."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # No closure here.
        assert closure is None
        for parameter in self.param_groups[0]["params"]:
            entry = self.state[parameter]
            if not entry:
                entry["master"] = parameter.detach().float().clone()
                entry["past"] = {"gradients": [], "first": (parameter.grad.float() / 3, "text")}
                entry["kind"] = "float32"
            entry["past"]["gradients"].append(parameter.grad.float() / 3)
            entry["master"] -= 0.01 * sum(entry["past"]["gradients"][-2:])
            entry["master"] -= 0.01 * entry["past"]["first"][0]
            with torch.no_grad():
                parameter.copy_(entry["master"])


OPTIMIZERS["master"] = Master


def test_state_keeps_its_dtype_and_torch_alone_would_lose_it(tmp_path: Path) -> None:
    _, resumed = stopped_and_resumed(
        tmp_path, lambda seed: Training.fresh("master", dtype=torch.bfloat16, seed=seed)
    )
    parameter = next(resumed.model.parameters())
    entry = resumed.optimizer.state[parameter]
    assert entry["master"].dtype is torch.float32
    resumed.optimizer.load_state_dict(resumed.optimizer.state_dict())
    entry = resumed.optimizer.state[parameter]
    assert (entry["master"].dtype, entry["kind"]) != (torch.float32, "float32"), "the control"


def test_the_objects_stay_the_same(tmp_path: Path) -> None:
    straight = Training.fresh("adam with its rate in a tensor")
    straight.step()
    straight.optimizer.param_groups[0]["lr"].fill_(0.7)
    CheckpointStore(tmp_path).save(straight.fields(), step=1)
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    resumed = Training.fresh("adam with its rate in a tensor", seed=1)
    before = identities(resumed.model), resumed.optimizer.param_groups[0]["lr"]
    resumed.put(found[1])
    assert identities(resumed.model) == before[0]
    assert resumed.optimizer.param_groups[0]["lr"] is before[1]
    assert before[1] == torch.tensor(0.7)


# What does not fit


def other_width() -> Training:
    training = Training.fresh()
    return with_model(training, Network(width=5))


def with_model(training: Training, model: nn.Module) -> Training:
    training.model, training.optimizer = model, Adam(model.parameters(), 0.1)
    return training


def deeper() -> Training:
    return with_model(Training.fresh(), nn.Sequential(Network(), nn.Linear(6, 6)))


def with_one_more() -> Training:
    training = Training.fresh()
    training.model.more = nn.Parameter(torch.ones(2))  # The optimizer does not hold it.
    return training


def two_groups() -> Training:
    training = Training.fresh()
    first, *others = training.model.parameters()
    training.optimizer = Adam([{"params": [first]}, {"params": others}], 0.1)
    return training


def another_order() -> Training:
    training = Training.fresh()
    training.optimizer = Adam([*reversed([*training.model.parameters()])], 0.1)
    return training


def disabled() -> Training:
    training = Training.fresh(scaler=True)
    training.scaler = torch.amp.GradScaler("cpu", enabled=False)
    return training


def chained_of_one() -> Training:
    training = Training.fresh("adam", "step")
    scheduler = training.scheduler
    assert isinstance(scheduler, lr_scheduler.LRScheduler)
    training.scheduler = lr_scheduler.ChainedScheduler([scheduler])
    return training


MISFITS: Final[dict[str, tuple[Callable[[], Training], Callable[[], Training], str]]] = {
    "shape": (Training.fresh, other_width, r"first.weight is \(6, 4\) float32 .* \(6, 5\) float32"),
    "dtype": (
        Training.fresh,
        lambda: Training.fresh(dtype=torch.float64),
        r"first.weight is \(6, 4\) float32 in the checkpoint and \(6, 4\) float64 here",
    ),
    "names": (Training.fresh, deeper, r"first.weight is .* and missing here.*; and \d+ more;"),
    "one more": (Training.fresh, with_one_more, r"more is missing in the checkpoint and \(2,\)"),
    "optimizer": (
        Training.fresh,
        lambda: Training.fresh("adamw"),
        "optimizer is Adam in the checkpoint and AdamW here",
    ),
    "groups": (Training.fresh, two_groups, r"group 0, 1 is first.bias .* and missing here"),
    "order": (Training.fresh, another_order, r"group 0, 0 is first.weight .* and last.bias"),
    "scheduler": (
        lambda: Training.fresh("adam", "step"),
        Training.fresh,
        "scheduler is StepLR in the checkpoint and none here",
    ),
    "no scheduler": (
        Training.fresh,
        lambda: Training.fresh("adam", "step"),
        "scheduler is none in the checkpoint and StepLR here",
    ),
    "nested schedulers": (
        lambda: Training.fresh("adam", "chained"),
        chained_of_one,
        r"is ChainedScheduler\(ConstantLR, ExponentialLR\) .* ChainedScheduler\(StepLR\) here",
    ),
    "scaler": (Training.fresh, lambda: Training.fresh(scaler=True), "none .* GradScaler here"),
    "disabled scaler": (
        lambda: Training.fresh(scaler=True),
        disabled,
        "scaler is GradScaler in the checkpoint and GradScaler, disabled here",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path: Path, misfit: str) -> None:
    saved_one, present_one, message = MISFITS[misfit]
    saved = saved_one()
    saved.step()
    CheckpointStore(tmp_path).save(saved.fields(), step=1)
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    present = present_one()
    before = present.prints()
    with pytest.raises(CheckpointError, match=message):
        present.put(found[1])
    assert present.prints() == before


def test_a_file_without_a_training_in_it_is_refused() -> None:
    fresh = Training.fresh()
    with pytest.raises(CheckpointError, match="holds no description"):
        unpack({"model": {}}, fresh.model, fresh.optimizer, None, None)


def test_a_buffer_that_is_not_saved_and_has_another_shape_is_named(tmp_path: Path) -> None:
    saved, present = Training.fresh(), Training.fresh()
    saved.step()
    present.model.moving = torch.full((7,), 3.0)
    CheckpointStore(tmp_path).save(saved.fields(), step=1)
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    with pytest.warns(UserWarning, match="the buffers moving are not in the model"):
        present.put(found[1])
    assert present.model.moving.tolist() == [3.0] * 7


def test_where_warnings_are_errors_that_buffer_changes_nothing() -> None:
    saved, present = Training.fresh(), Training.fresh()
    saved.step()
    present.model.moving = torch.full((7,), 3.0)
    before = present.prints()
    with pytest.raises(UserWarning, match="moving"):
        present.put(saved.fields())
    assert present.prints() == before


# Random numbers


def numpy_generator(bits_of: Callable[[int], np.random.BitGenerator]) -> Callable[[int], object]:
    return lambda seed: np.random.Generator(bits_of(seed))


def draw_torch(generator: object) -> object:
    assert isinstance(generator, torch.Generator)
    return torch.randn(3, generator=generator).tolist()  # Odd: half a pair is kept for later.


def draw_python(generator: object) -> object:
    assert isinstance(generator, random.Random)
    return [generator.random(), generator.gauss(0, 1)]


def draw_numpy(generator: object) -> object:
    assert isinstance(generator, np.random.Generator)
    return [generator.integers(9, dtype=np.int32), *generator.random(3), generator.normal()]


def draw_legacy(generator: object) -> object:
    assert isinstance(generator, np.random.RandomState)
    return [*generator.normal(size=3), generator.randint(9)]


GENERATORS: Final[dict[str, tuple[Callable[[int], object], Callable[[object], object]]]] = {
    "torch": (lambda seed: torch.Generator().manual_seed(seed), draw_torch),
    "python": (random.Random, draw_python),
    **{
        f"numpy {bits_of.__name__}": (
            numpy_generator(bits_of),
            draw_numpy,
        )
        for bits_of in (
            np.random.PCG64,
            np.random.PCG64DXSM,
            np.random.Philox,
            np.random.SFC64,
            np.random.MT19937,
        )
    },
    "numpy legacy": (np.random.RandomState, draw_legacy),
    "numpy legacy of philox": (
        lambda seed: np.random.RandomState(np.random.Philox(seed)),
        draw_legacy,
    ),
}


def draw_globals() -> object:
    return [
        torch.randn(3).tolist(),
        [*np.random.normal(size=3)],
        [random.random(), random.gauss(0, 1)],
    ]


def saved_random_state(directory: Path, sources: list[object]) -> dict[str, object]:
    CheckpointStore(directory).save(packed_random_state(sources), step=0)
    return torch_loaded(directory)


def torch_loaded(directory: Path) -> dict[str, object]:
    loaded = torch.load(directory / "step-00000000.pt", weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), draws=st.integers(0, 400), kinds=st.data())
def test_every_generator_draws_on_as_if_nothing_had_been(
    tmp_path_factory: pytest.TempPathFactory, seed: int, draws: int, kinds: st.DataObject
) -> None:
    names = kinds.draw(st.lists(st.sampled_from(sorted(GENERATORS)), max_size=4))
    own: list[object] = [GENERATORS[name][0](seed) for name in names]

    def draw(generators: list[object]) -> object:
        return [GENERATORS[name][1](own) for name, own in zip(names, generators, strict=True)]

    for _ in range(draws % 5):
        draw_globals(), draw(own)
    random.getrandbits(32 * draws + 1)
    # However they are held: in a list, in an object, behind a function.
    fields = saved_random_state(tmp_path_factory.mktemp("random"), [own, Holder(own[:1])])
    expected = draw_globals(), draw(own), draw_globals(), draw(own)
    random.seed(1), torch.manual_seed(1), np.random.seed(1)
    others: list[object] = [GENERATORS[name][0](seed + 1) for name in names]
    assert (draw_globals(), draw(others)) != expected[:2], "the control"
    restore_random_state(fields, [others, Holder(others[:1])])
    assert (draw_globals(), draw(others), draw_globals(), draw(others)) == expected


@dataclass
class Holder:
    inside: object


@pytest.mark.parametrize(("was", "now"), [*itertools.permutations(GENERATORS, 2)])
def test_another_kind_of_generator_is_refused_before_anything_changes(was: str, now: str) -> None:
    fields = packed_random_state([[GENERATORS[was][0](0)]])
    create, draw = GENERATORS[now]
    present = create(5)
    torch.manual_seed(5)
    before = fingerprint()
    with pytest.raises(CheckpointError, match="the random generators of the data"):
        restore_random_state(fields, [[present]])
    assert fingerprint() == before
    assert draw(present) == draw(create(5))


def test_another_number_of_generators_is_refused() -> None:
    one, two = [random.Random(0)], [random.Random(0), random.Random(1)]
    for was, now in ((one, two), (two, one), (one, []), ([], one)):
        with pytest.raises(CheckpointError, match="the random generators of the data"):
            restore_random_state(packed_random_state([was]), [now])


def test_only_the_gpus_that_are_here_get_their_state(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.tensor([n], dtype=torch.uint8) for n in range(3)]
    put: list[Tensor] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state_all", lambda: states)
    fields = packed_random_state([])
    assert [bits(state) for state in states] == [*map(bits, tensors(fields["cuda"]))]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_rng_state_all", put.extend)
    restore_random_state(fields, [])
    assert put == states[:2]


def test_generators_of_other_accelerators_are_kept_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    on_xpu, on_mps, put = [torch.tensor([1])], torch.tensor([2]), list[Tensor]()
    for name, answer in {
        "xpu.is_initialized": True,
        "xpu.is_available": True,
        "xpu.device_count": 1,
        "xpu.get_rng_state_all": on_xpu,
        "mps.is_available": True,
        "mps.get_rng_state": on_mps,
    }.items():
        monkeypatch.setattr(f"torch.{name}", lambda answer=answer: answer)
    monkeypatch.setattr("torch.xpu.set_rng_state_all", put.extend)
    monkeypatch.setattr("torch.mps.set_rng_state", put.append)
    fields = packed_random_state([])
    restore_random_state(fields, [])
    assert put == [*on_xpu, on_mps]
    older = {name: part for name, part in fields.items() if name not in ("xpu", "mps")}
    restore_random_state(older, [])
    assert put == [*on_xpu, on_mps]


def tensors(value: object) -> list[Tensor]:
    assert isinstance(value, list)
    return value
