"""The promises, on a real GPU: its own out-of-memory, allocator, generators and driver."""

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from states import fingerprint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch import (
    Accumulator,
    DoesNotFitError,
    SearchOptions,
    TrainingResult,
    Verdict,
    check,
    find_and_train,
    find_batch_size,
    verdict_of,
)
from autobatch.devices import nvml
from autobatch.devices.cuda import CudaDevice
from autobatch.search.trial import TrialRunner
from autobatch.training.engine.lr_schedule import Schedule
from autobatch.training.engine.nonfinite import NonFinite
from autobatch.training.engine.precision import PrecisionName
from autobatch.training.engine.prefetch import Prefetcher
from autobatch.training.engine.step_runner import StepRunner
from autobatch.training.options import StepOptions
from autobatch.training.trial_step import TrialStep
from autobatch.training.workload import Workload

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
        stage = TrialRunner(
            program=TrialStep(job.step, images()),
            device=job.device,
            limit_bytes=job.limit_bytes(),
        )
        assert stage.try_sizes((8, 8), smaller_fits=False).fits  # Warm: state, workspaces.
        stage.try_sizes((4096, 4096), smaller_fits=True)
        before = torch.cuda.memory_allocated()
        for _ in range(10):
            assert not stage.try_sizes((4096, 4096), smaller_fits=True).fits
            assert torch.cuda.memory_allocated() == before
        assert torch.cuda.memory_reserved() <= before + 64 * 2**20


def resolved(model: nn.Module, memory_limit: int, options: StepOptions | None = None) -> Workload:
    return Workload.resolve(
        model,
        images(),
        batch_size=64,
        options=options or StepOptions(),
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
    steps = runner(job, found.size, found.limit_bytes)
    batch = many(2 * found.size)
    assert sum(steps.step(batch).replays for _ in range(50)) == 0


def runner(job: Workload, size: int, limit_bytes: int) -> StepRunner:
    return job.options.step_runner(
        job.step,
        size,
        Schedule(),
        limited=functools.partial(job.device.limited_to, limit_bytes),
        limit_bytes=limit_bytes,
    )


def test_a_long_window_with_its_next_micro_batch_on_the_way_stays_inside_what_was_found() -> None:
    memory_limit = limit(2 * GIB)
    model = net()
    found = find_batch_size(
        model, many(4096), ceiling=4096, optimizer=ADAM, memory_limit=memory_limit
    )
    steps = runner(resolved(model, memory_limit), found.size, found.limit_bytes)
    assert steps.step(many(5 * found.size)).replays == 0


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
    steps = runner(job, 2048, job.limit_bytes())
    step = steps.step(many(2048))
    assert step.replays > 0
    assert steps.step(many(2048)).replays == 0


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        self.count += func is torch.ops.aten._local_scalar_dense.default
        if func is torch.ops.aten._to_copy.default and args[0].is_cuda:
            self.count += str(kwargs.get("device")) == "cpu"
        return func(*args, **kwargs)


@pytest.mark.parametrize(("nonfinite", "waits"), [("raise", 1), ("skip", 1), ("ignore", 0)])
def test_a_window_waits_for_the_gpu_once_or_never(nonfinite: NonFinite, waits: int) -> None:
    model = net()
    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batch=16, nonfinite=nonfinite
    )
    accumulator.step(images())
    with Waits() as counted:
        result = accumulator.step(images())
    assert counted.count == waits
    assert result.loss > 0


def test_a_micro_batch_is_right_though_the_next_one_moves_meanwhile() -> None:
    feed = Prefetcher(CudaDevice(torch.device("cuda")))
    parts = [(torch.full((2**20,), float(place)),) for place in range(20)]
    for place, part in enumerate(feed(parts)):
        assert isinstance(part, tuple)
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(5):  # The GPU is behind, and the host would run ahead.
            busy = busy @ busy
        assert bool((part[0] == place).all())
        del part


def test_tensors_of_any_strides_reach_the_gpu_with_their_values() -> None:
    feed = Prefetcher(CudaDevice(torch.device("cuda")))
    grid = torch.arange(24.0).reshape(4, 6)
    odd = [grid[:1].expand(4, 6), grid.T[:4], grid[:, ::2], grid[0, 0].expand(4)]
    (moved,) = feed([tuple(odd)])
    assert isinstance(moved, tuple)
    for one, other in zip(moved, odd, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_in_less_memory(precision: PrecisionName) -> None:
    memory_limit = limit(GIB)
    full = find_batch_size(net(), many(2048), ceiling=2048, memory_limit=memory_limit)
    half = find_batch_size(
        net(), many(2048), ceiling=2048, memory_limit=memory_limit, precision=precision
    )
    assert half.size > full.size
    model = net()
    result = find_and_train(
        model,
        many(512),
        256,
        optimizer=ADAM,
        precision=precision,
        clip_grad_norm=1.0,
        memory_limit=memory_limit,
        progress=False,
    )
    assert result.steps + sum("overflow" in note for note in result.notes) >= 2


def test_a_training_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    def trained(directory: Path, epochs: int) -> TrainingResult:
        torch.manual_seed(0)
        return find_and_train(
            nn.Sequential(net(), nn.Dropout(0.1)),
            images(),
            32,
            optimizer=ADAM,
            epochs=epochs,
            seed=1,
            checkpoint_dir=directory,
            progress=False,
        )

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = trained(tmp_path / "whole", 4)
        trained(tmp_path / "halves", 2)
        assert trained(tmp_path / "halves", 4).losses == whole.losses
    finally:
        torch.use_deterministic_algorithms(False)


def test_nvml_and_torch_agree_on_the_device_by_uuid() -> None:
    properties = torch.cuda.get_device_properties(0)
    seen = nvml.by_uuid(str(properties.uuid))
    assert seen is not None, nvml.survey().problem
    assert seen.name == properties.name
    assert seen.total_bytes is not None
    assert abs(seen.total_bytes - properties.total_memory) < 0.05 * properties.total_memory


@pytest.mark.parametrize("gib", [1, 3])
def test_what_the_bound_rules_out_does_not_fit(gib: int) -> None:
    memory_limit = limit(gib * GIB)
    model, options = net(), SearchOptions(confirm="failed")
    find = functools.partial(
        find_batch_size, model, many(4096), ceiling=4096, optimizer=ADAM, memory_limit=memory_limit
    )
    found, proved = find(), find(search=options)
    assert proved.upper.reason == "ran out"
    assert found.size >= 0.99 * proved.size
    assert sum(not trial.fits for trial in found.trials) <= 2
    assert len(found.trials) <= 6


def test_phases_are_read_and_their_peaks_are_the_trial_s() -> None:
    trial = check(net(), images(), 32, optimizer=ADAM)
    assert len(trial.phases) == 3
    assert max(phase.peak_bytes for phase in trial.phases) == trial.peak_bytes


def test_a_forward_pass_holds_more_than_a_step() -> None:
    memory_limit = limit(GIB)
    trained = find_batch_size(net(), many(4096), optimizer=ADAM, memory_limit=memory_limit)
    inferred = find_batch_size(net(), many(4096), mode="inference", memory_limit=memory_limit)
    assert inferred.size > trained.size


def test_the_fastest_is_timed_on_the_gpu() -> None:
    result = find_and_train(
        net(), many(512), 256, prefer="fastest", epochs=16, memory_limit=limit(GIB),
        progress=False,
    )  # fmt: skip
    assert len(result.search.speeds) > 1
    assert result.plan.tolerable == result.search.fastest


def test_we_are_not_named_among_the_others() -> None:
    torch.ones(2**20, device="cuda")
    assert os.getpid() not in {other.pid for other in device().others()}


def test_isolated_the_search_leaves_this_process_without_a_context() -> None:
    script = """
        import torch
        from torch import nn
        from autobatch import SearchOptions, find_batch_size
        found = find_batch_size(
            nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8)),
            (torch.randn(4096, 1024), torch.randint(0, 8, (4096,))),
            device="cuda",
            search=SearchOptions(isolate=True),
        )
        print(found.size, torch.cuda.is_initialized())
    """
    pytest.importorskip("cloudpickle")
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["4096", "False"]
