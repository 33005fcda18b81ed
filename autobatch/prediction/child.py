"""A process of its own for traces: what they change in torch, and any abort, stays there.

``python -m autobatch.prediction.child RESULT`` reads an order from the standard input and writes
the answer to the file RESULT. Programs are sent by cloudpickle, so a script needs no main guard;
what lies on the device is sent as shapes.
"""

import io
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cloudpickle
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch.commands.vision import import_torchvision
from autobatch.errors import AutobatchError
from autobatch.prediction import fakecuda
from autobatch.prediction.trace import Program, Recorder, Trace, record

_TAIL: Final = 2000  # Characters of what the child said last.


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A program to be traced, packed.

    Attributes:
        program: As ``packed`` returns it.
        batches: What to trace it at.
        flash: Whether the GPU has flash attention.
    """

    program: bytes
    batches: tuple[int, ...]
    flash: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of orders.

    Attributes:
        traces: A list for each order, a trace for each batch.
        on_cuda: False where this build of torch is another, and the CPU's way was traced.
    """

    traces: list[list[Trace]]
    on_cuda: bool


def packed(program: Program, on_device: Iterable[Tensor]) -> bytes:
    """Return the program, pickled; tensors ``on_device`` lose their values.

    Raises:
        TypeError: If something in it cannot be sent to another process.
    """
    stream = io.BytesIO()
    packer = _Packer(stream, {id(tensor) for tensor in on_device})
    try:
        packer.dump(program)
    except Exception as error:
        raise TypeError(
            f"model, optimizer or loss cannot be sent to another process: {error}"
        ) from error
    return stream.getvalue()


def traced(orders: Sequence[Order]) -> Answer:
    """Trace in a new process, which has no GPU.

    Raises:
        Exception: Whatever the program raised there.
        AutobatchError: If the process ended otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="autobatch-") as folder:
        result = Path(folder) / "result"
        done = subprocess.run(
            [sys.executable, "-P", "-m", __spec__.name, str(result)],
            input=pickle.dumps((sys.path, "torchvision" in sys.modules, list(orders))),
            stdout=subprocess.DEVNULL,  # What the user's code prints has been, or will be, printed.
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path))),
            },
            check=False,
        )
        if not result.exists():
            said = done.stderr.decode(errors="replace").strip()[-_TAIL:]
            raise AutobatchError(
                f"the process that traced the step ended with code {done.returncode}: {said}"
            )
        answer: Answer | Exception = pickle.loads(result.read_bytes())
    if isinstance(answer, Exception):
        raise answer
    return answer


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is not typed.
    """Puts what is on the device down as its shape."""

    def __init__(self, stream: io.BytesIO, on_device: set[int]) -> None:
        super().__init__(stream)
        self._on_device = on_device

    def persistent_id(self, value: object) -> tuple[Any, ...] | None:
        """Return how to make a tensor like ``value``, or None where it is pickled."""
        if not isinstance(value, Tensor) or not (id(value) in self._on_device or value.is_cuda):
            return None
        shape, dtype = tuple(value.shape), value.dtype
        is_parameter = isinstance(value, nn.Parameter)
        return id(value), shape, value.stride(), dtype, value.requires_grad, is_parameter


class _Unpacker(pickle.Unpickler):
    """Makes tensors without values on the device."""

    def __init__(self, program: bytes, device: torch.device) -> None:
        super().__init__(io.BytesIO(program))
        self._device = device
        self._fake: TorchDispatchMode | None = None
        self._made: dict[int, Tensor] = {}

    def program(self) -> Program:
        """Return the program; tensors of the host have their values, which a fake mode drops."""
        with fakecuda.unset_fake_temporarily() as self._fake:
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


def _trace(order: Order, batch: int, device: torch.device) -> Trace:
    load = _Unpacker(order.program, device).program
    return record(load, batch, Recorder(device), flash=order.flash)


def _answer(orders: Sequence[Order]) -> Answer:
    on_cuda = fakecuda.works()
    device = torch.device("cuda:0" if on_cuda else "cpu")
    traces = [[_trace(order, batch, device) for batch in order.batches] for order in orders]
    return Answer(traces=traces, on_cuda=on_cuda)


def _sendable(answer: Callable[[], Answer]) -> bytes:
    """The answer, or the error that came in its place, pickled."""
    try:
        return pickle.dumps(answer())
    except Exception as error:  # noqa: BLE001  # It is raised again where it belongs.
        failure = error
    try:
        content = cloudpickle.dumps(failure)
        pickle.loads(content)  # Some errors can be written, and not read.
        return bytes(content)
    except Exception:  # noqa: BLE001
        return pickle.dumps(RuntimeError(f"{type(failure).__name__}: {failure}"))


def main(result: Path) -> None:
    """Read orders, trace, and write the answer, whole or not at all."""
    warnings.simplefilter("ignore")  # The user's code has warned, or will warn, where it runs.
    sys.path[:], has_torchvision, orders = pickle.load(sys.stdin.buffer)
    if has_torchvision:
        import_torchvision()  # Beside a CPU build of torch it cannot be imported plainly.
    content = _sendable(lambda: _answer(orders))
    unfinished = result.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    unfinished.rename(result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
