"""What a step allocates on a GPU that is not here follows from the batch, one by one."""

import inspect
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autobatch.compat.torchvision import import_torchvision
from autobatch.errors import AutobatchError
from autobatch.prediction import fake_cuda, tracing_worker
from autobatch.prediction.caching_allocator import replay
from autobatch.prediction.programs import StepChange, TrainingStep, Updates
from autobatch.prediction.trace import (
    GRADIENTS,
    STATE,
    UPDATE,
    AllocationChange,
    AllocationSite,
    Program,
    Recorder,
    Trace,
    fit_traces,
    with_updates,
)
from autobatch.prediction.tracing_process import pack_program, trace_in_process
from autobatch.prediction.tracing_worker import TracingRequest, TracingResult
from autobatch.training.engine.precision import PrecisionName
from autobatch.training.options import StepOptions

FITTED = (6, 9)
OTHERS = (2, 17, 64)
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "bf16", "fp16")


def cnn() -> tuple[nn.Module, object]:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Dropout(0.1), nn.Flatten(), nn.Linear(8 * 15 * 15, 10)),
    )
    return net, (torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long))


def vit() -> tuple[nn.Module, object]:
    net = import_torchvision().models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        dropout=0.1,
    )
    return net, (torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long))


def gpt2() -> tuple[nn.Module, object]:
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    ids = torch.zeros(16, 32, dtype=torch.long)
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


NETS = {"cnn": cnn, "vit": vit, "gpt2": gpt2}


def order(
    net: nn.Module,
    sample: object,
    *,
    batches: tuple[int, ...] = FITTED,
    precision: PrecisionName = "fp32",
    change: StepChange = "as it is",
    exchanged: bool = False,
) -> TracingRequest:
    optimizer = torch.optim.AdamW(net.parameters())
    step = TrainingStep(
        model=net,
        options=StepOptions(precision=precision),
        optimizer=optimizer,
        sample=sample,
        change=change,
    )
    tensors = [*net.parameters(), *net.buffers()]
    update = (
        pack_program(Updates(optimizer=optimizer, change=change), tensors) if exchanged else None
    )
    return TracingRequest(program=pack_program(step, tensors), batches=batches, update=update)


@pytest.fixture(scope="module")
def steps() -> dict[tuple[str, str], list[Trace]]:
    made = {name: make() for name, make in NETS.items()}
    keys = [(name, precision) for name in NETS for precision in PRECISIONS]
    orders = [
        order(*made[name], batches=(*FITTED, *OTHERS), precision=precision)
        for name, precision in keys
    ]
    answer = trace_in_process(orders)
    assert answer.on_cuda
    return dict(zip(keys, answer.traces, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETS)
def test_three_traces_give_the_events_of_every_batch(
    name: str, precision: str, steps: dict[tuple[str, str], list[Trace]]
) -> None:
    traces = steps[name, precision]
    every = fit_traces(*traces[:2])
    assert every is not None
    for trace, batch in zip(traces[2:], OTHERS, strict=True):
        assert every.events(batch, workspace_bytes=512) == trace.events(batch, workspace_bytes=512)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETS)
def test_the_quick_peak_is_at_most_the_replayed_one(
    name: str, precision: str, steps: dict[tuple[str, str], list[Trace]]
) -> None:
    for trace, batch in zip(steps[name, precision], (*FITTED, *OTHERS), strict=True):
        events = trace.events(batch, workspace_bytes=2**20)
        quick = trace.allocated_bytes(batch, workspace_bytes=2**20)
        assert 0 <= replay(events).peak_allocated - quick < 2**20


@pytest.fixture(scope="module")
def exchanges() -> dict[tuple[str, str, str, bool], Trace]:
    """Steps with other optimizers, traced whole and from another's trace."""
    made = {name: make() for name, make in NETS.items()}
    keys: list[tuple[str, PrecisionName, StepChange, bool]] = [
        (name, precision, change, exchanged)
        for name in NETS
        for precision in PRECISIONS
        for change in ("fused", "SGD")
        for exchanged in (False, True)
    ]
    found: dict[tuple[str, str, str, bool], Trace] = {}
    for name, precision in dict.fromkeys(key[:2] for key in keys):
        own = [key for key in keys if key[:2] == (name, precision)]
        others = [
            order(*made[name], precision=precision, change=change, exchanged=exchanged)
            for _, _, change, exchanged in own
        ]
        traces = trace_in_process([order(*made[name], precision=precision), *others]).traces[1:]
        found |= {key: each[1] for key, each in zip(own, traces, strict=True)}
    return found


def numbered(trace: Trace) -> list[tuple[int, int, int, AllocationSite | None]]:
    """The changes, each name as the number of its first appearance."""
    names: dict[int, int] = {}
    return [
        (names.setdefault(c.name, len(names)), c.constant, c.slope, c.site) for c in trace.changes
    ]


@pytest.mark.parametrize("change", ["fused", "SGD"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETS)
def test_another_optimizers_part_is_all_that_changes(
    name: str, precision: str, change: str, exchanges: dict[tuple[str, str, str, bool], Trace]
) -> None:
    whole, exchanged = (exchanges[name, precision, change, each] for each in (False, True))
    assert numbered(whole) == numbered(exchanged)
    last = len(whole.events(FITTED[1])) - 1
    assert whole.live_bytes(whole.events(FITTED[1]), last) == exchanged.live_bytes(
        exchanged.events(FITTED[1]), last
    )
    # Names tell which of the two it is: the exchanged one's are those of two traces.
    assert max(c.name for c in exchanged.changes) > max(c.name for c in whole.changes)


def part(*gradients: int, state: int = 8, frees: int = 0, steps: int = 1) -> Trace:
    """An optimizer's step on ``gradients`` of so many bytes."""
    changes = [
        AllocationChange(n, size, 0, AllocationSite("", "")) for n, size in enumerate(gradients, 1)
    ]
    begins, ends = (
        AllocationChange(0, 0, 0, AllocationSite("", f"an optimizer's step {does}"))
        for does in ("begins", "ends")
    )
    for step in range(steps):
        within = [AllocationChange(50 + step, state, 0, AllocationSite("optimizer", "zeros_like"))]
        within += [AllocationChange(frees, 0, 0, None)] if frees else []
        changes += [begins, *within, ends]
    kinds = dict.fromkeys(range(1, len(gradients) + 1), GRADIENTS) | {50: STATE}
    return Trace(changes=changes, kinds=kinds, guessed={}, batch=3)


def test_an_optimizers_steps_are_exchanged_only_for_the_like() -> None:
    found = with_updates(part(4, 6), part(6, 4, state=9))
    assert found is not None
    assert [c.constant for c in found.changes] == [4, 6, 0, 9, 0]
    assert sorted(found.kinds.values()).count(STATE) == 1 + 1  # The old name's has no change.
    assert with_updates(part(4, 6), part(4)) is None
    assert with_updates(part(4, 6), part(4, 6, steps=2)) is None
    assert with_updates(part(4, 6, frees=1), part(4, 6)) is None
    assert with_updates(part(4, 6), part(4, 6, frees=2)) is None


def test_a_step_whose_parameters_have_no_gradient_is_traced_whole() -> None:
    class Half(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.unused = nn.Linear(8, 8)

    net, sample = Half(), (torch.zeros(4, 8), torch.zeros(4, 8))
    whole = order(net, sample, change="fused")
    exchanged = order(net, sample, change="fused", exchanged=True)
    _, first, second = trace_in_process([order(net, sample), whole, exchanged]).traces
    assert [t.changes for t in first] == [t.changes for t in second]


def test_what_is_frozen_has_no_state() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    net[0].requires_grad_(False)
    sample = torch.zeros(4, 64), torch.zeros(4, 64)
    ((trace,),) = trace_in_process([order(net, sample, batches=(2,))]).traces
    events = trace.events(2)
    assert trace.live_bytes(events, len(events) - 1)[STATE] == 2 * 64 * 64 * 4


def test_tied_parameters_have_gradients(steps: dict[tuple[str, str], list[Trace]]) -> None:
    trace, (net, _) = steps["gpt2", "fp32"][0], gpt2()
    live: dict[int, int] = {}
    last = max(n for n, c in enumerate(trace.changes) if c.site == UPDATE)
    for change in trace.changes[:last]:  # Those of the window: state was made on others.
        if change.site is None:
            live.pop(change.name, None)
        elif trace.kinds.get(change.name) == GRADIENTS:
            live[change.name] = change.constant
    assert sum(live.values()) == sum(p.nbytes for p in net.parameters())


def test_memory_is_known_by_what_it_holds(steps: dict[tuple[str, str], list[Trace]]) -> None:
    trace, (net, _) = steps["cnn", "fp32"][0], cnn()
    events = trace.events(FITTED[0])
    ran = replay(events)
    assert ran.peak_at is not None
    live = trace.live_bytes(events, ran.peak_at)
    assert sum(live.values()) == ran.peak_allocated
    blocks = sum(-(-p.nbytes // 512) * 512 for p in net.parameters())
    assert live["parameters"] == blocks
    assert live["optimizer state"] == 2 * blocks
    assert 0 < live["gradients"] <= blocks


def test_sixteen_bits_take_the_kernels_of_cuda(
    steps: dict[tuple[str, str], list[Trace]],
) -> None:
    def operations(precision: str) -> set[str]:
        return {c.site.operation for c in steps["vit", precision][0].changes if c.site}

    assert "_scaled_dot_product_flash_attention" in operations("bf16")
    assert "_scaled_dot_product_efficient_attention" in operations("fp32")
    assert {"native_dropout", "_foreach_sqrt"} <= operations("fp16")


def test_an_optimizer_step_takes_so_many_times_the_parameters() -> None:
    """Parameters, gradients, state and temporaries, where hardly anything else is there."""
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(40)))
    sample = torch.zeros(4, 256), torch.zeros(4, 256)
    copies: dict[StepChange, float] = {"as it is": 5.0, "fused": 4.0, "SGD": 3.0}
    orders = [order(net, sample, batches=(2,), change=change) for change in copies]
    for traces, expected in zip(trace_in_process(orders).traces, copies.values(), strict=True):
        found = traces[0].allocated_bytes(2) / sum(p.nbytes for p in net.parameters())
        assert found == pytest.approx(expected, abs=0.15)


@dataclass(frozen=True)
class Twice:
    """Not a step of training: allocations by hand."""

    more_above: int = 1000
    end: bool = False
    say: str = ""

    def __call__(self, batch: int, recorder: Recorder) -> None:
        sys.stdout.write(self.say * 100_000)
        sys.stdout.flush()
        if self.end:
            os._exit(3)
        first = torch.empty(100, batch, device=recorder.device)
        again = [torch.empty(8, device=recorder.device) for _ in range(batch > self.more_above)]
        if first.sum() > 0 and bool((first > 1).any()):
            del again
        assert first.sum().item() == 1


class Looks(nn.Module):
    """Calls what inference mode leaves whole: operations that are made of others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.linear, self.last = nn.Linear(36, 16), nn.LayerNorm(16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.norm(self.conv(images)).flatten(2))  # (batch, 8, 16)
        heads = x.view(-1, 2, 4, 16)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        out: torch.Tensor = self.last(attended.matmul(heads.transpose(2, 3)) @ heads)
        if out.mean() > 0:
            return out
        return out.sigmoid()


@dataclass(frozen=True)
class Watches:
    """A forward pass in evaluation, without gradients or in inference mode."""

    net: nn.Module
    in_inference_mode: bool

    def __call__(self, batch: int, recorder: Recorder) -> None:
        self.net.eval()
        images = torch.zeros(batch, 3, 8, 8, device=recorder.device)
        with torch.inference_mode() if self.in_inference_mode else torch.no_grad():
            for _ in range(2):
                self.net(images)


def test_inference_mode_takes_the_memory_that_a_pass_without_gradients_takes() -> None:
    net = Looks()
    orders = [
        TracingRequest(
            program=pack_program(Watches(net, mode), net.parameters()), batches=(6, 9, 33)
        )
        for mode in (True, False)
    ]
    inferring, plain = trace_in_process(orders).traces
    assert [t.events(t.batch or 0) for t in inferring] == [t.events(t.batch or 0) for t in plain]
    assert fit_traces(*inferring) is not None
    operations = [c.site.operation for c in inferring[0].changes if c.site]
    assert "cublas workspace" in operations


@dataclass(frozen=True)
class Fails:
    def __call__(self, batch: int, recorder: Recorder) -> None:
        raise KeyError(f"mine, at {batch} on {recorder.device}")


def ordered(program: Program, *batches: int) -> TracingRequest:
    return TracingRequest(program=pack_program(program, []), batches=batches or (6, 9, 33))


def test_values_are_guessed_and_counted_and_different_ways_are_seen(
    capfd: pytest.CaptureFixture[str],
) -> None:
    plain, parting = trace_in_process(
        [ordered(Twice(say="noise")), ordered(Twice(more_above=20))]
    ).traces
    lines, first = inspect.getsourcelines(Twice)
    condition, zero = (
        f"test_trace.py:{first + next(n for n, line in enumerate(lines) if code in line)}"
        for code in ("if first.sum() > 0", "first.sum().item()")
    )
    assert plain[0].guessed == {
        f"a condition holds at {condition}": 2,
        f"a value of float32 is 1 at {zero}": 1,
    }
    assert fit_traces(*plain) is not None
    assert fit_traces(*parting[:2]) is not None
    assert fit_traces(*parting) is None
    assert capfd.readouterr() == ("", "")  # And what it prints reaches neither answer nor user.


def test_errors_of_the_program_pass_through() -> None:
    with pytest.raises(KeyError, match="mine"):
        trace_in_process([ordered(Fails())])
    tried = replace(ordered(Fails()), optional=True)
    assert [len(found) for found in trace_in_process([tried, ordered(Twice())]).traces] == [0, 3]


def test_a_process_that_ends_otherwise_is_told() -> None:
    with pytest.raises(AutobatchError, match="ended with code 3"):
        trace_in_process([ordered(Twice(end=True))])


def leaves(batch: int, recorder: Recorder) -> None:
    sys.exit(f"no step at {batch} on {recorder.device}")


def test_a_program_that_exits_does_not_end_this_process() -> None:
    with pytest.raises(AutobatchError, match=r"ended with SystemExit\('no step at 6 on cuda:0'\)"):
        trace_in_process([ordered(leaves)])


def test_a_dead_worker_s_last_words_are_in_the_error() -> None:
    with pytest.raises(
        AutobatchError, match=r"ended with code -9: \.{1976}cuda:0 at 6: all is lost$"
    ):
        trace_in_process([ordered(complains)])


def complains(batch: int, recorder: Recorder) -> None:
    sys.stderr.write(f"{recorder.device} at {batch}: all is lost".rjust(3000, "."))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_cannot_be_sent_is_refused() -> None:
    net = nn.Linear(2, 2)
    net.own = threading.Lock()  # type: ignore[assignment]  # Any attribute may be set.
    with pytest.raises(TypeError, match=r"cannot be sent to another process: .*lock"):
        order(net, (torch.zeros(2, 2), torch.zeros(2, 2)))


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from autobatch.prediction.tracing_process import pack_program, trace_in_process\n"
        "from autobatch.prediction.tracing_worker import TracingRequest\n"
        "class Own(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return self.inner(x)\n"
        "net = Own()\n"
        "def program(batch, recorder):\n"
        "    net(torch.zeros(batch, 4, device=recorder.device)).sum().backward()\n"
        "order = TracingRequest(program=pack_program(program, net.parameters()), batches=(2,))\n"
        "print(len(trace_in_process([order]).traces))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(tracing_worker.__file__).parents[2])},
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.parametrize("name", ["cnn", "gpt2"])
def test_another_build_of_torch_is_traced_as_on_the_cpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where labels are fake as well, and their count is guessed."""
    monkeypatch.setattr(fake_cuda, "works", lambda: False)
    answer: TracingResult = tracing_worker.trace_requests([order(*NETS[name]())])
    assert not answer.on_cuda
    every = fit_traces(*answer.traces[0])
    assert every is not None
    net = NETS[name]()[0]
    assert every.allocated_bytes(8) > 4 * sum(p.nbytes for p in net.parameters())
    assert every.allocated_bytes(100) > every.allocated_bytes(8)


def changes(*rows: tuple[int, int, AllocationSite | None]) -> list[AllocationChange]:
    return [AllocationChange(name, size, 0, place) for name, size, place in rows]


def test_an_allocation_of_no_bytes_is_none() -> None:
    place = AllocationSite("forward", "slice")
    trace = Trace(
        changes=[AllocationChange(1, -100, 100, place), AllocationChange(1, 0, 0, None)],
        kinds={},
        guessed={},
    )
    assert trace.events(1) == []
    assert trace.events(2) == [(1, 100), (1, 0)]


def test_a_trace_of_one_batch_is_for_that_batch() -> None:
    trace = Trace(
        changes=changes((1, 8, AllocationSite("forward", "x"))), kinds={}, guessed={}, batch=3
    )
    assert trace.events(3) == [(1, 8)]
    with pytest.raises(ValueError, match="a batch of 3 only, got 4"):
        trace.events(4)


def test_gradients_are_added_in_place() -> None:
    """As the engine does it for plain tensors: the sum takes the place of the old one."""
    added, other = (
        AllocationSite("backward", "add.Tensor"),
        AllocationSite("backward", "mul.Tensor"),
    )
    recorder = Recorder(torch.device("cuda:0"))
    recorder._changes = changes(
        (1, 800, other), (2, 800, other), (3, 800, added), (1, 0, None), (2, 0, None), (3, 0, None)
    )
    seen = [(change.name, change.constant) for change in recorder.trace(1).changes]
    assert seen == [(1, 800), (2, 800), (2, 0), (1, 0)]
