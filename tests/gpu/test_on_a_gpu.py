"""The promises, on a real GPU: its own out-of-memory, allocator, generators and driver."""

import functools

import pytest
import torch
from states import fingerprint
from torch import Tensor, nn

from autobatch import (
    Accumulator,
    DoesNotFitError,
    Verdict,
    check,
    find_and_train,
    find_batch_size,
    verdict_of,
)
from autobatch.devices import nvml
from autobatch.devices.cuda import CudaDevice
from autobatch.job import Job
from autobatch.probing.trial import Stage
from autobatch.training.rehearsal import Rehearsal

pytestmark = pytest.mark.gpu

GIB = 2**30


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    """A skip would look like a pass."""
    if not torch.cuda.is_available():
        pytest.fail(f"no GPU: torch {torch.__version__} sees none; run these where there is one")


ADAM = functools.partial(torch.optim.Adam, lr=1e-4)


def device() -> CudaDevice:
    return CudaDevice(torch.device("cuda"))


def limit(allocator_bytes: int) -> int:
    """A whole process's limit that leaves the allocator so many bytes."""
    x, y = images(4)  # A step first: kernels and libraries are loaded into memory as well.
    nn.functional.cross_entropy(net()(x.cuda()), y.cuda()).backward()
    device().release_cached()
    return allocator_bytes + device().read().outside_bytes


def net(width: int = 64) -> nn.Module:
    """BatchNorm, dropout and enough activations: 3 MiB an example at 64 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    ).cuda()


def images(examples: int = 64, pixels: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 3, pixels, pixels, generator=generator)
    return x, torch.randint(0, 10, (examples,), generator=generator)


def many(examples: int) -> tuple[Tensor, Tensor]:
    """So many rows that share the memory of 64."""
    x, y = images()
    rows = torch.arange(examples) % 64
    return x[rows], y[rows]


def test_a_real_out_of_memory_is_recognised_and_recovered_from() -> None:
    trial = check(net(), images(), 4096, memory_limit=limit(GIB))
    assert not trial.fits
    assert trial.failure is Verdict.OUT_OF_MEMORY
    assert trial.peak_bytes is None
    assert check(net(), images(), 16, memory_limit=limit(GIB)).fits
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**46, dtype=torch.uint8, device="cuda")
    assert verdict_of(caught.value) in (Verdict.OUT_OF_MEMORY, Verdict.TOO_LARGE)


def test_ten_failures_in_a_row_leave_the_memory_as_it_was() -> None:
    model = net()
    job = resolved(model, limit(GIB))
    with job.undisturbed():
        stage = Stage(
            rehearsal=Rehearsal(job.recipe, images()),
            device=job.device,
            limit_bytes=job.limit_bytes(),
        )
        assert stage.try_sizes((8, 8), smaller_fits=False)[0].fits  # Warm: state, workspaces.
        stage.try_sizes((4096, 4096), smaller_fits=True)
        before = torch.cuda.memory_allocated()
        for _ in range(10):
            assert not stage.try_sizes((4096, 4096), smaller_fits=True)[0].fits
            assert torch.cuda.memory_allocated() == before
        assert torch.cuda.memory_reserved() <= before + 64 * 2**20


def resolved(model: nn.Module, memory_limit: int) -> Job:
    return Job.resolve(
        model,
        images(),
        batch_size=64,
        loss=None,
        forward=None,
        optimizer=ADAM,
        device=None,
        memory_limit=memory_limit,
        headroom=None,
    )


def test_the_found_size_trains_50_windows_and_the_next_one_fails() -> None:
    memory_limit = limit(2 * GIB)
    model = net()
    found = find_batch_size(
        model, many(4096), ceiling=4096, optimizer=ADAM, memory_limit=memory_limit
    )
    assert found.limited_by == "memory"
    assert 16 < found.size < 4096
    above = check(model, images(), found.size + 1, optimizer=ADAM, memory_limit=memory_limit)
    assert above.failure is Verdict.OUT_OF_MEMORY
    job = resolved(model, memory_limit)
    accumulator = Accumulator.following(
        job.recipe, micro_batch=found.size, limit_bytes=found.limit_bytes, observer=None
    )
    batch = many(2 * found.size)
    assert sum(accumulator.step(batch).replays for _ in range(50)) == 0


def test_a_search_leaves_every_bit_as_it_was_with_cuda_s_generator() -> None:
    model = net()
    optimizer = ADAM(model.parameters())
    model(images(8)[0].cuda()).sum().backward()
    torch.rand(3, device="cuda")
    before = fingerprint(model, optimizer)
    assert any(name.startswith("cuda rng") for name in before)
    find_batch_size(model, many(1024), optimizer=optimizer, memory_limit=limit(GIB))
    assert fingerprint(model, optimizer) == before
    torch.rand(1, device="cuda")
    assert fingerprint(model, optimizer) != before


def test_the_allocator_s_fraction_is_put_back() -> None:
    before = torch.cuda.get_per_process_memory_fraction()
    find_batch_size(net(), images(), memory_limit=limit(GIB))
    with pytest.raises(DoesNotFitError):
        find_batch_size(net(2048), images(), memory_limit=limit(2**26))
    assert torch.cuda.get_per_process_memory_fraction() == before


def test_a_limit_imitates_a_smaller_card() -> None:
    small = find_batch_size(net(), many(2048), ceiling=2048, memory_limit=limit(GIB))
    large = find_batch_size(net(), many(2048), ceiling=2048, memory_limit=limit(2 * GIB))
    assert small.limited_by == "memory"
    assert small.size < large.size
    assert all(
        trial.reserved_bytes is not None and trial.reserved_bytes <= small.limit_bytes
        for trial in small.trials
        if trial.fits
    )


def test_a_model_on_the_cpu_trains_on_the_gpu_and_a_search_puts_it_back() -> None:
    model = net().cpu()
    find_batch_size(model, images())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    result = find_and_train(
        model, many(256), 256, optimizer=ADAM, epochs=2, memory_limit=limit(GIB), progress=False
    )
    assert result.plan.accumulation_steps > 1
    assert result.steps == 2
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def test_accumulation_takes_the_undivided_step_in_float64() -> None:
    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.Tanh(), nn.Linear(32, 10)).cuda()

    x, y = images(100, 16)
    ours, whole = plain().double(), plain().double()
    Accumulator(ours, torch.optim.SGD(ours.parameters(), lr=1.0), micro_batch=30).step(
        (x.double(), y)
    )
    nn.functional.cross_entropy(whole(x.double().cuda()), y.cuda()).backward()
    torch.optim.SGD(whole.parameters(), lr=1.0).step()
    torch.testing.assert_close(ours.state_dict(), whole.state_dict(), rtol=1e-12, atol=1e-12)


def test_memory_that_runs_out_in_training_costs_a_replay() -> None:
    model = net()
    job = resolved(model, limit(GIB))
    accumulator = Accumulator.following(
        job.recipe, micro_batch=2048, limit_bytes=job.limit_bytes(), observer=None
    )
    step = accumulator.step(many(2048))
    assert step.replays > 0
    assert accumulator.step(many(2048)).replays == 0


def test_nvml_and_torch_agree_on_the_device_by_uuid() -> None:
    properties = torch.cuda.get_device_properties(0)
    seen = nvml.by_uuid(str(properties.uuid))
    assert seen is not None, nvml.survey().problem
    assert seen.name == properties.name
    assert seen.total_bytes is not None
    assert abs(seen.total_bytes - properties.total_memory) < 0.05 * properties.total_memory
