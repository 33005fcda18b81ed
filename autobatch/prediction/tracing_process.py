"""Programs to be traced in a process of their own: what that changes in torch stays there.

Programs are sent by cloudpickle, so a script needs no main guard; what lies on the device is sent
as shapes.
"""

import functools
import io
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.errors import AutobatchError
from autobatch.isolation.serialization import packer
from autobatch.prediction.trace import Program, Trace

_TAIL: Final = 2000  # Characters of what the child said last.
_CHILD: Final = "autobatch.prediction.tracing_worker"


class Settings(NamedTuple):
    """What of this process a step depends on, wherever it is traced.

    Attributes:
        has_torchvision: Whether it is imported.
        dtype: That tensors get by default.
        flash: Whether attention may take flash kernels,
        efficient: and memory-efficient ones.
    """

    has_torchvision: bool
    dtype: torch.dtype
    flash: bool
    efficient: bool

    @classmethod
    def here(cls) -> "Settings":
        """Return those of this process."""
        kernels = torch.backends.cuda
        return cls(
            has_torchvision="torchvision" in sys.modules,
            dtype=torch.get_default_dtype(),
            flash=kernels.flash_sdp_enabled(),
            efficient=kernels.mem_efficient_sdp_enabled(),
        )

    def apply(self) -> None:
        """Set torch's in this process."""
        torch.set_default_dtype(self.dtype)
        torch.backends.cuda.enable_flash_sdp(self.flash)
        torch.backends.cuda.enable_mem_efficient_sdp(self.efficient)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A program to be traced, packed.

    Attributes:
        program: As ``packed`` returns it.
        batches: What to trace it at.
        flash: Whether the GPU has flash attention.
        optional: Whether an error of the program leaves its traces out, and ends nothing else.
        update: Its optimizer's part, packed, where that alone differs from the first order.
    """

    program: bytes
    batches: tuple[int, ...]
    flash: bool = True
    optional: bool = False
    update: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of orders.

    Attributes:
        traces: A list for each order, a trace for each batch; empty where an optional one failed.
        on_cuda: False where this build of torch is another, and the CPU's way was traced.
    """

    traces: list[list[Trace]]
    on_cuda: bool


def packed(program: Program, on_device: Iterable[Tensor]) -> bytes:
    """Return the program, pickled; tensors ``on_device`` lose their values.

    Raises:
        TypeError: If something in it cannot be sent to another process.
    """
    return _dump(program, functools.partial(_as_shape, {id(tensor) for tensor in on_device}))


def holdings(program: object) -> tuple[list[nn.Module], list[Optimizer]]:
    """Return the modules and the optimizers that would be sent along with ``program``."""
    modules: list[nn.Module] = []
    optimizers: list[Optimizer] = []

    def note(value: object) -> str | None:
        if isinstance(value, nn.Module):
            modules.append(value)
        elif isinstance(value, Optimizer):
            optimizers.append(value)
        return "a tensor" if isinstance(value, Tensor) else None  # Its values are not asked for.

    _dump(program, note)
    return modules, optimizers


def traced(orders: Sequence[Order]) -> Answer:
    """Trace in a new process, which has no GPU.

    Raises:
        Exception: Whatever the program raised there.
        AutobatchError: If the process ended otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="autobatch-") as folder:
        result = Path(folder) / "result"
        done = subprocess.run(
            [sys.executable, "-P", "-m", _CHILD, str(result)],
            input=pickle.dumps((sys.path, Settings.here(), list(orders))),
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


def _dump(program: object, persistent_id: Callable[[object], object]) -> bytes:
    stream = io.BytesIO()
    packing = packer(stream)
    packing.persistent_id = persistent_id
    try:
        packing.dump(program)
    except Exception as error:
        raise TypeError(
            f"model, optimizer, loss or step cannot be sent to another process: {error}"
        ) from error
    return stream.getvalue()


def _as_shape(on_device: set[int], value: object) -> tuple[Any, ...] | None:
    """Return how to make a tensor like ``value``, or None where it is pickled."""
    if not isinstance(value, Tensor) or not (id(value) in on_device or value.is_cuda):
        return None
    shape, dtype = tuple(value.shape), value.dtype
    is_parameter = isinstance(value, nn.Parameter)
    return id(value), shape, value.stride(), dtype, value.requires_grad, is_parameter
