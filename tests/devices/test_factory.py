"""Where a model trains. There may be no GPU here, so torch.cuda is a stand-in."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from autobatch.devices import budget, factory
from autobatch.devices.base import MemoryReading
from autobatch.devices.budget import HEADROOM_BYTES, Budget
from autobatch.devices.cpu import CpuDevice
from autobatch.devices.cuda import CudaDevice
from autobatch.devices.factory import choose_device, open_device
from autobatch.errors import DeviceUnavailableError

CPU = torch.device("cpu")
GIB = 2**30

Gpus = Callable[..., "FakeCuda"]


@dataclass
class FakeCuda:
    """What choosing asks of torch.cuda."""

    count: int
    current: int = 0
    initialised: int = 0
    broken: bool = False
    entered: list[torch.device] = field(default_factory=list)

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return self.current

    def init(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA driver initialization failed")
        self.initialised += 1

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.current
        self.entered.append(device)
        self.current = before if str(device) == "cuda" else device.index
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Has torch see so many GPUs."""

    def see(count: int, *, current: int = 0, broken: bool = False) -> FakeCuda:
        fake = FakeCuda(count, current, broken=broken)
        for name in ("is_available", "device_count", "current_device", "init", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
        return fake

    return see


def test_without_a_wish_a_model_on_the_cpu_goes_to_the_current_gpu(gpus: Gpus) -> None:
    gpus(2, current=1)
    assert choose_device(None, CPU) == torch.device("cuda", 1)


def test_without_a_wish_and_a_gpu_a_model_stays_on_the_cpu(gpus: Gpus) -> None:
    gpus(0)
    assert choose_device(None, CPU) == CPU


def test_without_a_wish_a_model_stays_on_its_gpu(gpus: Gpus) -> None:
    fake = gpus(4)
    assert choose_device(None, torch.device("cuda", 3)) == torch.device("cuda", 3)
    assert fake.initialised == 1, "its generators must exist before their state is taken"
    assert fake.current == 0, "the current device was changed"


@pytest.mark.parametrize("present", [CPU, torch.device("cuda", 1)])
@pytest.mark.parametrize("asked", ["cpu", "cpu:0", torch.device("cpu", 0)])
def test_the_cpu_can_be_asked_for_and_needs_no_gpu(
    gpus: Gpus, asked: str | torch.device, present: torch.device
) -> None:
    for count in (0, 2):
        fake = gpus(count)
        assert choose_device(asked, present) == CPU
        assert fake.initialised == 0


@pytest.mark.parametrize(
    ("asked", "index"),
    [
        ("cuda", 1),
        ("cuda:0", 0),
        ("cuda:1", 1),
        (torch.device("cuda"), 1),
        (torch.device("cuda:0"), 0),
    ],
)
def test_a_gpu_is_named_by_its_index_or_is_the_current_one(
    gpus: Gpus, asked: str | torch.device, index: int
) -> None:
    fake = gpus(2, current=1)
    assert choose_device(asked, CPU) == torch.device("cuda", index)
    assert fake.initialised == 1
    assert fake.current == 1


@pytest.mark.parametrize(
    ("count", "asked"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2"), (1, torch.device("cuda", 7))]
)
def test_a_gpu_that_is_not_here_is_named_with_what_torch_sees(
    gpus: Gpus, count: int, asked: str | torch.device
) -> None:
    fake = gpus(count)
    with pytest.raises(DeviceUnavailableError) as caught:
        choose_device(asked, CPU)
    assert str(caught.value) == (
        f"device '{asked}' is not here: torch {torch.__version__} sees {count} CUDA devices"
    )
    assert fake.initialised == 0


@pytest.mark.parametrize("asked", ["meta", "vulkan", torch.device("meta")])
def test_a_device_whose_memory_cannot_be_read_is_not_supported(
    gpus: Gpus, asked: str | torch.device
) -> None:
    gpus(0)
    with pytest.raises(DeviceUnavailableError) as caught:
        choose_device(asked, CPU)
    assert str(caught.value) == (
        f"device '{asked}' is not supported: its memory cannot be read; use 'cuda', 'xpu', 'mps' "
        "or 'cpu'"
    )


def test_a_model_on_such_a_device_is_refused_without_a_wish_too(gpus: Gpus) -> None:
    gpus(1)
    with pytest.raises(DeviceUnavailableError, match="device 'meta' is not supported"):
        choose_device(None, torch.device("meta"))


@pytest.mark.parametrize("asked", ["gpu", "cuda:x", "", "cuda:-1", "cpu cuda"])
def test_text_that_names_no_device_is_a_bad_value(gpus: Gpus, asked: str) -> None:
    gpus(1)
    with pytest.raises(
        ValueError, match=rf"^device cannot be read from {re.escape(repr(asked))}: "
    ):
        choose_device(asked, CPU)


@pytest.mark.parametrize("asked", [0, 1.5, True, b"cuda", ["cuda"]])
def test_what_is_neither_text_nor_device_is_a_bad_type(gpus: Gpus, asked: Any) -> None:
    gpus(1)
    with pytest.raises(TypeError) as caught:
        choose_device(asked, CPU)
    assert str(caught.value) == (
        f'device must be text like "cuda:0" or a torch.device, got {asked!r}'
    )


def test_a_driver_that_fails_to_start_is_not_called_a_misspelt_device(gpus: Gpus) -> None:
    gpus(1, broken=True)
    with pytest.raises(RuntimeError, match=r"^CUDA driver initialization failed$"):
        choose_device("cuda", CPU)


def test_a_gpu_is_opened_as_one_and_the_cpu_with_a_meter(gpus: Gpus) -> None:
    gpus(2)
    opened = open_device(torch.device("cuda", 1))
    assert isinstance(opened, CudaDevice)
    assert opened.torch_device == torch.device("cuda", 1)
    held = [torch.ones(4)]
    metered = open_device(CPU, lambda: held)
    assert isinstance(metered, CpuDevice)
    assert metered.read().allocated_bytes == 16
    assert open_device(CPU).read().allocated_bytes == 0


def test_importing_the_choice_starts_no_gpu() -> None:
    assert factory is not None
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()


# What a device may be planned for.


def reading(*, total: int, free: int, reserved: int = 0, outside: int = 0) -> MemoryReading:
    return MemoryReading(
        total_bytes=total,
        free_bytes=free,
        allocated_bytes=0,
        reserved_bytes=reserved,
        peak_bytes=0,
        peak_reserved_bytes=None,
        outside_bytes=outside,
    )


@pytest.mark.parametrize("where", ["WSL", "Windows", ""])
def test_a_gpu_whose_driver_spills_to_the_host_keeps_twice_the_headroom(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """USERS 1.7.1 and 1.7.2: its ceiling lies below what it says is free."""
    monkeypatch.setattr(budget, "spilling_platform", lambda: where)
    host = reading(total=100 * GIB, free=50 * GIB)
    gpu = replace(host, peak_reserved_bytes=0)
    free = Budget(memory_limit_bytes=None, headroom_bytes=None)
    assert free.limit_bytes(host) == 48 * GIB
    assert free.limit_bytes(gpu) == (46 if where else 48) * GIB
    asked = Budget(memory_limit_bytes=None, headroom_bytes=GIB)
    assert asked.limit_bytes(gpu) == 49 * GIB, "whoever says knows better"


@pytest.mark.parametrize(
    ("total", "headroom"), [(10 * GIB, HEADROOM_BYTES), (100 * GIB, 2 * GIB), (0, HEADROOM_BYTES)]
)
def test_without_a_limit_it_is_what_is_free_or_held_less_the_headroom(
    total: int, headroom: int
) -> None:
    seen = reading(total=total, free=6 * GIB, reserved=3 * GIB, outside=GIB)
    limit = Budget(memory_limit_bytes=None, headroom_bytes=None).limit_bytes(seen)
    assert limit == 9 * GIB - headroom


@pytest.mark.parametrize("headroom", [0, 1, GIB])
def test_a_headroom_that_is_given_replaces_the_standard_one(headroom: int) -> None:
    seen = reading(total=10 * GIB, free=6 * GIB, reserved=3 * GIB, outside=GIB)
    limit = Budget(memory_limit_bytes=None, headroom_bytes=headroom).limit_bytes(seen)
    assert limit == 9 * GIB - headroom
    limit = Budget(memory_limit_bytes=5 * GIB, headroom_bytes=headroom).limit_bytes(seen)
    assert limit == 4 * GIB - headroom


def test_a_memory_limit_is_the_whole_processs_and_needs_no_headroom() -> None:
    seen = reading(total=80 * GIB, free=70 * GIB, reserved=8 * GIB, outside=2 * GIB)
    assert Budget(memory_limit_bytes=24 * GIB, headroom_bytes=None).limit_bytes(seen) == 22 * GIB


def test_a_memory_limit_above_what_is_there_is_cut_to_it() -> None:
    seen = reading(total=10 * GIB, free=6 * GIB, reserved=3 * GIB, outside=GIB)
    assert Budget(memory_limit_bytes=99 * GIB, headroom_bytes=None).limit_bytes(seen) == 9 * GIB


def test_where_nothing_is_left_the_limit_is_not_positive() -> None:
    seen = reading(total=10 * GIB, free=0, outside=10 * GIB)
    assert Budget(memory_limit_bytes=None, headroom_bytes=None).limit_bytes(seen) < 0
    assert Budget(memory_limit_bytes=GIB, headroom_bytes=None).limit_bytes(seen) <= 0
