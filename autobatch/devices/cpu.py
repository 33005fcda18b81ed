"""The CPU with a limit on the bytes of live tensors, and the stand-in for any GPU.

Every operation passes a dispatch mode, the meter. The meter adds the storages of the operation's
results, and subtracts a storage when the storage dies: views count once, in-place operations
nothing. The meter sees every tensor that PyTorch allocates, in backward passes and optimizers too,
to the byte. It does not see workspaces inside a kernel, or tensors of other threads. It costs 10 to
15 microseconds an operation.
"""

import gc
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from autobatch.devices.base import HOST, MemoryDevice, MemoryReading, on_host
from autobatch.devices.host_memory import host_memory
from autobatch.signals import deferred_interrupt
from autobatch.units import format_bytes


class CpuDevice(MemoryDevice):
    """The CPU with a memory of any size.

    Args:
        residents: Lists the tensors that live on the device between steps (parameters, buffers,
            optimizer state). These tensors were made before the meter could see them.
        counts_host: Whether the limit is that of the host's memory, so that waiting batches count.
    """

    is_exact = True  # It counts, and holds no cache.
    limit_costs_time = True
    reads_at_once = True
    counts_foreach_writes = False

    def __init__(
        self, residents: Callable[[], Iterable[Tensor]] = tuple, *, counts_host: bool = False
    ) -> None:
        super().__init__(HOST)
        self._residents = residents
        self.counts_host = counts_host
        self._meter = _Meter()

    @classmethod
    def open(
        cls,
        torch_device: torch.device,  # noqa: ARG003  # There is one CPU.
        residents: Callable[[], Iterable[Tensor]],
        *,
        counts_host: bool,
    ) -> "CpuDevice":
        """Return the CPU, with a meter of its own."""
        return cls(residents, counts_host=counts_host)

    @staticmethod
    def start(torch_device: torch.device) -> torch.device:  # noqa: ARG004  # All indices are one.
        """Return the CPU, which has no index."""
        return HOST

    @property
    def name(self) -> str:
        """The device's name, for people."""
        return "CPU"

    def read(self) -> MemoryReading:
        """Return the meter's figures, and the bytes that the host has left."""
        self._adopt()
        total, available = host_memory()
        live = self._meter.live_bytes
        return MemoryReading(
            total_bytes=total,
            free_bytes=available,
            allocated_bytes=live,
            reserved_bytes=live,
            peak_bytes=self._meter.peak_bytes,
            peak_reserved_bytes=None,
            outside_bytes=0,
        )

    @contextmanager
    def limited_to(self, limit_bytes: int) -> Iterator[None]:
        """Raise ``torch.OutOfMemoryError`` inside once live tensors exceed ``limit_bytes``.

        A limit inside a limit can only be tighter.
        """
        self._adopt()
        outer, stack = self._meter.limit_bytes, ExitStack()
        try:
            with deferred_interrupt():  # Ctrl-C in between would leave the mode behind.
                stack.enter_context(eagerly())
                if outer is None:  # A limit inside a limit must not count everything twice.
                    stack.callback(self._meter.leave)
                    self._meter.__enter__()  # type: ignore[no-untyped-call]  # torch's.
                self._meter.limit_bytes = limit_bytes if outer is None else min(limit_bytes, outer)
            yield
        finally:
            with deferred_interrupt():
                self._meter.limit_bytes = outer
                stack.close()

    def reset_peak(self) -> None:
        """Count the peak from here on."""
        self._meter.peak_bytes = self._meter.live_bytes

    def release_cached(self) -> None:
        """Collect reference cycles if they can hold tensors: a collection takes 0.1 seconds."""
        residents = [part for tensor in self._residents() for part in _strided(tensor)]
        storages = {part.untyped_storage()._cdata: part for part in residents}
        resident_bytes = sum(part.untyped_storage().nbytes() for part in storages.values())
        if not storages or self._meter.live_bytes != resident_bytes:
            gc.collect()

    def synchronize(self) -> None:
        """Return at once: the CPU finishes each operation before the next one."""

    def _adopt(self) -> None:
        for tensor in self._residents():
            self._meter.note(tensor)


_Reference = weakref.KeyedRef[int, torch.UntypedStorage]


class _Meter(TorchDispatchMode):
    """Counts the bytes of live CPU storages that pass as results of an operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped.
        self.limit_bytes: int | None = None
        self.peak_bytes = 0
        self._live_bytes = 0
        self._storages: dict[int, tuple[_Reference, int]] = {}
        # Filled without a line of Python: a Ctrl-C in a callback of Python would be lost.
        self._dead: deque[_Reference] = deque()

    @property
    def live_bytes(self) -> int:
        """The bytes that are alive now."""
        while self._dead:
            _, freed_bytes = self._storages.pop(self._dead.popleft().key)
            self._live_bytes -= freed_bytes
        return self._live_bytes

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _flat(result):
            self.note(tensor)
        if self.limit_bytes is not None and self.live_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"metered device out of memory: {format_bytes(self.live_bytes)} of live tensors "
                f"after {func}, limit {format_bytes(self.limit_bytes)}"
            )
        return result

    def leave(self) -> None:
        """End the mode, if it is on: the code that restores all after Ctrl-C may have ended it."""
        if any(mode is self for mode in _get_current_dispatch_mode_stack()):
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch's.

    def note(self, tensor: Tensor) -> None:
        """Count the tensor's storage, unless it is counted at its present size."""
        for part in _strided(tensor):
            self._count(part.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        live_bytes = self.live_bytes  # First: a dead storage's key may be this one's.
        key, now_bytes = storage._cdata, storage.nbytes()
        known, before_bytes = self._storages.get(key, (None, 0))
        if known is not None and before_bytes == now_bytes:
            return
        reference = known or weakref.KeyedRef(storage, self._dead.append, key)
        self._storages[key] = (reference, now_bytes)
        self._live_bytes = live_bytes + now_bytes - before_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)


def _flat(result: object) -> Iterator[Tensor]:
    """The tensors in what an operation returns: one, or lists of them."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _flat(item)


def _strided(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense CPU tensors that hold the memory of ``tensor``: itself, or what it is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return _strided_parts(tensor)
    names, _ = flatten()  # A wrapper, such as a jagged or a quantised tensor.
    return tuple(part for name in names for part in _strided(getattr(tensor, name)))


def _strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if not on_host(tensor):
        return ()
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return ()


_eager: Final[list[AbstractContextManager[object]]] = []  # The stance; then stand-ins.
_turn: Final = threading.Lock()


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled functions eagerly: one compiled under a dispatch mode would stay eager.

    The stance belongs to the process: if several threads are inside, the last one restores it.
    """
    if "torch._dynamo" not in sys.modules:  # Nothing was compiled; its import takes seconds.
        yield
        return
    with _turn:
        stance = nullcontext() if _eager else torch.compiler.set_stance("force_eager")
        stance.__enter__()
        _eager.append(stance)
    try:
        yield
    finally:
        with _turn:
            stance = _eager.pop()
            stance.__exit__(None, None, None)
