"""The memory of steps of one's own, and predictions from wherever they are asked for."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autobatch
from autobatch import DoesNotFitError, peak
from autobatch.prediction.gpu_catalogue import custom_gpu
from autobatch.prediction.result import Prediction
from autobatch.prediction.tracing_process import modules_and_optimizers

MIB = 2**20
CARD = custom_gpu("3GiB")


class Holding:
    """Makes 1 MiB for each example, and may hold on to it until the next step has made its own."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.last: Tensor | None = None

    def __call__(self, batch: int) -> None:
        new = torch.zeros(batch, MIB // 4, device="cuda")
        self.last = new if self.keeps else None


@pytest.mark.parametrize(("keeps", "times"), [(False, 1), (True, 2)])
def test_what_a_step_holds_on_to_is_there_in_the_next(keeps: bool, times: int) -> None:
    found = peak(Holding(keeps=keeps), gpu=CARD)
    assert [found.peak_bytes(batch) for batch in (1, 64, 500)] == [
        times * batch * MIB for batch in (1, 64, 500)
    ]
    allowed = (CARD.capacity_bytes - CARD.context_bytes[1]) // MIB - 300
    assert times * found.tolerable == pytest.approx(allowed, abs=2 * times)
    assert (found.mode, found.limited_by, found.size) == ("own", "memory", found.tolerable)


@pytest.fixture(scope="module")
def loop() -> tuple[Prediction, nn.Module]:
    net = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    optimizer = torch.optim.AdamW(net.parameters())
    held: dict[str, Tensor] = {}

    def step(batch: int) -> None:
        device = next(net.parameters()).device
        inputs = torch.randn(batch, 1024, device=device)
        targets = torch.zeros(batch, dtype=torch.long).to(device)
        with torch.autocast("cuda", torch.bfloat16):
            held["outputs"] = net(inputs)
            loss = nn.functional.cross_entropy(held["outputs"], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    found = peak(step, gpu=[CARD, "L4"], desired=10**6, ceiling=10**5)
    return found, net


def test_a_loop_of_one_s_own_is_predicted_with_what_it_holds(
    loop: tuple[Prediction, nn.Module],
) -> None:
    found, net = loop
    assert all(p.device.type == "cpu" and p.grad is None for p in net.parameters())
    blocks = sum(-(-p.nbytes // 512) * 512 for p in net.parameters())
    assert found.breakdown.parameter_bytes == blocks
    assert found.breakdown.optimizer_state_bytes == 2 * blocks
    assert found.plan is not None
    assert found.precision is None
    assert [what_if.change for what_if in found.what_ifs] == ["expandable segments"]
    assert f"3.0 GiB, own step: tolerable batch {found.tolerable}" in str(found)


def test_a_ceiling_bounds_what_is_tolerable_and_memory_s_answer_is_told(
    loop: tuple[Prediction, nn.Module],
) -> None:
    found, _ = loop
    (larger,) = found.others
    assert (larger.tolerable, larger.largest, larger.limited_by) == (10**5, 10**5, "ceiling")
    assert larger.notes[0].startswith("the ceiling is 100000; memory alone would allow ")
    assert larger.line.endswith("tolerable batch 100000")


def test_what_a_step_holds_is_found_wherever_it_is() -> None:
    net, lists = nn.Linear(2, 2), [{"twin": nn.ReLU()}]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    modules, optimizers = modules_and_optimizers(
        lambda batch: (optimizer, lists, net(torch.zeros(batch, 2)))
    )
    assert {id(net), id(lists[0]["twin"])} <= set(map(id, modules))
    assert optimizers == [optimizer]


def fails(batch: int) -> None:
    raise KeyError(f"mine, at {batch}")


def stays_on_the_host(batch: int) -> None:
    torch.zeros(batch, 10)


def too_large(batch: int) -> None:
    torch.zeros(batch + 3, 2**28, device="cuda")


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (fails, KeyError, "mine, at 6"),
        (stays_on_the_host, ValueError, "nothing that step makes on the GPU grows with its batch"),
        (
            too_large,
            DoesNotFitError,
            "does not fit in 3.0 GiB .*at least 1.4 GiB more",
        ),
    ],
)
def test_what_cannot_be_predicted_is_told(
    step: Callable[[int], None], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        peak(step, gpu=CARD)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="step must be callable with a number of examples, got 3"):
        peak(3, gpu=CARD)  # type: ignore[arg-type]  # That is the point.
    with pytest.raises(ValueError, match="ceiling must be at least 1, got 0"):
        peak(fails, gpu=CARD, ceiling=0)


CODE = """
import functools
import torch
from torch import nn
from autobatch import peak, predict

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.act = lambda x: x.relu()
    def forward(self, x):
        return self.act(self.inner(x))

net = Own()
sgd = functools.partial(torch.optim.SGD, lr=0.1, fused=True)
loss = lambda outputs, targets: (outputs - targets).square().mean()
data = torch.zeros(8, 64), torch.zeros(8, 64)

found = predict(net, data, gpu="T4", loss=loss, optimizer=lambda p: sgd(p), precision="bf16")
own = peak(lambda batch: net(torch.zeros(batch, 64, device="cuda")).sum().backward(), gpu="T4")
print(found.peak_bytes(1000) > own.peak_bytes(1000) > 1000 * 64 * 4)
"""
CELLS = f"""
import code, __main__
console = code.InteractiveInterpreter(vars(__main__))
for number, cell in enumerate({CODE.split(chr(10) * 2)!r}):
    console.runsource(cell + chr(10), f"<cell {{number}}>", "exec")
"""


@pytest.mark.parametrize("way", ["script", "standard input", "cells"])
def test_a_prediction_needs_no_main_guard_and_no_file(way: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CODE)
    arguments = {"script": [str(script)], "standard input": ["-"], "cells": ["-c", CELLS]}[way]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=CODE if way == "standard input" else "",
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(Path(autobatch.__file__).parents[1]),
        },
    )
    assert done.stdout == "True\n", done.stderr
