"""Programs that are traced in worker processes, where torch can be changed without harm.

Programs are sent by cloudpickle, so that a script needs no ``if __name__ == "__main__"``. Only the
shapes of tensors that lie on the device are sent.
"""

import functools
import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Final, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.errors import TRACED, AutobatchError
from autobatch.isolation.messages import Raised
from autobatch.isolation.process import WorkerProcess, worker_process
from autobatch.isolation.serialization import model_pickler, pack_task
from autobatch.prediction import tracing_worker
from autobatch.prediction.trace import Program
from autobatch.prediction.tracing_worker import TracingRequest, TracingResult, TracingSettings

_TAIL: Final = 2000  # The number of characters of a dead worker's standard error in a message.
_NO_GPU: Final = {"CUDA_VISIBLE_DEVICES": ""}


def pack_program(program: Program, on_device: Iterable[Tensor]) -> bytes:
    """Return the program as bytes.

    Args:
        program: The program, with all that it refers to.
        on_device: The tensors of the program that lie on the GPU; their values are not sent.

    Raises:
        TypeError: If part of the program cannot be sent to another process.
        AutobatchError: If cloudpickle is not installed.
    """
    return _pickled(program, functools.partial(_as_shape, {id(tensor) for tensor in on_device}))


def modules_and_optimizers(program: object) -> tuple[list[nn.Module], list[Optimizer]]:
    """Return the modules and the optimizers that would be sent together with ``program``.

    Raises:
        TypeError: If part of the program cannot be sent to another process.
    """
    modules: list[nn.Module] = []
    optimizers: list[Optimizer] = []

    def note(value: object) -> str | None:
        if isinstance(value, nn.Module):
            modules.append(value)
        elif isinstance(value, Optimizer):
            optimizers.append(value)
        return "a tensor" if isinstance(value, Tensor) else None  # Nobody reads its values.

    _pickled(program, note)
    return modules, optimizers


def trace_in_processes(parts: Sequence[Sequence[TracingRequest]]) -> list[TracingResult]:
    """Trace the requests of each part in a worker process of its own, all at the same time.

    Args:
        parts: Lists of requests.

    Returns:
        A result for each part.

    Raises:
        Exception: The error that a program raised in its process.
        AutobatchError: If a process ended without an answer.

    Example:
        >>> request = TracingRequest(program=pack_program(step, model.parameters()), batches=(6, 9))
        >>> (result,) = trace_in_processes([[request]])
    """
    with ExitStack() as stack:
        workers = [
            # The user's own process prints the same text, so the workers' is dropped.
            stack.enter_context(worker_process(variables=_NO_GPU, silent=True))
            for _ in parts
        ]
        task, prepare = pack_task(tracing_worker.run), TracingSettings.here().apply
        for worker, requests in zip(workers, parts, strict=True):
            worker.begin(task, list(requests), prepare=prepare)
        return [_result(worker) for worker in workers]


def trace_in_process(requests: Sequence[TracingRequest]) -> TracingResult:
    """Trace the requests in one worker process. Raises what ``trace_in_processes`` raises."""
    (result,) = trace_in_processes([requests])
    return result


def _result(worker: WorkerProcess) -> TracingResult:
    try:
        message = worker.outcome()
    except EOFError:
        message = None
    if message is None:
        code = worker.wait()
        raise AutobatchError(
            f"the process that traced the step ended with code {code}: "
            f"{worker.complaints()[-_TAIL:]}"
        )
    if isinstance(message, Raised):
        error = message.error(TRACED)
        if isinstance(error, Exception):
            raise error
        # The step called sys.exit: that ends the tracing, and not the user's session.
        raise AutobatchError(f"the process that traced the step ended with {error!r}") from error
    return cast("TracingResult", pickle.loads(cast("bytes", message.value)))


def _pickled(program: object, persistent_id: Callable[[object], object]) -> bytes:
    stream = io.BytesIO()
    pickler = model_pickler(stream)
    pickler.persistent_id = persistent_id
    try:
        pickler.dump(program)
    except Exception as error:
        raise TypeError(
            f"model, optimizer, loss or step cannot be sent to another process: {error}"
        ) from error
    return stream.getvalue()


def _as_shape(on_device: set[int], value: object) -> tuple[Any, ...] | None:
    """Return the description of a tensor on the device; None for a value that is pickled."""
    if not isinstance(value, Tensor) or not (id(value) in on_device or value.is_cuda):
        return None
    shape, dtype = tuple(value.shape), value.dtype
    is_parameter = isinstance(value, nn.Parameter)
    return id(value), shape, value.stride(), dtype, value.requires_grad, is_parameter
