"""The process that traces: ``python -m autobatch.prediction.tracing_worker RESULT``.

It reads orders from the standard input and writes the answer to the file RESULT.
"""

import gc
import io
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch.compat.torchvision import import_torchvision
from autobatch.errors import TRACED
from autobatch.isolation.serialization import cloudpickle
from autobatch.prediction import fake_cuda
from autobatch.prediction.trace import Program, Recorder, Trace, record, with_updates
from autobatch.prediction.tracing_process import Answer, Order


class _Unpacker(pickle.Unpickler):
    """Makes tensors without values on the device."""

    def __init__(self, program: bytes, device: torch.device) -> None:
        super().__init__(io.BytesIO(program))
        self._device = device
        self._fake: TorchDispatchMode | None = None
        self._made: dict[int, Tensor] = {}

    def program(self) -> Program:
        """Return the program; tensors of the host have their values, which a fake mode drops."""
        with fake_cuda.with_values() as self._fake:
            program: Program = self.load()
            return program

    def persistent_load(self, description: Any) -> Tensor:
        """Return the tensor described; the same one again where it was the same."""
        name, shape, stride, dtype, requires_grad, is_parameter = description
        if name not in self._made:
            with self._fake or nullcontext():
                tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self._device)
            if is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=requires_grad)
            self._made[name] = tensor.requires_grad_(requires_grad)
        return self._made[name]


def _traces(order: Order, device: torch.device) -> list[Trace]:
    try:
        return [_trace(order, batch, device) for batch in order.batches]
    except Exception:
        if order.optional:
            return []
        raise


def _trace(order: Order, batch: int, device: torch.device) -> Trace:
    load = _Unpacker(order.program, device).program
    return record(load, batch, Recorder(device), flash=order.flash)


def _exchanged(order: Order, known: Mapping[int, Trace], device: torch.device) -> list[Trace]:
    """The traces ordered, from those of the first order and the optimizer's part; or none."""
    if order.update is None or not set(order.batches) <= set(known):
        return []
    updates = _traces(replace(order, program=order.update, batches=order.batches[:1]), device)
    found = [with_updates(known[batch], update) for update in updates for batch in order.batches]
    traces = [trace for trace in found if trace is not None]
    return traces if len(traces) == len(order.batches) else []


def answer(orders: Sequence[Order]) -> Answer:
    """Trace everything that is ordered, here."""
    on_cuda = fake_cuda.works()
    device = torch.device("cuda:0" if on_cuda else "cpu")
    traces: list[list[Trace]] = []
    for order in orders:
        # An optional order that failed has no traces.
        known = dict(zip(orders[0].batches, traces[0], strict=False)) if traces else {}
        traces.append(_exchanged(order, known, device) or _traces(order, device))
    return Answer(traces=traces, on_cuda=on_cuda)


def _sendable(work: Callable[[], Answer]) -> bytes:
    """The answer, or the error that came in its place, pickled."""
    try:
        return pickle.dumps(work())
    except Exception as error:  # noqa: BLE001  # It is raised again where it belongs.
        failure = error
        failure.add_note(f"{TRACED}\n{traceback.format_exc()}")
    try:
        content = cloudpickle().dumps(failure)
        pickle.loads(content)  # Some errors can be written, and not read.
        return bytes(content)
    except Exception:  # noqa: BLE001
        told = RuntimeError(f"{type(failure).__name__}: {failure}")
        told.__notes__ = failure.__notes__
        return pickle.dumps(told)


def main(result: Path) -> None:
    """Read orders, trace, and write the answer, whole or not at all."""
    warnings.simplefilter("ignore")  # The user's code has warned, or will warn, where it runs.
    sys.path[:], settings, orders = pickle.load(sys.stdin.buffer)
    if settings.has_torchvision:
        import_torchvision()  # Beside a CPU build of torch it cannot be imported plainly.
    settings.apply()
    gc.freeze()  # What has been imported stays: it need not be looked through again and again.
    content = _sendable(lambda: answer(orders))
    unfinished = result.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    unfinished.rename(result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
