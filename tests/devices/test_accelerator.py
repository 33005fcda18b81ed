"""Backends beyond CUDA. There is none here: stand-ins answer as torch's documentation says."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autobatch.devices import accelerator
from autobatch.devices.accelerator import MpsDevice, UncountedMpsDevice, XpuDevice
from autobatch.devices.base import MemoryDevice
from autobatch.devices.factory import BACKENDS, choose_device, in_widest, open_device, widest_dtype
from autobatch.devices.oom import verdict_of
from autobatch.errors import DeviceUnavailableError
from autobatch.results.verdict import Verdict
from autobatch.search.trial import TrialRunner
from autobatch.state.rng import random_state
from autobatch.training.engine.prefetch import Prefetcher
from autobatch.training.options import StepOptions

CPU = torch.device("cpu")
GIB = 2**30
TOTAL, HELD_BY_OTHERS = 16 * GIB, GIB


@dataclass
class Card:
    """A GPU with an allocator: what torch.accelerator, torch.xpu and torch.mps say of one."""

    kind: str
    count: int = 1
    current: int = 0
    allocated: int = 0
    cached: int = 0
    peak: int = 0
    peak_reserved: int = 0
    fraction: float = 1.0
    counts: bool = True  # Whether torch.accelerator reads its allocator.
    tells_free: bool = True
    started: int = 0
    waits: list[object] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)

    @property
    def reserved(self) -> int:
        return self.allocated + self.cached

    def allocate(self, size: int) -> None:
        if self.fraction and self.allocated + size > self.fraction * TOTAL:
            raise torch.OutOfMemoryError(f"{self.kind.upper()} out of memory.")
        self.cached = max(self.cached - size, 0)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def free(self, size: int) -> None:
        self.allocated -= size
        self.cached += size

    def empty_cache(self) -> None:
        self.ask()
        self.cached = 0

    def ask(self) -> None:
        if not self.counts:
            raise RuntimeError(
                "device_allocator INTERNAL ASSERT FAILED: Allocator for mps is not a "
                "DeviceAllocator."
            )

    def reads(self, name: str) -> Callable[..., int]:
        def read(_: object = None) -> int:
            self.ask()
            return int(getattr(self, name))

        return read

    def memory_info(self, _: object = None) -> tuple[int, int]:
        self.ask()
        if not self.tells_free:
            raise RuntimeError("The device doesn't support querying the available free memory.")
        return TOTAL - HELD_BY_OTHERS - self.reserved, TOTAL

    def reset_peak(self, _: object = None) -> None:
        self.peak, self.peak_reserved = self.allocated, self.reserved

    def limit(self, fraction: float, _: object = None) -> None:
        assert isinstance(fraction, float)
        assert 0 <= fraction <= (2 if self.kind == "mps" else 1)
        self.fraction = fraction
        self.fractions.append(fraction)

    def start(self) -> None:
        self.started += 1


Put = Callable[..., Card]


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Put:
    """Put a card into this machine, in the place of CUDA's."""

    def into(kind: str, **facts: Any) -> Card:
        card = Card(kind, **facts)
        told: dict[str, object] = {
            "current_accelerator": lambda check_available=False: (
                torch.device(kind) if card.count or not check_available else None
            ),
            "device_count": lambda: card.count,
            "current_device_index": lambda: card.current,
            "memory_allocated": card.reads("allocated"),
            "memory_reserved": card.reads("reserved"),
            "max_memory_allocated": card.reads("peak"),
            "max_memory_reserved": card.reads("peak_reserved"),
            "memory_stats": lambda _: {"num_alloc_retries": 3} if kind == "xpu" else {},
            "reset_peak_memory_stats": card.reset_peak,
            "empty_cache": card.empty_cache,
            "get_memory_info": card.memory_info,
            "synchronize": card.waits.append,
        }
        for name, answer in told.items():
            monkeypatch.setattr(torch.accelerator, name, answer)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        properties = SimpleNamespace(total_memory=TOTAL, has_fp64=False)
        own: dict[str, dict[str, object]] = {
            "xpu": {
                "init": card.start,
                "get_device_name": lambda device: f"Intel Arc {device.index}",
                "get_device_properties": lambda _: properties,
                "set_per_process_memory_fraction": card.limit,
                "get_per_process_memory_fraction": lambda _: card.fraction,
            },
            "mps": {
                "recommended_max_memory": lambda: TOTAL,
                "driver_allocated_memory": lambda: card.reserved,
                "current_allocated_memory": lambda: card.allocated,
                "set_per_process_memory_fraction": card.limit,
                "empty_cache": lambda: setattr(card, "cached", 0),
                "synchronize": lambda: card.waits.append(None),
            },
        }
        if kind in own:
            for name, answer in own[kind].items():
                monkeypatch.setattr(getattr(torch, kind), name, answer)
        else:
            module = SimpleNamespace(get_device_properties=lambda _: properties)
            monkeypatch.setattr(torch, "get_device_module", lambda _: module)
        monkeypatch.setattr(accelerator, "host_memory", lambda: (32 * GIB, 8 * GIB))
        return card

    return into


# Which device is meant.


@pytest.mark.parametrize(
    ("kind", "asked", "index"),
    [
        ("xpu", "xpu", 1),
        ("xpu", "xpu:0", 0),
        ("xpu", torch.device("xpu", 1), 1),
        ("xpu", None, 1),
        ("mps", "mps", 0),
        ("mps", "mps:0", 0),
        ("mps", None, 0),
    ],
)
def test_a_device_is_named_by_its_index_or_is_the_current_one(
    put: Put, kind: str, asked: str | torch.device | None, index: int
) -> None:
    card = put(kind, count=2, current=1) if kind == "xpu" else put(kind)
    assert choose_device(asked, CPU) == torch.device(kind, index)
    assert card.started == (kind == "xpu"), "its generators must exist before they are taken"


def test_a_model_stays_on_its_device_and_the_cpu_can_be_asked_for(put: Put) -> None:
    put("xpu", count=2)
    assert choose_device(None, torch.device("xpu", 1)) == torch.device("xpu", 1)
    assert choose_device("cpu", torch.device("xpu", 1)) == CPU


@pytest.mark.parametrize(
    ("count", "asked", "seen"),
    [
        (0, "xpu", "0 XPU"),
        (2, "xpu:2", "2 XPU"),
        (2, "mps", "0 MPS"),
        (2, torch.device("mps", 0), "0 MPS"),
    ],
)
def test_what_is_not_here_is_named_with_what_torch_sees(
    put: Put, count: int, asked: str, seen: str
) -> None:
    put("xpu", count=count)
    with pytest.raises(DeviceUnavailableError) as caught:
        choose_device(asked, CPU)
    assert str(caught.value) == (
        f"device '{asked}' is not here: torch {torch.__version__} sees {seen} devices"
    )
    assert choose_device(None, CPU).type == ("xpu" if count else "cpu")


# What is read of it, and how it is limited.


def opened(kind: str) -> MemoryDevice:
    return open_device(torch.device(kind, 0))


def test_an_xpu_is_read_through_torch_accelerator(put: Put) -> None:
    card, device = put("xpu"), opened("xpu")
    assert type(device) is XpuDevice
    assert (device.name, device.torch_device) == ("Intel Arc 0", torch.device("xpu", 0))
    assert not device.counts_host
    assert not device.is_exact
    assert device.others() == ()
    card.allocate(3 * GIB)
    card.free(2 * GIB)
    found = device.read()
    assert (found.allocated_bytes, found.reserved_bytes) == (GIB, 3 * GIB)
    assert (found.peak_bytes, found.peak_reserved_bytes) == (3 * GIB, 3 * GIB)
    assert (found.total_bytes, found.free_bytes) == (TOTAL, TOTAL - HELD_BY_OTHERS - 3 * GIB)
    assert (found.outside_bytes, found.retries) == (HELD_BY_OTHERS, 3)
    device.release_cached()
    device.reset_peak()
    assert (device.read().reserved_bytes, device.read().peak_bytes) == (GIB, GIB)


def test_a_driver_that_does_not_tell_what_is_free_leaves_what_we_hold(put: Put) -> None:
    put("xpu", tells_free=False, allocated=GIB)
    found = opened("xpu").read()
    assert (found.total_bytes, found.free_bytes) == (TOTAL, TOTAL - GIB)
    assert found.outside_bytes == 0


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_a_limit_holds_inside_and_the_old_one_is_put_back(
    put: Put, kind: str, counts: bool
) -> None:
    before = 0.5 if kind == "xpu" else 1.7
    card = put(kind, fraction=before, counts=counts or kind == "xpu")
    device = opened(kind)
    with device.limited_to(4 * GIB):
        card.allocate(4 * GIB)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            card.allocate(1)
        assert verdict_of(caught.value) is Verdict.OUT_OF_MEMORY
        with device.limited_to(8 * GIB):
            assert card.fraction == 0.25, "a limit inside a limit is only tighter"
        with device.limited_to(2 * GIB):
            assert card.fraction == 0.125
        assert card.fraction == 0.25
        device.synchronize()
    assert card.fraction == before
    with device.limited_to(99 * GIB):
        assert card.fraction == before, "what was allowed before is not exceeded"
    with pytest.raises(KeyError), device.limited_to(GIB):
        raise KeyError
    assert card.fraction == before


def test_mps_takes_zero_for_no_limit_so_it_is_never_told_zero(
    put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, device = put("mps"), opened("mps")
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.0")
    with device.limited_to(0):
        assert 0 < card.fraction < 1e-6
    assert card.fraction == 0.0, "no limit, as the environment has it"
    with device.limited_to(99 * GIB):
        assert card.fraction == 2.0


def test_mps_is_read_through_torch_accelerator_where_that_answers(put: Put) -> None:
    card, device = put("mps"), opened("mps")
    assert type(device) is MpsDevice
    assert device.name == "MPS"
    card.allocate(GIB)
    found = device.read()
    assert (found.peak_bytes, found.total_bytes) == (GIB, TOTAL)
    assert found.free_bytes == 8 * GIB, "the host has no more"
    assert found.outside_bytes == 0, "and what it holds is nobody's on the device"


def test_where_it_does_not_the_driver_is_read_and_each_trial_begins_without_a_cache(
    put: Put,
) -> None:
    card, device = put("mps", counts=False), opened("mps")
    assert type(device) is UncountedMpsDevice
    card.allocate(GIB)
    card.free(GIB)
    device.reset_peak()
    assert card.waits, "work that is under way still holds its memory"
    assert device.read().peak_bytes == 0
    card.allocate(5 * GIB)
    card.free(3 * GIB)
    found = device.read()
    assert (found.allocated_bytes, found.reserved_bytes) == (2 * GIB, 5 * GIB)
    assert found.peak_bytes == found.peak_reserved_bytes == 5 * GIB, "the cache has kept it"
    assert (found.total_bytes, found.outside_bytes) == (TOTAL, 0)
    assert found.free_bytes == 8 * GIB
    device.release_cached()
    assert device.read().reserved_bytes == 2 * GIB
    assert device.read().peak_bytes == 5 * GIB, "until it is reset"


def test_a_backend_that_cannot_limit_is_judged_afterwards(put: Put) -> None:
    card, device = put("mtia"), opened("mtia")
    assert device.name == "MTIA"
    card.allocate(3 * GIB)
    card.free(2 * GIB)
    device.synchronize()
    with device.limited_to(3 * GIB):
        device.synchronize()
    with device.limited_to(3 * GIB - 1):
        with pytest.raises(torch.OutOfMemoryError, match="counted afterwards") as caught:
            device.synchronize()
        device.reset_peak()
        with device.limited_to(9 * GIB), pytest.raises(torch.OutOfMemoryError):
            device.synchronize()
        with pytest.raises(torch.OutOfMemoryError, match=r"peak of 3\.0 GiB passes"):
            device.synchronize()
    with device.limited_to(GIB):
        device.synchronize()
    assert verdict_of(caught.value) is Verdict.OUT_OF_MEMORY


class Window:
    """Allocates a gibibyte an example."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def prepare(self, sizes: Any, mark: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self.card.allocate(sizes[0] * GIB)
            self.card.free(sizes[0] * GIB)
            mark()

        return run

    def verify(self, size: int, peak_bytes: int) -> str:  # noqa: ARG002  # The protocol's.
        return ""

    def clear(self) -> None:
        """Nothing is left."""


@pytest.mark.parametrize(
    ("kind", "counts"), [("xpu", True), ("mps", True), ("mps", False), ("mtia", True)]
)
def test_a_trial_fits_up_to_the_limit_and_no_further(put: Put, kind: str, counts: bool) -> None:
    card = put(kind, counts=counts)
    stage = TrialRunner(program=Window(card), device=opened(kind), limit_bytes=4 * GIB)
    for size, fits in ((3, True), (5, False), (4, True), (5, False), (1, True)):
        trial = stage.try_sizes((size,), smaller_fits=True)
        assert trial.fits == fits
        assert trial.peak_bytes == (size * GIB if fits else None)
        assert trial.failure is (None if fits else Verdict.OUT_OF_MEMORY)


# What the engine asks of a device's type.


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_autocast_and_the_scaler_are_those_of_the_device(put: Put, kind: str) -> None:
    put(kind)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = StepOptions(precision="fp16").train_step(model, optimizer, opened(kind))
    assert step.gradient_pass.precision.device_type == kind
    assert step.optimizer_step.scaler is not None
    assert step.optimizer_step.scaler._device == kind


@pytest.mark.parametrize("kind", ["xpu", "mps", "cuda"])
def test_only_cuda_copies_while_it_computes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def to(self: Tensor, device: object, **how: object) -> Tensor:
        asked.append((device, how.get("non_blocking", False)))
        return self.clone()

    monkeypatch.setattr(Tensor, "to", to)
    device = torch.device(kind, 0)
    opened = BACKENDS[kind].__new__(BACKENDS[kind])  # There is no card to open.
    opened._device = device
    feed = Prefetcher(opened)
    feed.move((torch.ones(3),))
    assert asked == [(device, kind == "cuda")]
    if kind != "cuda":
        assert len(list(feed([(torch.ones(3),), (torch.ones(2),)], more_follow=True))) == 2


def test_sums_are_as_wide_as_the_device_computes(put: Put) -> None:
    put("xpu")
    assert widest_dtype(CPU) == widest_dtype(torch.device("cuda", 0)) == torch.float64
    assert widest_dtype(torch.device("mps", 0)) == torch.float32
    assert widest_dtype(torch.device("xpu", 0)) == torch.float32, "this card has no float64"
    assert in_widest(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_its_random_numbers_are_put_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = [7]
    module = getattr(torch, kind)
    every = "_all" if kind == "xpu" else ""
    started = "is_initialized" if kind == "xpu" else "is_available"
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(module, "device_count", lambda: 1)
    monkeypatch.setattr(module, started, lambda: True)
    monkeypatch.setattr(module, f"get_rng_state{every}", lambda: list(state))
    monkeypatch.setattr(module, f"set_rng_state{every}", state.extend)
    put_back = random_state()
    state.clear()
    put_back()
    assert state == [7]
