"""A forked worker does what a fresh one does, as far as its parent can see."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from forked_workers import Servers
from torch import nn

from autobatch import AutobatchError, peak


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with Servers() as made:
        yield made


def work(net: nn.Linear, batch: int) -> None:
    x = torch.ones(batch, 64, device=net.weight.device)
    net(x).tanh().sum().backward()


def dies(how: Callable[[], None], batch: int) -> None:
    if batch:
        how()


def exits() -> None:
    os._exit(7)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_it_answers_as_a_fresh_one_and_sees_the_same(servers: Servers) -> None:
    fresh = peak(functools.partial(work, nn.Linear(64, 256)), gpu="T4")
    with servers.serving():
        forked = peak(functools.partial(work, nn.Linear(64, 256)), gpu="T4")
    assert str(forked) == str(fresh)
    assert [forked.peak_bytes(n) for n in (1, 7, 999)] == [fresh.peak_bytes(n) for n in (1, 7, 999)]


@pytest.mark.parametrize(("how", "code"), [(exits, "7"), (is_killed, "-9")])
def test_how_it_ended_is_seen(how: Callable[[], None], code: str, servers: Servers) -> None:
    with servers.serving(), pytest.raises(AutobatchError, match=f"ended with code {code}"):
        peak(functools.partial(dies, how), gpu="T4")


def test_it_is_gone_with_what_started_it(servers: Servers) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with servers.serving():
        peak(functools.partial(work, nn.Linear(64, 256)), gpu="T4")
    others = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.pid not in before and process.status() != psutil.STATUS_ZOMBIE
    ]
    assert len(others) <= 1, "none but a server"


def test_everything_else_is_started_as_ever(servers: Servers) -> None:
    command: list[Any] = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]
    with servers.serving():
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
