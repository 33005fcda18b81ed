"""Who else holds memory on the card is named, and memory that moved meanwhile is noticed."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_nvml import (
    GIB,
    GPU,
    NO_PERMISSION,
    NOT_AVAILABLE,
    NOT_SUPPORTED,
    Card,
    Driver,
    Machine,
    fake,
    library,
    library_machine,
    machine,
)
from torch import nn

from autobatch import DoesNotFitError, find_batch_size
from autobatch.devices import cuda
from autobatch.devices.base import SLACK_BYTES, MemoryReading, outside_changed
from autobatch.devices.cpu import CpuDevice
from autobatch.devices.cuda import CudaDevice
from autobatch.events import Event, SearchStarted
from autobatch.results.search import OtherProcess

__all__ = ["fake", "library", "library_machine", "machine"]  # Fixtures.

UUID = GPU.uuid.removeprefix("GPU-")  # As torch has it.
TOLD = (
    OtherProcess(pid=4321, used_bytes=3 * GIB),
    OtherProcess(pid=4322, used_bytes=2 * GIB),
)

See = Callable[..., tuple[OtherProcess, ...]]


@pytest.fixture
def see(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> See:
    """Return whom a CUDA device names, where torch and NVML say what they are told to say."""

    def named(driver: Driver, *, uuid: object = UUID, outside: int = 6 * GIB) -> object:
        monkeypatch.setattr(cuda, "by_uuid", lambda asked: machine.by_uuid(driver, str(asked)))
        properties = SimpleNamespace(**({} if uuid is None else {"uuid": uuid}))
        told = {
            "get_device_properties": properties,
            "mem_get_info": (80 * GIB - outside - GIB, 80 * GIB),
            "memory_reserved": GIB,
            "memory_allocated": 0,
            "max_memory_allocated": 0,
            "max_memory_reserved": 0,
        }
        for name, answer in told.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, answer=answer: answer)
        device = CudaDevice.__new__(CudaDevice)  # There is no card to open.
        device._device = torch.device("cuda", 0)
        return device.others()

    return named  # type: ignore[return-value]


def test_other_processes_are_named_with_what_they_hold(see: See) -> None:
    assert see(Driver()) == TOLD
    assert [str(other) for other in TOLD] == [
        "process 4321 holds 3.0 GiB",
        "process 4322 holds 2.0 GiB",
    ]


def test_a_process_that_hides_what_it_holds_is_named_too(see: See) -> None:
    (other,) = see(Driver(cards=(Card(processes=((7, NOT_AVAILABLE),)),)))
    assert other == OtherProcess(pid=7, used_bytes=None)
    assert str(other) == "process 7 holds memory"


def test_who_holds_more_than_all_others_is_ourselves_by_the_hosts_number(see: See) -> None:
    assert see(Driver(), outside=2 * GIB) == TOLD[1:]
    assert see(Driver(), outside=2 * GIB - 1) == ()


@pytest.mark.parametrize(
    "driver",
    [
        Driver(refused={"nvmlInitWithFlags": NOT_SUPPORTED}),
        Driver(refused={"nvmlDeviceGetCount_v2": NO_PERMISSION}),
        Driver(refused={"nvmlDeviceGetUUID": NOT_SUPPORTED}),
        Driver(refused={"nvmlDeviceGetComputeRunningProcesses_v3": NO_PERMISSION}),
        Driver(cards=()),
        Driver(cards=(Card(uuid="GPU-another"),)),
    ],
    ids=str,
)
def test_where_nothing_is_told_nobody_is_named(see: See, driver: Driver) -> None:
    assert see(driver) == ()


@pytest.mark.parametrize("uuid", [None, "", "GPU-another"])
def test_a_card_that_torch_cannot_name_has_nobody(see: See, uuid: object) -> None:
    assert see(Driver(), uuid=uuid) == ()


def test_the_card_is_found_whatever_nvmls_order(see: See) -> None:
    idle = Card(uuid="GPU-another", processes=())
    assert see(Driver(cards=(idle, Card()))) == TOLD
    assert see(Driver(cards=(Card(), idle))) == TOLD


def test_a_slice_has_processes_of_its_own(see: See) -> None:
    part = Card(uuid="MIG-1", processes=((9, GIB),))
    driver = Driver(cards=(Card(slices=(part,)),))
    assert see(driver, uuid="MIG-1") == (OtherProcess(pid=9, used_bytes=GIB),)
    assert see(driver) == ()


def reading(outside: int) -> MemoryReading:
    return MemoryReading(
        total_bytes=80 * GIB,
        free_bytes=0,
        allocated_bytes=0,
        reserved_bytes=0,
        peak_bytes=0,
        peak_reserved_bytes=None,
        outside_bytes=outside,
    )


bytes_held = st.integers(0, 80 * GIB)


@given(before=bytes_held, change=st.integers(-GIB, GIB), slack=st.integers(0, GIB))
def test_memory_has_moved_when_more_than_the_slack_came_or_went(
    before: int, change: int, slack: int
) -> None:
    one, other = reading(before), reading(before + change)
    assert outside_changed(one, other, slack_bytes=slack) == (abs(change) > slack)
    assert outside_changed(one, other, slack_bytes=slack) == outside_changed(
        other, one, slack_bytes=slack
    )
    assert outside_changed(one, other) == (abs(change) > SLACK_BYTES)


def test_what_is_our_own_does_not_count_as_moved() -> None:
    ours = replace(reading(GIB), allocated_bytes=9 * GIB, reserved_bytes=9 * GIB)
    assert not outside_changed(reading(GIB), ours)


def test_a_search_tells_and_keeps_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "others", lambda _: TOLD)
    data, events = (torch.ones(8, 1000), torch.ones(8, 1)), list[Event]()
    found = find_batch_size(nn.Linear(1000, 1), data, progress=events.append)
    assert found.others == TOLD
    assert [event.others for event in events if isinstance(event, SearchStarted)] == [TOLD]


def test_where_nothing_fits_the_others_are_among_the_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = (*TOLD, OtherProcess(pid=7, used_bytes=None))
    monkeypatch.setattr(CpuDevice, "others", lambda _: told)
    data = torch.ones(8, 1000), torch.ones(8, 1)
    with pytest.raises(DoesNotFitError) as caught:
        find_batch_size(nn.Linear(1000, 1), data, memory_limit=4100)
    assert caught.value.__notes__ == [
        "on the same device process 4321 holds 3.0 GiB",
        "on the same device process 4322 holds 2.0 GiB",
        "on the same device process 7 holds memory",
    ]


def test_on_the_cpu_nobody_is_named() -> None:
    assert CpuDevice().others() == ()
