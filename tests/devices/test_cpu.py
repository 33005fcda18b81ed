"""The meter, held to PyTorch's own account of every allocation."""

import gc
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _get_current_dispatch_mode

from autobatch.devices.cpu import CpuDevice, _Meter
from autobatch.devices.oom import verdict_of
from autobatch.results.verdict import Verdict

ROOMY = 10**15
KIB = 256  # So many float32 numbers are 1 KiB.

Step = Callable[[], None]


def live(device: CpuDevice) -> int:
    return device.read().allocated_bytes


@contextmanager
def without_collection() -> Iterator[None]:
    """Nothing is freed but by its last reference."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def profiled(step: Step) -> tuple[int, int]:
    """The reference: what PyTorch's profiler says stays allocated after a step, and the peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    results = seen.profiler.kineto_results.events()
    held = peak = 0
    for event in results:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return held, peak


def metered(step: Step, residents: Callable[[], list[Tensor]]) -> tuple[int, int]:
    """What the meter says of the same."""
    device = CpuDevice(residents)
    before = live(device)
    with device.limited_to(ROOMY):
        device.reset_peak()
        step()
    reading = device.read()
    return reading.allocated_bytes - before, reading.peak_bytes - before


def problem(
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer], examples: int, *, sparse: bool = False
) -> tuple[Step, Callable[[], list[Tensor]]]:
    """A training step that has been taken once, and the tensors that live between steps."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(20, 30), nn.ReLU(), nn.LayerNorm(30), nn.Linear(30, 5)]
    inputs = torch.randn(examples, 20)
    if sparse:
        layers = [nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(24, 5)]
        inputs = torch.randint(50, (examples, 3))
    model, targets = nn.Sequential(*layers), torch.randint(5, (examples,))
    chosen = optimizer(model.parameters())

    def step() -> None:
        cross_entropy(model(inputs), targets).backward()
        chosen.step()
        chosen.zero_grad()

    def residents() -> list[Tensor]:
        entries = [list(entry.values()) for entry in chosen.state.values()]
        return [inputs, targets, *model.parameters(), *sum(entries, [])]  # noqa: RUF017 - short

    step()
    return step, residents


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, 0.1, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, 0.1, foreach=False),
    "adam foreach": lambda parameters: Adam(parameters, 0.1, foreach=True),
    "adam fused": lambda parameters: Adam(parameters, 0.1, fused=True),
    "amsgrad": lambda parameters: Adam(parameters, 0.1, amsgrad=True),
}


@pytest.mark.parametrize("examples", [2, 64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step_is_counted_to_the_byte(name: str, examples: int) -> None:
    """With 2 examples the optimizer's temporaries make the peak, with 64 the activations do."""
    step, residents = problem(OPTIMIZERS[name], examples)
    held, peak = metered(step, residents)
    held_in_truth, peak_in_truth = profiled(step)
    assert held == held_in_truth == 0
    # An operation makes a tensor of each Python number that it is given, inside, for a moment.
    assert 0 <= peak_in_truth - peak <= 3 * 4
    if examples == 64:
        assert peak == peak_in_truth


def test_the_reference_can_disagree() -> None:
    step, residents = problem(OPTIMIZERS["sgd"], examples=64)
    smaller, _ = problem(OPTIMIZERS["sgd"], examples=63)
    assert metered(step, residents)[1] > profiled(smaller)[1] + 3 * 4


def test_the_first_step_of_an_optimizer_leaves_its_state() -> None:
    model = nn.Linear(10, 10)
    optimizer = Adam(model.parameters())
    inputs = torch.ones(3, 10)

    def step() -> None:
        model(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    held, _ = metered(step, lambda: [inputs, *model.parameters()])
    assert held == 2 * 110 * 4 + 2 * 4  # Two moments for each parameter, and two counts of steps.


def test_sparse_gradients_count_their_indices_and_values() -> None:
    device = CpuDevice()
    table = nn.Embedding(50, 8, sparse=True)
    rows = torch.tensor([1, 2, 2])
    with device.limited_to(ROOMY):
        table(rows).sum().backward()
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse
        before = live(device)
        table.weight.grad = None
    assert before - live(device) == 3 * 8 * 4 + 3 * 8  # Values, and an index of 8 bytes each.


def test_a_training_step_with_sparse_gradients_leaves_nothing() -> None:
    step, residents = problem(lambda parameters: SGD(parameters, 0.1), 16, sparse=True)
    held, peak = metered(step, residents)
    assert held == 0 < peak


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
def test_compressed_tensors_count_their_parts(layout: torch.layout) -> None:
    device = CpuDevice()
    with device.limited_to(ROOMY):
        starts, places, values = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2)
        compressed = torch.sparse_compressed_tensor(starts, places, values, layout=layout)
        del starts, places, values
        assert live(device) == 3 * 8 + 2 * 8 + 2 * 4
        del compressed
    assert live(device) == 0


def test_a_tensor_that_wraps_others_counts_what_is_inside() -> None:
    device = CpuDevice()
    with device.limited_to(ROOMY):
        rows = [torch.ones(2), torch.ones(3)]
        jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
        before = live(device)
        doubled = jagged * 2  # Its offsets are those of the first.
        assert live(device) - before == 5 * 4
        del doubled
        assert live(device) == before


def test_a_tensor_counts_its_bytes_until_it_is_gone() -> None:
    device = CpuDevice()
    with device.limited_to(ROOMY):
        one = torch.ones(KIB)
        two = torch.ones(KIB, dtype=torch.float64)
        assert live(device) == 3 * 1024
        del one
        assert live(device) == 2 * 1024
    assert live(device) == 2 * 1024
    del two
    assert live(device) == 0


def test_views_and_operations_in_place_count_nothing() -> None:
    device = CpuDevice()
    with device.limited_to(ROOMY):
        rows = torch.ones(KIB)
        views = [rows[1:], rows.view(16, 16), rows.view(16, 16).T, rows.expand(9, KIB)]
        views += [rows.detach(), rows[::2], rows.view(torch.int32), rows.unsqueeze(0)]
        rows.add_(1).mul_(rows)
        rows[3:5].fill_(7)
        torch.add(rows, 1, out=rows)
        assert (live(device), device.read().peak_bytes) == (1024, 1024)
        del rows
        assert live(device) == 1024, "the views hold the memory"
        del views
        assert live(device) == 0


def test_the_memory_of_an_array_counts_as_long_as_the_array() -> None:
    device = CpuDevice()
    with device.limited_to(ROOMY):
        array = torch.ones(KIB).numpy()
        assert live(device) == 1024
        del array
        assert live(device) == 0


def test_resizing_counts_the_new_size() -> None:
    device = CpuDevice()
    with device.limited_to(ROOMY):
        rows = torch.ones(KIB)
        rows.resize_(4 * KIB)
        assert live(device) == 4 * 1024
        rows.resize_(KIB)
        assert live(device) == 4 * 1024, "torch keeps the larger storage"
        rows.untyped_storage().resize_(0)
        rows.set_()  # type: ignore[call-overload]  # The next operation on it sees the new size.
        assert live(device) == 0
        del rows
    assert live(device) == 0


def test_a_tensor_set_to_other_memory_lets_its_own_go() -> None:
    device = CpuDevice()
    with device.limited_to(ROOMY):
        rows, other = torch.ones(KIB), torch.ones(2 * KIB)
        rows.set_(other)  # type: ignore[call-overload]  # torch does not say that it may.
        assert live(device) == 2 * 1024
        rows.data = torch.ones(5 * KIB)
        assert live(device) == 7 * 1024
        del rows
        assert live(device) == 2 * 1024


def test_what_autograd_saves_counts_until_backward_has_freed_it() -> None:
    device = CpuDevice()
    with device.limited_to(ROOMY):
        weight = torch.ones(KIB, requires_grad=True)
        loss = weight.exp().exp().sum()  # Each exp saves its result.
        assert live(device) == 3 * 1024 + 4
        loss.backward()
        assert live(device) == 2 * 1024 + 4, "the weight, its gradient and the loss"
        weight.grad = None
        assert live(device) == 1024 + 4


def test_tensors_without_memory_on_the_host_do_not_count() -> None:
    device = CpuDevice(lambda: [torch.ones(KIB, device="meta")])
    with device.limited_to(1024):
        nn.Linear(10_000, 10_000, device="meta")(torch.ones(9, 10_000, device="meta")).sum()
        assert live(device) == 0


def test_a_part_of_a_batch_counts_once_it_is_copied() -> None:
    """Cut outside, copied inside: the copy stands for the transfer to a device."""
    batch = torch.ones(100, KIB)
    micro_batch = batch[:3]
    device = CpuDevice()
    with device.limited_to(ROOMY):
        moved = micro_batch.to("cpu", copy=True)
        assert live(device) == 3 * 1024
        del moved


def test_residents_count_from_before_the_meter_saw_them() -> None:
    held = [torch.ones(KIB)]
    device = CpuDevice(lambda: held)
    assert live(device) == 1024
    held.append(held[0][4:])  # A view of what is known.
    held.append(torch.ones(KIB))
    assert live(device) == 2 * 1024
    with device.limited_to(ROOMY):
        held.append(torch.ones(KIB))
        assert live(device) == 3 * 1024
    held.clear()
    assert live(device) == 0


def test_a_reading_has_the_host_beside_the_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autobatch.devices.cpu.host_memory", lambda: (1000, 400))
    reading = CpuDevice(lambda: [torch.ones(2)]).read()
    assert (reading.total_bytes, reading.free_bytes) == (1000, 400)
    assert (reading.allocated_bytes, reading.reserved_bytes) == (0, 0), "it is gone already"
    assert (reading.peak_reserved_bytes, reading.outside_bytes) == (None, 0)
    assert reading.peak_bytes == 8
    device = CpuDevice()
    assert (device.torch_device, device.name) == (torch.device("cpu"), "CPU")
    device.synchronize()


def test_the_peak_is_counted_from_where_it_was_reset() -> None:
    device = CpuDevice()
    with device.limited_to(ROOMY):
        torch.ones(10 * KIB)
        kept = torch.ones(KIB)
        assert device.read().peak_bytes == 10 * 1024
        device.reset_peak()
        assert device.read().peak_bytes == 1024
        torch.ones(2 * KIB)
        assert device.read().peak_bytes == 3 * 1024
        del kept


def test_passing_the_limit_raises_what_a_gpu_raises() -> None:
    device = CpuDevice()
    with device.limited_to(4 * 1024):
        kept = torch.ones(4 * KIB)
        with pytest.raises(torch.OutOfMemoryError, match=r"4\.0 KiB") as caught:
            torch.ones(1)
        assert verdict_of(caught.value) is Verdict.OUT_OF_MEMORY
        assert "4.0 KiB of live tensors after aten.ones.default, limit 4.0 KiB" in str(caught.value)
        del kept
    torch.ones(99 * KIB)  # The limit ends with the block.


@settings(deadline=None, max_examples=30, derandomize=True)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6), limit=st.integers(1, 1200))
def test_the_limit_is_exact(sizes: list[int], limit: int) -> None:
    device = CpuDevice()
    kept: list[Tensor] = []
    raised = False
    try:
        with device.limited_to(limit):
            for size in sizes:
                kept.append(torch.empty(size))  # noqa: PERF401 - it may end in the middle
    except torch.OutOfMemoryError:
        raised = True
    assert raised == (4 * sum(sizes) > limit)


def fails(device: CpuDevice, model: nn.Module, inputs: Tensor, limit_bytes: int) -> Verdict:
    """A trial that runs out of memory, in a function that returns a plain value."""
    try:
        with device.limited_to(limit_bytes):
            model(inputs.clone()).sum().backward()
    except torch.OutOfMemoryError as error:
        return verdict_of(error)
    return Verdict.OTHER


def test_sixty_failures_in_a_row_leave_not_a_byte_before_any_collection() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    inputs = torch.ones(64, 32)
    device = CpuDevice(lambda: [*model.parameters(), inputs])
    before = live(device)
    with without_collection():
        for extra in range(60):  # Somewhere in the forward, or in the backward.
            limit_bytes = before + 800 * (extra + 1)
            assert fails(device, model, inputs, limit_bytes) is Verdict.OUT_OF_MEMORY
            for parameter in model.parameters():
                parameter.grad = None
            assert live(device) == before


def test_the_control_keeps_the_error_and_with_it_the_bytes() -> None:
    model, inputs = nn.Linear(32, 32), torch.ones(64, 32)
    device = CpuDevice(lambda: [*model.parameters(), inputs])
    before = live(device)
    kept: list[Exception] = []
    try:
        with device.limited_to(before + 64 * 32 * 4):
            model(inputs.clone())
    except torch.OutOfMemoryError as error:
        kept.append(error)
    assert live(device) > before
    kept.clear()
    assert live(device) == before


def test_cycles_that_hold_tensors_are_collected_on_release() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.tensor, self.itself = torch.ones(KIB), self

    resident = torch.ones(KIB)
    device = CpuDevice(lambda: [resident])
    with without_collection():
        with device.limited_to(ROOMY):
            Cycle()
        assert live(device) == 2 * 1024
        device.release_cached()
        assert live(device) == 1024
        device.release_cached()
        assert live(device) == 1024


def test_a_limit_inside_a_limit_counts_once_and_can_only_be_tighter() -> None:
    device = CpuDevice()
    with device.limited_to(3 * 1024):
        with device.limited_to(2 * 1024):
            one = torch.ones(KIB)
            assert live(device) == 1024
            with pytest.raises(torch.OutOfMemoryError, match=r"limit 2\.0 KiB"):
                torch.ones(2 * KIB)
        with device.limited_to(ROOMY):
            two = torch.ones(KIB)
            with pytest.raises(torch.OutOfMemoryError, match=r"limit 3\.0 KiB"):
                torch.ones(2 * KIB)
        assert live(device) == 2 * 1024
        with pytest.raises(torch.OutOfMemoryError, match=r"limit 3\.0 KiB"):
            torch.ones(2 * KIB)
    del one, two
    assert live(device) == 0


def test_inside_two_limits_an_operation_passes_the_meter_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = CpuDevice()
    noted: list[Tensor] = []
    rows = torch.ones(1)
    monkeypatch.setattr(device._meter, "note", noted.append)
    with device.limited_to(ROOMY), device.limited_to(ROOMY):
        result = rows.exp()
    assert [id(tensor) for tensor in noted] == [id(result)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_the_old_limit_is_put_back_after_an_error_too(error: type[BaseException]) -> None:
    device = CpuDevice()
    with device.limited_to(2 * 1024):
        with pytest.raises(error), device.limited_to(1024):
            raise error
        torch.ones(2 * KIB)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(3 * KIB)
    torch.ones(99 * KIB)
    assert live(device) == 0, "the meter still looks on"


def test_two_devices_do_not_disturb_each_other() -> None:
    one, other = CpuDevice(), CpuDevice()
    with one.limited_to(ROOMY), other.limited_to(ROOMY):
        kept = torch.ones(KIB)
        assert (live(one), live(other)) == (1024, 1024)
    del kept
    assert (live(one), live(other)) == (0, 0)


def test_the_meter_keeps_no_tensor_alive() -> None:
    device = CpuDevice()
    with without_collection(), device.limited_to(ROOMY):
        tensor = torch.ones(KIB)
        watch = weakref.ref(tensor)
        del tensor
        assert watch() is None


class Compiler:
    """A backend that only counts."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(
        self,
        graph: torch.fx.GraphModule,
        inputs: list[Tensor],  # noqa: ARG002
    ) -> Callable[..., object]:
        self.runs += 1
        return graph.forward


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch.compiler.reset()
    yield Compiler()
    torch.compiler.reset()


def doubled(rows: Tensor) -> Tensor:
    return 2 * rows


def test_a_compiled_function_runs_eagerly_inside_and_is_not_spoiled(compiler: Compiler) -> None:
    function = torch.compile(doubled, backend=compiler)
    device = CpuDevice()
    with device.limited_to(ROOMY):
        kept = function(torch.ones(KIB))
        assert live(device) == 1024
        assert compiler.runs == 0
    assert torch.equal(function(torch.ones(KIB)), kept)
    assert compiler.runs == 1


def test_the_control_spoils_a_compiled_function(compiler: Compiler) -> None:
    """When this fails, torch compiles under a dispatch mode, and ``_eager`` can go."""
    function = torch.compile(doubled, backend=compiler)
    with CpuDevice()._meter:
        function(torch.ones(KIB))
    function(torch.ones(KIB))
    assert compiler.runs == 0


def test_a_function_that_was_compiled_before_stays_so(compiler: Compiler) -> None:
    function = torch.compile(doubled, backend=compiler)
    function(torch.ones(KIB))
    with CpuDevice().limited_to(ROOMY):
        function(torch.ones(KIB))
    function(torch.ones(KIB))
    assert compiler.runs == 1


def test_nothing_is_imported_for_those_who_compile_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: pytest.fail("touched"))
    with CpuDevice().limited_to(ROOMY):
        torch.ones(1)


# Ctrl-C.


def test_a_tensor_that_dies_runs_no_line_of_python() -> None:
    """Ctrl-C in what a weak reference calls would be printed, ignored and lost."""
    device = CpuDevice()
    called: list[str] = []
    with device.limited_to(1 << 20):
        held = [torch.zeros(100)]
        sys.setprofile(lambda frame, event, _: called.append(f"{event} {frame.f_code.co_name}"))
        held.clear()
        sys.setprofile(None)
        assert device.read().allocated_bytes == 0
    assert not [entry for entry in called if entry.startswith("call ")]


@pytest.mark.parametrize("method", ["__enter__", "__exit__"])
def test_ctrl_c_while_the_meter_begins_or_ends_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    plain = getattr(_Meter, method)

    def pressed(meter: _Meter, *args: object) -> object:
        result = plain(meter, *args)
        signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(_Meter, method, pressed)
    device = CpuDevice()
    with pytest.raises(KeyboardInterrupt), device.limited_to(100):
        pass
    assert _get_current_dispatch_mode() is None
    torch.zeros(1000)
