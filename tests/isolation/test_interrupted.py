"""Ctrl-C at any line of a search leaves no trace: it is raised at a line, and all is compared."""

import contextlib
import gc
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from states import fingerprint, identities
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import autobatch
from autobatch import find_batch_size

FILES = (str(Path(autobatch.__file__).parent), contextlib.__file__)
CONTEXTS = ("metered.py", "state.py", "contextlib.py", "job.py")  # Where something is left open.


class Tracer:
    """Raises KeyboardInterrupt at one line, counted over the files of interest.

    Not where the search holds Ctrl-C back: there it cannot come.
    """

    def __init__(self, place: int, only: tuple[str, ...] = ("",)) -> None:
        self.lines = 0
        self._place = place
        self._only = only

    def __call__(self, frame: FrameType, event: str, _: Any) -> "Tracer | None":
        name = frame.f_code.co_filename
        if not name.startswith(FILES):
            return None
        if event == "line" and name.endswith(self._only):
            if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                return self
            self.lines += 1
            if self.lines == self._place:
                raise KeyboardInterrupt
        return self


def problem() -> tuple[nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model(torch.randn(4, 8)).sum().backward()
    return model, torch.optim.Adam(model.parameters()), (torch.randn(40, 8), torch.arange(40) % 2)


def searched(tracer: Tracer) -> bool:
    """Search, traced; return whether nothing is different afterwards, and it was interrupted."""
    model, optimizer, data = problem()
    before, objects = fingerprint(model, optimizer), identities(model, optimizer)
    interrupted, outer = False, sys.gettrace()
    sys.settrace(tracer)
    try:
        find_batch_size(model, data, optimizer=optimizer, memory_limit="20KiB", device="cpu")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        sys.settrace(outer)
    gc.collect()
    assert not _get_current_dispatch_mode_stack(), "a meter is left on"
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert fingerprint(model, optimizer) == before
    assert identities(model, optimizer) == objects
    return interrupted


@pytest.mark.parametrize(("only", "samples"), [(("",), 20), (CONTEXTS, 40)])
def test_ctrl_c_at_any_line_leaves_no_trace(only: tuple[str, ...], samples: int) -> None:
    whole = Tracer(0, only)
    assert not searched(whole)
    places = random.Random(0).sample(range(1, whole.lines), samples)
    assert sum(searched(Tracer(place, only)) for place in places) > samples // 2
