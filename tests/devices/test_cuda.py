"""A CUDA device without a card: torch.cuda answers what it is told to."""

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from autobatch.devices import cuda
from autobatch.devices.cuda import CudaDevice
from autobatch.errors import DeviceUnavailableError

GIB = 2**30
TOTAL = 100 * GIB

Card = Callable[..., CudaDevice]


@pytest.fixture
def fraction() -> list[float]:
    """The allocator's share of the card, as it was set, the last one last."""
    return [0.9]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, fraction: list[float]) -> Card:
    """Return a device of 100 GiB; 60 are free, and 10 are held by this process."""

    def opened(**properties: object) -> CudaDevice:
        answers = {
            "get_device_properties": SimpleNamespace(total_memory=TOTAL, **properties),
            "mem_get_info": (60 * GIB, TOTAL),
            "memory_reserved": 10 * GIB,
            "memory_allocated": 8 * GIB,
            "max_memory_allocated": 9 * GIB,
            "max_memory_reserved": 10 * GIB,
            "memory_stats": {"num_alloc_retries": 2},
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction[-1])
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, _: fraction.append(share)
        )
        device = CudaDevice.__new__(CudaDevice)  # There is no card to open.
        device._device = torch.device("cuda", 0)
        return device

    return opened


@pytest.mark.parametrize("properties", [{}, {"is_integrated": 0}])
def test_a_card_has_memory_of_its_own(
    card: Card, properties: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "host_memory", lambda: (TOTAL, GIB))
    reading = card(**properties).read()
    assert (reading.free_bytes, reading.total_bytes) == (60 * GIB, TOTAL)
    assert reading.outside_bytes == 30 * GIB
    assert reading.retries == 2


@pytest.mark.parametrize(("available", "free"), [(40 * GIB, 40 * GIB), (80 * GIB, 60 * GIB)])
def test_memory_that_is_the_hosts_too_is_free_only_where_the_host_has_it(
    card: Card, available: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """USERS 1.7.3: on GB10 and Jetson running out of it hangs the host."""
    monkeypatch.setattr(cuda, "host_memory", lambda: (TOTAL, available))
    reading = card(is_integrated=1).read()
    assert reading.free_bytes == free
    assert reading.outside_bytes == 0, "what the host's programs hold is not the process's"


def test_the_share_is_held_inside_and_put_back_whatever_happens(
    card: Card, fraction: list[float]
) -> None:
    """USERS 1.7.6 and 4.4: a smaller card is imitated, and the share from before returns."""
    device = card()
    with device.limited_to(24 * GIB):
        assert fraction[-1] == 0.24
        with device.limited_to(50 * GIB):
            assert fraction[-1] == 0.24, "a limit inside a limit is only tighter"
    assert fraction[-1] == 0.9
    with device.limited_to(95 * GIB):
        assert fraction[-1] == 0.9, "the user's own share stays a limit"

    def fail() -> None:
        with device.limited_to(GIB):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert fraction[-1] == 0.9
    with device.limited_to(-GIB):
        assert fraction[-1] == 0.0


def test_two_threads_do_not_limit_one_card_at_a_time(card: Card, fraction: list[float]) -> None:
    """The share is the process's: whoever ended last would put back the other's limit."""
    device, said = card(), list[str]()

    def search() -> None:
        try:
            with device.limited_to(20 * GIB):
                said.append("limited")
        except DeviceUnavailableError as error:
            said.append(str(error))

    def elsewhere() -> None:
        thread = threading.Thread(target=search)
        thread.start()
        thread.join()

    with device.limited_to(40 * GIB), device.limited_to(30 * GIB):
        elsewhere()
        assert fraction[-1] == 0.3
    elsewhere()
    assert "cuda:0 is under the limit of another thread" in said[0]
    assert said[1:] == ["limited"]
    assert fraction[-1] == 0.9
