"""What every test runs under."""

import gc
import importlib.util
import signal
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from forked_workers import Servers

from autobatch.training.losses.batch_independence import BatchIndependenceCheck

# The tests run in parallel, one a core; more threads would only wait for each other.
torch.set_num_threads(1)
# Started in the background, Python ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples each time: a red run is a change of the code, not of the dice.
if importlib.util.find_spec("hypothesis"):  # A GPU machine need not have it: see tests/gpu/.
    from hypothesis import settings

    settings.register_profile("seeded", derandomize=True, deadline=None)
    settings.load_profile("seeded")


@pytest.fixture(scope="module", autouse=True)
def _garbage_is_the_module_s_own() -> None:
    """Garbage is collected after each failure: not in thousands of tests and whole libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _servers() -> Iterator[Servers]:
    with Servers() as servers:
        yield servers


@pytest.fixture(scope="module", autouse=True)
def _workers_of_predictions_are_forked(
    request: pytest.FixtureRequest, _servers: Servers
) -> Iterator[None]:
    """A fresh worker takes two to three seconds to import torch; predictions start many."""
    with _servers.serving() if request.path.parent.name == "prediction" else nullcontext():
        yield


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check whether the model mixes examples runs: for tests that count the model's calls."""
    monkeypatch.setattr(BatchIndependenceCheck, "check", lambda *_: None)
