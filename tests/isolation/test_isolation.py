"""A search in a process of its own finds the same, touches nothing here, and outlives its trials.

Each process that is started imports torch, which takes seconds: a test starts as few as it can.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from states import fingerprint, identities
from torch import Tensor, nn

from autobatch import (
    AutobatchError,
    ProcessDiedError,
    SearchOptions,
    Trial,
    Verdict,
    check,
    find_and_train,
    find_batch_size,
    find_largest,
)
from autobatch.events import Event, Observer, SearchEnded, SearchStarted, TrialEnded, TrialStarted
from autobatch.isolation import trials
from autobatch.isolation.messages import Raised
from autobatch.isolation.serialization import pack_task, unpack_task
from autobatch.isolation.trials import run_isolated

ROOT = Path(__file__).parents[2]
ISOLATED = SearchOptions(isolate=True)


def rows(examples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(examples, 4), torch.arange(examples) % 3


class Fragile(nn.Module):
    """Costs its process its life above a size: one way here, another way there."""

    def __init__(self, limit: int, exit_above: int | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.limit = limit
        self.exit_above = limit if exit_above is None else exit_above

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.limit:
            if len(x) > self.exit_above:
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        scores: Tensor = self.inner(x)
        return scores


# A script as users write it: no main guard, a class and a lambda of its own.

SCRIPT = """
import json, os, sys
sys.path.insert(0, {modules!r})
import only_on_my_path
import torch
from torch import nn
from autobatch import SearchOptions, find_batch_size
import autobatch.events

class Odd(Exception):
    def __init__(self, one, other):
        super().__init__(f"{{one}} {{other}}")

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))
    def forward(self, x):
        if wrong:
            raise Odd("quite", only_on_my_path.WORD)
        if os.getpid() != parent:
            print("tried in", os.getcwd(), len(x))
        return self.inner(x)

parent, wrong, torch_dtype = os.getpid(), False, torch.float64
torch.set_num_threads(1)
torch.set_default_dtype(torch_dtype)
model = Mine()
data = torch.randn(400, 64), torch.randn(400, 1)

def search(isolate):
    return find_batch_size(
        model, data, loss=lambda out, y: ((out - y) ** 2).mean(), memory_limit="3MiB",
        optimizer=lambda parameters: torch.optim.Adam(parameters),
        search=SearchOptions(isolate=isolate),
    )

here, there = search(False), search(True)
wrong, error = True, None
try:
    search(True)
except Odd as caught:
    error = caught
with open({report!r}, "w") as file:
    json.dump({{
        "here": str(here), "there": str(there), "size": int(there),
        "peaks": [[t.size, t.peak_bytes] for t in here.trials]
            == [[t.size, t.peak_bytes] for t in there.trials],
        "error": str(error), "notes": error.__notes__,
    }}, file)
"""


def script(folder: Path, text: str, **names: object) -> subprocess.Popen[str]:
    file = folder / "script.py"
    file.write_text(text.format(**names))
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(file)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_script_without_a_main_guard_finds_the_same_size_in_isolation(tmp_path: Path) -> None:
    modules, report = tmp_path / "modules", tmp_path / "report.json"
    modules.mkdir()
    (modules / "only_on_my_path.py").write_text("WORD = 'odd'")
    process = script(tmp_path, SCRIPT, modules=str(modules), report=str(report))
    printed, complaints = process.communicate()
    assert (process.returncode, complaints) == (0, "")
    told = json.loads(report.read_text())
    assert told["here"].split(";")[0] == told["there"].split(";")[0]
    assert told["peaks"]
    assert 1 < told["size"] < 400
    # What a model prints there is seen here; it ran where the script did.
    assert f"tried in {tmp_path} {told['size']}\n" in printed
    # Its own error has arrived as what it is, though its class takes other arguments.
    assert told["error"] == "quite odd"
    where, trace = told["notes"]
    assert where == "raised in the first step of the search, on 2 examples of the data"
    assert trace.startswith("Raised in the isolated process:\nTraceback")
    assert "in forward" in trace


def test_what_the_process_died_of_is_not_tolerable_and_the_search_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = children()  # The tests before this one may have left a server or a worker.
    model, data, events = Fragile(4, exit_above=5), rows(6), list[Event]()
    optimizer = torch.optim.Adam(model.parameters())
    before, objects = fingerprint(model, optimizer), identities(model, optimizer)

    with monkeypatch.context() as here:
        for name in ("_lazy_init", "is_available", "device_count", "current_device", "init"):
            here.setattr(torch.cuda, name, untouchable)
        found = find_batch_size(
            model, data, optimizer=optimizer, search=ISOLATED, progress=events.append
        )

    assert found.size == 4
    failed = {trial.size: trial for trial in found.trials if not trial.fits}
    assert {trial.failure for trial in failed.values()} == {Verdict.FATAL}
    assert "exit status 3" in failed[6].message
    assert "signal 9 (SIGKILL)" in failed[5].message
    assert fingerprint(model, optimizer) == before
    assert identities(model, optimizer) == objects
    # Every event, in order, as if it had been one process.
    assert isinstance(events[0], SearchStarted)
    assert events[-1] == SearchEnded(search=found)
    pairs = list(zip(events[1:-1:2], events[2:-1:2], strict=True))
    assert pairs == [(TrialStarted(size=t.size), TrialEnded(trial=t)) for t in found.trials]
    assert [child for child in children() if child not in others] == []


def untouchable(*_: object) -> None:
    raise AssertionError("CUDA was touched in the parent")


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


# A task is any function of an observer and of what has been tried before.


def trying(
    sizes: Sequence[int],
    step: Callable[[int, Observer], None],
    observer: Observer,
    history: Sequence[Trial],
) -> list[int]:
    """Try what has not been tried; return which sizes fit."""
    trials = list(history)
    observer(SearchStarted(device="none", limit_bytes=0, ceiling=sizes[-1]))
    for size in sizes:
        if size not in {trial.size for trial in trials}:
            observer(TrialStarted(size=size))
            step(size, observer)
            trials.append(Trial(size=size, fits=True))
            observer(TrialEnded(trial=trials[-1]))
    return [trial.size for trial in trials if trial.fits]


def torn(size: int, observer: Observer) -> None:
    if size == 2:
        time.sleep(600)
    if size == 3:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if size == 4:
        lost = Trial(size=4, fits=False, failure=Verdict.FATAL)
        observer(TrialEnded(trial=lost))


def test_a_fresh_process_goes_on_after_a_lost_context_and_a_trial_that_does_not_end() -> None:
    events: list[Event] = []
    task = functools.partial(trying, (1, 2, 3, 4, 5), torn)
    assert run_isolated(task, observer=events.append, timeout_seconds=1) == [1, 5]
    assert sum(isinstance(event, SearchStarted) for event in events) == 1
    trials = [event.trial for event in events if isinstance(event, TrialEnded)]
    assert [(trial.size, trial.failure) for trial in trials] == [
        (1, None),
        (2, Verdict.TOO_SLOW),
        (3, Verdict.FATAL),
        (4, Verdict.FATAL),
        (5, None),
    ]
    assert "1 s" in trials[1].message
    assert "illegal memory access" in trials[2].message
    assert trials[1].seconds >= 1


def dies(*_: object) -> None:
    os._exit(7)


def test_a_process_that_dies_outside_a_trial_is_an_error_that_says_what_is_known() -> None:
    with pytest.raises(ProcessDiedError, match="exit status 7, after size 8 ran") as caught:
        run_isolated(functools.partial(dies), observer=print, history=[Trial(size=8, fits=True)])
    assert caught.value.size == 8


def test_so_many_deaths_in_a_row_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_MOST_DEATHS", 1)
    with pytest.raises(ProcessDiedError, match="exit status 7, before any size ran"):
        run_isolated(functools.partial(trying, (1, 2), dies), observer=lambda _: None)


def test_check_says_that_a_size_costs_the_process_its_life() -> None:
    trial = check(Fragile(6), rows(5), 7, search=ISOLATED)
    assert (trial.size, trial.fits, trial.failure) == (7, False, Verdict.FATAL)


def test_training_goes_on_here_with_what_was_found_there() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    other = nn.Sequential(nn.Linear(4, 3))
    other.load_state_dict(model.state_dict())
    data = rows(48)
    results = [
        find_and_train(
            each,
            data,
            16,
            optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            epochs=1,
            seed=0,
            memory_limit="64KiB",
            search=SearchOptions(isolate=isolate),
            progress=False,
        )
        for each, isolate in ((model, False), (other, True))
    ]
    assert results[0].plan == results[1].plan
    assert results[0].losses == results[1].losses
    assert all(map(torch.equal, model.parameters(), other.parameters()))


# What is sent.


def test_what_cannot_be_sent_is_named_and_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", untouchable)
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].guard = threading.Lock()  # type: ignore[assignment]  # What a module may hold.
    with pytest.raises(TypeError, match=r"model\.0\.guard cannot be sent .*isolate=False"):
        find_batch_size(model, rows(5), search=ISOLATED)
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"loss\.lock cannot be sent"):
        find_batch_size(
            nn.Linear(4, 3), rows(5), loss=lambda out, y: (out, y, lock), search=ISOLATED
        )


def test_what_is_sent_shares_its_memory_where_it_arrives() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    wide = torch.arange(10.0)
    task = functools.partial(print, model, optimizer, wide[:5], wide[5:])
    arrived = unpack_task(bytes(pack_task(task)))
    assert isinstance(arrived, functools.partial)
    model, optimizer, left, right = arrived.args
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
    assert left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


class UnsendableError(Exception):
    """Holds what no pickle takes."""

    def __init__(self) -> None:
        super().__init__("no", threading.Lock())


@pytest.mark.parametrize("error", [KeyError("one"), SystemExit(3), AutobatchError("two")])
def test_an_error_arrives_as_what_it_is(error: BaseException) -> None:
    arrived = Raised.of(error, context_lost=False).error()
    assert (type(arrived), arrived.args) == (type(error), error.args)


def test_an_error_that_cannot_be_sent_arrives_as_what_it_said() -> None:
    arrived = Raised.of(UnsendableError(), context_lost=False).error()
    assert isinstance(arrived, AutobatchError)
    assert "UnsendableError: ('no'" in str(arrived)


def test_a_large_model_arrives() -> None:
    model = nn.Sequential(nn.Embedding(4_000_000, 16), nn.Linear(16, 3))  # 256 MB
    task = functools.partial(parameters_of, model)
    assert run_isolated(task, observer=print) == 64_000_051


def parameters_of(model: nn.Module, *_: object) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_isolation_is_asked_for_with_true_or_false() -> None:
    with pytest.raises(TypeError, match="isolate must be True or False, got 1"):
        SearchOptions(isolate=1)  # type: ignore[arg-type]  # As a caller without types may.
    with pytest.raises(ValueError, match="isolate=True cannot restore what run changes"):
        find_largest(print, ceiling=8, search=ISOLATED)


# No process outlives the one that started it.

WAITING = """
import os, signal, time
from autobatch.isolation.trials import run_isolated

def wait(observer, history):
    print(os.getpid(), signal.getsignal(signal.SIGINT).name, flush=True)
    time.sleep(600)

try:
    run_isolated(wait, observer=print)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_no_process_is_left_by_ctrl_c_nor_by_a_parent_that_is_killed(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    interrupted, killed = (script(folder, WAITING) for folder in folders)
    said = [
        process.stdout.readline().split() for process in (interrupted, killed) if process.stdout
    ]
    first, second = (psutil.Process(int(number)) for number, _ in said)
    assert {handler for _, handler in said} == {"SIG_IGN"}, "a terminal's Ctrl-C goes to both"
    interrupted.send_signal(signal.SIGINT)
    killed.kill()
    printed, complaints = interrupted.communicate()
    assert (printed, complaints) == ("interrupted\n", "")
    assert not first.is_running()
    killed.communicate()
    second.wait(10)


TRACING = """
import os, time
from autobatch import peak

def step(batch):
    with open("unfinished", "w") as file:
        file.write(str(os.getpid()))
    os.rename("unfinished", "pid")
    time.sleep(600)

try:
    peak(step, gpu="T4")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_no_process_is_left_by_ctrl_c_in_a_prediction(tmp_path: Path) -> None:
    predicting = script(tmp_path, TRACING)
    while not (tmp_path / "pid").exists():
        assert predicting.poll() is None
        time.sleep(0.1)
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    predicting.send_signal(signal.SIGINT)
    assert predicting.communicate() == ("interrupted\n", "")
    assert not worker.is_running()


def there(_observer: Observer, _history: Sequence[Trial]) -> dict[str, object]:
    return {
        "path": sys.path,
        "variable": os.environ.get("PYTHONPATH"),
        "arguments": sys.argv[1:],
        "started": sys.orig_argv[1:5],
        "ignores Ctrl-C": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }


@pytest.mark.parametrize("variable", [None, "somewhere:else"])
def test_a_process_begins_as_this_one_is(
    variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the working directory is not imported instead of what is meant."""
    for name in ("torch", "runpy", "autobatch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    if variable is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", variable)
    found = run_isolated(functools.partial(there), observer=lambda _: None)
    assert found == {
        "path": sys.path,
        "variable": variable,
        "arguments": [],
        "started": ["-u", "-P", "-m", "autobatch.isolation"],
        "ignores Ctrl-C": True,
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }
