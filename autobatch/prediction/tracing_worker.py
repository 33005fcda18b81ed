"""The tracing of programs inside a worker process that has no GPU."""

import gc
import io
import pickle
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch.compat.torchvision import import_torchvision
from autobatch.events import Observer
from autobatch.prediction import fake_cuda
from autobatch.prediction.trace import Program, Recorder, Trace, record, with_updates


class TracingSettings(NamedTuple):
    """The settings of a process that the trace of a step depends on.

    Attributes:
        has_torchvision: Whether torchvision is imported.
        dtype: The dtype of tensors that are made without one.
        flash: Whether attention may use flash kernels.
        efficient: Whether attention may use memory-efficient kernels.
    """

    has_torchvision: bool
    dtype: torch.dtype
    flash: bool
    efficient: bool

    @classmethod
    def here(cls) -> "TracingSettings":
        """Return this process's settings."""
        kernels = torch.backends.cuda
        return cls(
            has_torchvision="torchvision" in sys.modules,
            dtype=torch.get_default_dtype(),
            flash=kernels.flash_sdp_enabled(),
            efficient=kernels.mem_efficient_sdp_enabled(),
        )

    def apply(self) -> None:
        """Prepare this process, which must be a worker process, for tracing with these settings."""
        warnings.simplefilter("ignore")  # The user's own process shows the same warnings.
        if self.has_torchvision:
            import_torchvision()  # A plain import fails beside a CPU build of torch.
        torch.set_default_dtype(self.dtype)
        torch.backends.cuda.enable_flash_sdp(self.flash)
        torch.backends.cuda.enable_mem_efficient_sdp(self.efficient)
        gc.freeze()  # Imported modules stay alive, so collections need not visit them.


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingRequest:
    """A program, and the batches to trace it at.

    Attributes:
        program: The program as ``pack_program`` returns it.
        batches: The numbers of examples.
        flash: Whether the GPU has flash attention.
        optional: Whether an error of the program gives no traces. Otherwise the error ends the
            tracing.
        update: The optimizer's part of the program, packed, if the program differs from the first
            request's only in that part; else None.
    """

    program: bytes
    batches: tuple[int, ...]
    flash: bool = True
    optional: bool = False
    update: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingResult:
    """The traces that requests gave.

    Attributes:
        traces: For each request a list with a trace for each batch; an empty list for an optional
            request that failed.
        on_cuda: Whether tensors were on a fake GPU. False if this build of torch does not allow
            that: the traces are then those of a step on the CPU.
    """

    traces: list[list[Trace]]
    on_cuda: bool


def trace_requests(requests: Sequence[TracingRequest]) -> TracingResult:
    """Trace all requests in this process, which must be a worker process.

    Args:
        requests: The requests. The traces of the first one also serve those with an ``update``.

    Raises:
        Exception: The error of a program whose request is not optional.
    """
    on_cuda = fake_cuda.works()
    device = torch.device("cuda:0" if on_cuda else "cpu")
    traces: list[list[Trace]] = []
    for request in requests:
        # An optional request that failed has no traces.
        known = dict(zip(requests[0].batches, traces[0], strict=False)) if traces else {}
        traces.append(_with_updates(request, known, device) or _traces(request, device))
    return TracingResult(traces=traces, on_cuda=on_cuda)


def run(_: Observer, requests: Sequence[TracingRequest]) -> bytes:
    """The worker's task: return the pickled ``TracingResult`` of the requests.

    Plain pickle writes the many small parts of a trace faster than cloudpickle.
    """
    return pickle.dumps(trace_requests(requests))


class _ProgramUnpickler(pickle.Unpickler):
    """An unpickler that puts tensors without values on the device."""

    def __init__(self, program: bytes, device: torch.device) -> None:
        super().__init__(io.BytesIO(program))
        self._device = device
        self._fake: TorchDispatchMode | None = None
        self._made: dict[int, Tensor] = {}

    def program(self) -> Program:
        """Return the program. Its tensors on the host have their values.

        A fake mode would drop those values, so the unpickler leaves the mode while it loads.
        """
        with fake_cuda.with_values() as self._fake:
            program: Program = self.load()
            return program

    def persistent_load(self, description: Any) -> Tensor:
        """Return the described tensor: the same object for each mention of the same tensor."""
        name, shape, stride, dtype, requires_grad, is_parameter = description
        if name not in self._made:
            with self._fake or nullcontext():
                tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self._device)
            if is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=requires_grad)
            self._made[name] = tensor.requires_grad_(requires_grad)
        return self._made[name]


def _traces(request: TracingRequest, device: torch.device) -> list[Trace]:
    try:
        return [_trace(request, batch, device) for batch in request.batches]
    except Exception:
        if request.optional:
            return []
        raise


def _trace(request: TracingRequest, batch: int, device: torch.device) -> Trace:
    load = _ProgramUnpickler(request.program, device).program
    return record(load, batch, Recorder(device), flash=request.flash)


def _with_updates(
    request: TracingRequest, known: Mapping[int, Trace], device: torch.device
) -> list[Trace]:
    """Return the traces of the request, made of known ones and of the optimizer's part.

    Args:
        request: The request.
        known: The traces of the first request, by batch.
        device: The fake device.

    Returns:
        A trace for each batch, or an empty list if the traces cannot be made in this way.
    """
    if request.update is None or not set(request.batches) <= set(known):
        return []
    part = replace(request, program=request.update, batches=request.batches[:1])
    updates = _traces(part, device)
    found = [with_updates(known[batch], update) for update in updates for batch in request.batches]
    traces = [trace for trace in found if trace is not None]
    return traces if len(traces) == len(request.batches) else []
