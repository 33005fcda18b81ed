"""A new kind of device is one class and one line: nothing else of the package asks for a kind."""

import ast
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autobatch
from autobatch import TrainingResult, check, find_and_train, find_batch_size
from autobatch.devices import factory
from autobatch.devices.base import MemoryDevice, MemoryReading
from autobatch.devices.cpu import _Meter
from autobatch.devices.factory import choose_device, open_device
from autobatch.events import Event, TrainingStarted
from autobatch.training.engine import loss_record as ledger

KIB = 2**10
CARD, CONTEXT = 160 * KIB, 4 * KIB


class Card(MemoryDevice):
    """An accelerator with memory, a generator and float32 of its own; its tensors are the CPU's."""

    generator = torch.Generator()
    taken_bytes = 0  # By another process, at any time.

    def __init__(self, residents: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__(torch.device("cpu"))
        self._residents = residents
        self._meter = _Meter()  # The card's allocator.

    @classmethod
    def open(
        cls,
        torch_device: torch.device,  # noqa: ARG003
        residents: Callable[[], Iterable[Tensor]],
        *,
        counts_host: bool,  # noqa: ARG003
    ) -> "Card":
        return cls(residents)

    @property
    def name(self) -> str:
        return "a card"

    def read(self) -> MemoryReading:
        for tensor in self._residents():
            self._meter.note(tensor)
        live, outside = self._meter.live_bytes, CONTEXT + self.taken_bytes
        return MemoryReading(
            total_bytes=CARD,
            free_bytes=CARD - outside - live,
            allocated_bytes=live,
            reserved_bytes=live,
            peak_bytes=self._meter.peak_bytes,
            peak_reserved_bytes=self._meter.peak_bytes,
            outside_bytes=outside,
        )

    @contextmanager
    def limited_to(self, limit_bytes: int) -> Iterator[None]:
        self.read()
        outer = self._meter.limit_bytes
        allowed = min(limit_bytes, CARD - CONTEXT - self.taken_bytes)
        self._meter.limit_bytes = allowed if outer is None else min(outer, allowed)
        try:
            if outer is None:
                with self._meter:
                    yield
            else:
                yield
        finally:
            self._meter.limit_bytes = outer

    def reset_peak(self) -> None:
        self._meter.peak_bytes = self._meter.live_bytes

    def release_cached(self) -> None: ...

    def synchronize(self) -> None: ...

    @staticmethod
    def widest_dtype(torch_device: torch.device) -> torch.dtype:  # noqa: ARG004
        return torch.float32

    @staticmethod
    def rng_states() -> list[Tensor]:
        return [Card.generator.get_state()]

    @staticmethod
    def set_rng_states(states: Sequence[Tensor]) -> None:
        for state in states:
            Card.generator.set_state(state)


class Noisy(nn.Module):
    """Draws from the card's generator, as dropout does on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x + torch.rand(x.shape, generator=Card.generator))
        return scores


DESIRED, ROWS, EPOCHS = 256, 640, 2
STEPS = EPOCHS * 3  # The last one of an epoch is short.


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 16, generator=generator)
    return x, torch.randint(0, 3, (ROWS,), generator=generator)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


@pytest.fixture(autouse=True)
def _in_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a new kind needs beside its class. The kind that torch knows for it is the CPU's."""
    monkeypatch.setitem(factory.BACKENDS, "cpu", Card)
    monkeypatch.setattr(Card, "taken_bytes", 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def train(
    directory: Path | None = None,
    *,
    stop_at: int = 0,
    seed: int = 5,
    observe: Callable[[Event], None] | bool = False,
) -> tuple[TrainingResult, list[Tensor]]:
    """The training, from the card's generator seeded anew; with the parameters that it leaves."""
    Card.generator.manual_seed(seed)
    model = Noisy()
    steps = [0]

    def on_step(_: object) -> None:
        steps[0] += 1
        if steps[0] == stop_at:
            signal.raise_signal(signal.SIGINT)

    result = find_and_train(
        model,
        rows(),
        DESIRED,
        loss=nn.CrossEntropyLoss(),
        optimizer=adam,
        epochs=EPOCHS,
        headroom=0,
        seed=0,
        checkpoint_dir=directory,
        on_step=on_step,
        progress=observe,
    )
    return result, [parameter.detach().clone() for parameter in model.parameters()]


def test_the_card_is_chosen_and_opened_by_its_line_alone() -> None:
    opened = open_device(choose_device(None, torch.device("cpu")))
    assert isinstance(opened, Card)


def test_a_whole_training_finds_the_size_that_the_card_holds() -> None:
    result, _ = train()
    found = result.search
    assert (found.limited_by, result.replays, result.steps) == ("memory", 0, STEPS)
    assert 1 < found.size < DESIRED
    fits = [trial.size for trial in found.trials if trial.fits]
    fails = [trial.size for trial in found.trials if not trial.fits]
    assert max(fits) == found.size < min(fails)
    every = find_batch_size(
        Noisy(), rows(), loss=nn.CrossEntropyLoss(), optimizer=adam, headroom=0, ceiling=DESIRED
    )
    assert found.size <= every.size < min(fails)
    for size, fitting in ((every.size, True), (every.size + 1, False)):
        trial = check(Noisy(), rows(), size, loss=nn.CrossEntropyLoss(), optimizer=adam, headroom=0)
        assert trial.fits is fitting


def test_a_card_that_others_use_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = train()
    monkeypatch.setattr(Card, "taken_bytes", CARD // 3)
    shared, _ = train()
    assert shared.search.size < whole.search.size
    assert shared.replays == 0


def test_memory_that_goes_while_it_trains_costs_a_retry_and_nothing_else() -> None:
    def observe(event: Event) -> None:
        if isinstance(event, TrainingStarted):
            Card.taken_bytes = CARD // 3

    result, _ = train(observe=observe)
    assert result.replays > 0
    assert result.plan.tolerable < result.search.size
    assert result.steps == STEPS


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_training_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path, step: int
) -> None:
    whole, parameters = train()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=step)
    again, resumed = train(tmp_path, seed=99)
    assert again.losses == whole.losses
    assert all(map(torch.equal, resumed, parameters))


def test_without_the_cards_generator_it_ends_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=3)
    monkeypatch.setattr(Card, "set_rng_states", lambda _: None)
    again, _ = train(tmp_path, seed=99)
    assert again.losses != whole.losses


def test_the_numbers_of_a_step_wait_on_the_card_in_its_widest_type() -> None:
    held = ledger.LossRecord(2, Card(tuple))
    assert held._on_device is not None
    assert held._on_device.dtype is torch.float32


# The package.

PACKAGE = Path(autobatch.__file__).parent
KIND = re.compile(r"(cuda|hip|xpu|mps|cpu)(:\d+)?")
MODULES = {"cuda", "xpu", "mps"}
FLAGS = {"is_cuda", "is_xpu", "is_mps", "is_cpu"}
ALLOWED = {
    "devices/": "where a kind is known",
    "compat/": "what differs between builds of torch, CUDA's current device among it",
    "prediction/": "plays a CUDA GPU that is not here",
}


def kinds_named(source: str) -> list[str]:
    """Where a kind of device is named: as a text by itself, a module of torch or a flag."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if KIND.fullmatch(node.value):
                found.append(f"{node.lineno}: {node.value!r}")
        elif isinstance(node, ast.Attribute):
            of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            if (of_torch and node.attr in MODULES) or node.attr in FLAGS:
                found.append(f"{node.lineno}: .{node.attr}")
    return found


def test_no_other_module_names_a_kind_of_device() -> None:
    named = {
        file.relative_to(PACKAGE).as_posix(): found
        for file in sorted(PACKAGE.rglob("*.py"))
        if (found := kinds_named(file.read_text()))
    }
    assert {path: at for path, at in named.items() if not path.startswith(tuple(ALLOWED))} == {}
    assert any(path.startswith("devices/") for path in named), "the control"


@pytest.mark.parametrize(
    "line",
    [
        'tensor.device.type == "cuda"',
        "tensor.is_cpu",
        "torch.cuda.empty_cache()",
        'torch.zeros(3, device="mps:0")',
        "torch.xpu.is_available()",
    ],
)
def test_the_search_for_kinds_sees_each_way_to_name_one(line: str) -> None:
    assert len(kinds_named(line)) == 1
    assert kinds_named('help="cpu or cuda:1"; torch.version.cuda; settings.cuda') == []
