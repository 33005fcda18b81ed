import functools
from collections.abc import Callable
from dataclasses import asdict, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autobatch import (
    DoesNotFitError,
    check,
    find_and_train,
    find_batch_size,
    find_largest,
)
from autobatch.devices.base import MemoryReading
from autobatch.results.memory import Breakdown, break_down
from autobatch.results.search import OtherProcess, Trial
from autobatch.results.verdict import Verdict
from autobatch.training.options import StepOptions
from autobatch.training.workload import Workload

MIB = 2**20
NEEDS = {
    "parameters": 100,
    "buffers": 10,
    "gradients": 100,
    "optimizer state": 200,
    "tensors in state": 0,
}
LIES = st.integers(-(2**64), 2**64)


def at(peak_bytes: int, **more: int | None) -> Breakdown:
    """A device of 1000 with 60 outside and 40 of headroom."""
    given = {"reserved_bytes": 700, "limit_bytes": 900, "total_bytes": 1000, "outside_bytes": 60}
    return break_down(NEEDS, peak_bytes=peak_bytes, **given | more)  # type: ignore[arg-type]  # Mixed values.


def test_a_size_that_fits_is_taken_apart() -> None:
    assert at(600, others_bytes=50) == Breakdown(
        parameter_bytes=100,
        buffer_bytes=10,
        gradient_bytes=100,
        optimizer_state_bytes=200,
        activation_bytes=190,
        cached_bytes=100,
        outside_bytes=10,
        other_process_bytes=50,
        headroom_bytes=40,
        free_bytes=200,
    )


def test_a_size_that_does_not_fit_says_what_is_missing_at_least() -> None:
    breakdown = at(1300, reserved_bytes=None)
    assert (breakdown.activation_bytes, breakdown.free_bytes, breakdown.missing_bytes) == (
        890,
        0,
        400,
    )
    assert (breakdown.needed_bytes, breakdown.total_bytes) == (1400, 1000)
    assert at(0, limit_bytes=-60, total_bytes=0).missing_bytes == 470, "nothing was left"


@given(
    needs=st.dictionaries(st.sampled_from(sorted(NEEDS)), LIES),
    readings=st.fixed_dictionaries(
        {
            "peak_bytes": LIES,
            "reserved_bytes": st.none() | LIES,
            "limit_bytes": LIES,
            "total_bytes": LIES,
            "outside_bytes": LIES,
            "others_bytes": st.none() | LIES,
        }
    ),
)
def test_the_parts_add_up_and_none_is_negative_whatever_the_readings_say(
    needs: dict[str, int], readings: dict[str, int]
) -> None:
    breakdown = break_down(needs, **readings)
    assert all(part >= 0 for part in asdict(breakdown).values())
    assert breakdown.total_bytes == max(readings["total_bytes"], 0)
    assert breakdown.free_bytes == 0 or breakdown.missing_bytes == 0
    assert (
        sum(breakdown.parts.values())
        == breakdown.needed_bytes
        == breakdown.total_bytes + breakdown.missing_bytes
    )


@given(parts=st.lists(st.integers(0, 2**40), min_size=11, max_size=11))
def test_true_readings_give_every_part_back(parts: list[int]) -> None:
    names = [item.name for item in fields(Breakdown)][:11]
    truth = Breakdown(**dict(zip(names, parts, strict=True)))
    fixed = parts[:5]
    peak = sum(parts[:6])
    limit = peak + truth.cached_bytes + truth.free_bytes
    assert truth == break_down(
        dict(zip(NEEDS, fixed, strict=True)),
        peak_bytes=peak,
        reserved_bytes=peak + truth.cached_bytes,
        limit_bytes=limit,
        total_bytes=truth.total_bytes,
        outside_bytes=truth.outside_bytes + truth.other_process_bytes,
        others_bytes=truth.other_process_bytes,
    )


@pytest.mark.parametrize("others", [None, 61, -1, 2**64 - 1])
def test_what_the_driver_cannot_know_stays_outside(others: int | None) -> None:
    breakdown = at(600, others_bytes=others)
    assert (breakdown.outside_bytes, breakdown.other_process_bytes) == (60, 0)


def test_a_negative_part_is_refused() -> None:
    with pytest.raises(ValueError, match="free_bytes must not be negative, got -1"):
        Breakdown(free_bytes=-1)


def test_it_prints_as_a_table_with_shares_that_leaves_out_what_is_empty() -> None:
    breakdown = Breakdown(parameter_bytes=96 * MIB, optimizer_state_bytes=32 * MIB, free_bytes=1)
    assert str(breakdown).splitlines() == [
        "parameters          96.0 MiB    75.0%",
        "optimizer state     32.0 MiB    25.0%",
        "free                     1 B    <0.1%",
        "in all             128.0 MiB   100.0%",
    ]
    assert str(Breakdown()) == "in all          0 B   100.0%"
    assert str(replace(breakdown, missing_bytes=MIB)).splitlines()[3:] == [
        "at least             128.0 MiB",
        "available            127.0 MiB",
        "missing, at least      1.0 MiB",
    ]


def problem(*between: nn.Module) -> tuple[nn.Sequential, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), *between, nn.ReLU(), nn.Linear(64, 3))
    return model, (torch.randn(300, 20), torch.randint(0, 3, (300,)))


def test_a_search_says_where_the_memory_goes() -> None:
    model, data = problem(nn.BatchNorm1d(64))
    model[3].requires_grad_(False)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    found = find_batch_size(model, data, device="cpu", memory_limit="200kB")
    breakdown = found.breakdown
    assert breakdown is not None
    assert breakdown.parameter_bytes == sum(p.nbytes for p in model.parameters())
    assert breakdown.buffer_bytes == sum(buffer.nbytes for buffer in model.buffers())
    assert breakdown.gradient_bytes == trained
    assert 2 * trained <= breakdown.optimizer_state_bytes <= 2 * trained + 100, "AdamW, step counts"
    assert found.peak_bytes is not None
    assert breakdown.activation_bytes > 0
    assert breakdown.free_bytes == 200_000 - found.peak_bytes
    assert breakdown.total_bytes == 200_000
    assert breakdown.missing_bytes == 0


def test_a_loss_that_is_a_module_counts_with_the_model() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1000))

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.scale.mean() * nn.functional.cross_entropy(outputs, targets)

    model, data = problem()
    alone = find_batch_size(model, data, device="cpu", ceiling=4)
    both = find_batch_size(model, data, device="cpu", ceiling=4, loss=Scaled())
    assert alone.breakdown is not None
    assert both.breakdown is not None
    assert both.breakdown.parameter_bytes == alone.breakdown.parameter_bytes + 4000
    assert both.breakdown.gradient_bytes == alone.breakdown.gradient_bytes + 4000


def test_on_the_host_the_whole_host_is_told() -> None:
    model, data = problem()
    breakdown = find_batch_size(model, data, device="cpu", ceiling=4).breakdown
    assert breakdown is not None
    assert breakdown.total_bytes > 2**30
    assert breakdown.headroom_bytes > 0
    assert breakdown.outside_bytes > 0, "Python itself"


@pytest.mark.parametrize("call", [find_batch_size, find_and_train])
def test_the_limits_that_are_named_lead_to_one_that_is_enough(call: Callable[..., object]) -> None:
    model, data = problem()
    limit, enough = 5_000, 0
    for _ in range(40):
        try:
            call(model, data, device="cpu", memory_limit=limit, progress=False)
        except DoesNotFitError as error:
            named = error.breakdown
        else:
            enough = limit
            break
        assert named is not None
        assert named.total_bytes == limit < named.needed_bytes
        limit = named.needed_bytes
    assert enough
    assert check(model, data, 1, device="cpu", memory_limit=enough)
    assert not check(model, data, 1, device="cpu", memory_limit=enough - 1), "at least means it"


def test_where_batch_norm_refuses_one_example_two_say_what_is_missing() -> None:
    model, data = problem(nn.BatchNorm1d(64))
    with pytest.raises(DoesNotFitError, match="more than 1 value per channel") as caught:
        find_batch_size(model, data, device="cpu", memory_limit=28_000)
    breakdown = caught.value.breakdown
    assert breakdown is not None
    assert breakdown.needed_bytes - breakdown.activation_bytes < 28_000 < breakdown.needed_bytes


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (functools.partial(torch.optim.AdamW), 2),
        (functools.partial(torch.optim.Adam, amsgrad=True), 3),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (functools.partial(torch.optim.SGD, lr=0.1), 0),
        (functools.partial(torch.optim.RMSprop), 0),
    ],
)
def test_state_that_had_no_room_to_be_made_is_needed_too(
    optimizer: Callable[..., torch.optim.Optimizer], copies: int
) -> None:
    model, data = problem()
    model[0].requires_grad_(False)
    trained = sum(p.nbytes for p in model[2].parameters())
    whole = sum(p.nbytes for p in model.parameters())
    with pytest.raises(DoesNotFitError) as caught:
        find_batch_size(model, data, device="cpu", memory_limit=whole - 1, optimizer=optimizer)
    assert caught.value.breakdown is not None
    assert caught.value.breakdown.optimizer_state_bytes == copies * trained
    fits = find_batch_size(model, data, device="cpu", ceiling=1, optimizer=optimizer).breakdown
    assert fits is not None
    if copies:
        assert 0 <= fits.optimizer_state_bytes - copies * trained <= 8, "step counts"


class Reads:
    """A GPU of 1000 bytes whose readings are given."""

    torch_device = torch.device("cpu")
    counts_host = False
    reading = MemoryReading(
        total_bytes=1000,
        free_bytes=300,
        allocated_bytes=400,
        reserved_bytes=500,
        peak_bytes=450,
        peak_reserved_bytes=500,
        outside_bytes=200,
    )

    found_processes: tuple[OtherProcess, ...] = ()

    def read(self) -> MemoryReading:
        return self.reading

    def others(self) -> tuple[OtherProcess, ...]:
        return self.found_processes


def job_on(device: object, memory_limit: int | None, headroom: int | None) -> Workload:
    model = nn.Linear(4, 4, bias=False)  # 64 bytes, and as many of a gradient.
    made = Workload.resolve(
        model,
        (torch.zeros(4, 4), torch.zeros(4, 4)),
        batch_size=4,
        options=StepOptions(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        device="cpu",
        memory_limit=memory_limit,
        headroom=headroom,
    )
    gradient = replace(made.step.gradient_pass, device=device)  # type: ignore[arg-type]  # It is read only.
    return replace(made, step=replace(made.step, gradient_pass=gradient))


TRIAL = Trial(size=4, fits=True, peak_bytes=400, reserved_bytes=450)


def test_in_inference_there_are_no_gradients_and_no_state_is_made() -> None:
    model, data = problem()
    breakdown = find_batch_size(model, data, device="cpu", ceiling=4, mode="inference").breakdown
    assert breakdown is not None
    assert (breakdown.gradient_bytes, breakdown.optimizer_state_bytes) == (0, 0)
    whole = sum(p.nbytes for p in model.parameters())
    with pytest.raises(DoesNotFitError) as caught:
        find_batch_size(model, data, device="cpu", memory_limit=whole + 9, mode="inference")
    assert caught.value.breakdown is not None
    assert caught.value.breakdown.gradient_bytes == 0
    assert whole + 9 < caught.value.breakdown.needed_bytes < 2 * whole
    with pytest.raises(DoesNotFitError) as caught:  # Before any trial.
        find_batch_size(model, data, device="cpu", memory_limit=whole - 9, mode="inference")
    assert caught.value.breakdown is not None
    assert caught.value.breakdown.gradient_bytes == 0


def test_of_any_function_what_state_names_is_told() -> None:
    kept = torch.zeros(1000)
    found = find_largest(
        lambda size: torch.ones(size), ceiling=100, state=[kept], device="cpu", memory_limit=4200
    )
    assert (int(found), found.breakdown) == (
        50,
        Breakdown(named_bytes=4000, activation_bytes=200),
    )


def test_without_a_memory_limit_the_parts_are_the_devices() -> None:
    breakdown = job_on(Reads(), None, None).breakdown(700, TRIAL)
    assert breakdown == Breakdown(
        parameter_bytes=64,
        gradient_bytes=64,
        activation_bytes=272,
        cached_bytes=50,
        outside_bytes=200,
        headroom_bytes=100,
        free_bytes=250,
    )


def test_state_that_waits_on_the_host_is_not_on_the_device() -> None:
    class Elsewhere(Reads):
        torch_device = torch.device("meta")

    for device, held in ((Reads(), 48), (Elsewhere(), 0)):
        made = job_on(device, None, None)
        made.step.optimizer.state[next(made.step.model.parameters())] = {"m": torch.zeros(12)}
        assert made.breakdown(700, TRIAL).optimizer_state_bytes == held


def test_a_memory_limit_is_a_device_of_its_own() -> None:
    breakdown = job_on(Reads(), 600, 50).breakdown(350, replace(TRIAL, peak_bytes=300))
    assert breakdown.total_bytes == 600
    assert (breakdown.outside_bytes, breakdown.headroom_bytes, breakdown.free_bytes) == (200, 50, 0)
    assert breakdown.cached_bytes == 50, "as much as the limit has room for"


def test_a_failure_needs_what_was_held_and_what_was_asked_for() -> None:
    text = "Tried to allocate 2.00 KiB. Of the allocated memory 1.00 KiB is allocated by PyTorch"
    failed = Trial(size=1, fits=False, failure=Verdict.OUT_OF_MEMORY, needed_bytes=450)
    made = job_on(Reads(), None, None)
    assert made.breakdown(700, failed).activation_bytes == 450 - 128
    breakdown = made.breakdown(700, replace(failed, message=text))
    assert breakdown.activation_bytes == 3060 - 128
    assert breakdown.missing_bytes == 3060 - 700
    assert made.breakdown(700).activation_bytes == 0, "before any trial"


@pytest.mark.parametrize(
    ("held", "others"), [([30, 20], 50), ([], 0), ([30, None], 0), ([30, 2**45], 0)]
)
def test_other_processes_are_told_apart_where_the_driver_names_them(
    held: list[int | None], others: int
) -> None:
    class Gpu(Reads):
        found_processes = tuple(OtherProcess(pid=n, used_bytes=used) for n, used in enumerate(held))

    breakdown = job_on(Gpu(), None, None).breakdown(700, TRIAL)
    assert (breakdown.other_process_bytes, breakdown.outside_bytes) == (others, 200 - others)
    assert breakdown.total_bytes == 1000
