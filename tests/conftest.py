"""What every test runs under."""

import gc
import importlib.util
import signal

import pytest
import torch

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


def pytest_collection_finish() -> None:
    """Thousands of collected tests stay: garbage is collected after each failure, not in them."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check whether the model mixes examples runs: for tests that count the model's calls."""
    monkeypatch.setattr(BatchIndependenceCheck, "check", lambda *_: None)
