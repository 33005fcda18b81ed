"""The allocations of a step at any batch, traced without a GPU.

A program runs on tensors that have no values, and the recorder notes each storage that is allocated
or freed. Every single allocation takes ``constant + slope * batch`` bytes. Therefore two runs at
small batches give the allocations of every batch, and a third run proves them. (The peak is no such
sum: the moment of the peak depends on the batch.)
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autobatch.prediction.caching_allocator import AllocatorEvent, block_bytes
from autobatch.prediction.fake_cuda import OnFakeCuda, fake_cuda, fake_device_of, fake_looks_real

_aten: Final[Any] = torch.ops.aten
_PRODUCTS: Final = (
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default),
)
_FLASH_BACKWARD: Final = _aten._scaled_dot_product_flash_attention_backward.default
_SUM: Final = "add.Tensor"


class AllocationSite(NamedTuple):
    """The part of a step that allocates a tensor: ``("backward", "convolution_backward")``.

    Attributes:
        phase: ``"setup"``, ``"forward"``, ``"backward"`` or ``"optimizer"``.
        operation: The name of the torch operation.
    """

    phase: str
    operation: str


ACTIVATIONS: Final = "activations and temporaries"  # The kind of all other tensors.
WORKSPACE: Final = AllocationSite("", "cublas workspace")  # The GPU determines its size.
WINDOW: Final = AllocationSite("", "a window begins")  # A mark without bytes: the rest is repeated.
UPDATE: Final = AllocationSite("", "an optimizer's step begins")  # A mark without bytes.
UPDATED: Final = AllocationSite("", "an optimizer's step ends")
GRADIENTS: Final = "gradients"
STATE: Final = "optimizer state"


class AllocationChange(NamedTuple):
    """An allocation of ``constant + slope * batch`` bytes; if ``site`` is None, its end.

    Attributes:
        name: The number that identifies the allocation; 0 for a mark.
        constant: Bytes.
        slope: Bytes per example.
        site: The part of the step that allocates the tensor.
    """

    name: int
    constant: int
    slope: int
    site: AllocationSite | None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The allocations of a program as functions of the batch.

    Attributes:
        changes: The allocations and their ends, in order.
        kinds: The kind of each allocation whose kind is known, by name: ``"parameters"``,
            ``"gradients"`` and so on.
        guessed: How often the program needed an unknown value, by the guess and the line of code.
        batch: The only batch for which the trace is right; None if it is right for every batch.
    """

    changes: Sequence[AllocationChange]
    kinds: dict[int, str]
    guessed: dict[str, int]
    batch: int | None = None

    def events(self, batch: int, *, workspace_bytes: int = 0) -> list[AllocatorEvent]:
        """Return the allocator's events at ``batch``, with the window repeated once.

        In the repetition the allocator has the segments of the first run.

        Args:
            batch: Examples in a micro-batch.
            workspace_bytes: The bytes of cuBLAS's workspace, which each thread that multiplies
                matrices allocates once.

        Raises:
            ValueError: If the trace is of another batch only.

        Example:
            >>> replay(trace.events(64, workspace_bytes=gpu.workspace_bytes)).peak_reserved
        """
        if self.batch not in (None, batch):
            raise ValueError(f"this trace is of a batch of {self.batch} only, got {batch}")
        events: list[AllocatorEvent] = []
        absent: set[int] = set()  # Allocations that have no bytes at this batch.
        window: int | None = None
        for name, constant, slope, site in self.changes:
            size = workspace_bytes if site == WORKSPACE else constant + slope * batch
            if site == WINDOW:
                window = len(events)
            elif site is not None and size <= 0:
                absent.add(name)
            elif name not in absent:
                events.append((name, size if site is not None else 0))
        return events if window is None else events + _again(events[window:])

    def allocated_bytes(self, batch: int, *, workspace_bytes: int = 0) -> int:
        """Return a lower bound of the peak of allocated bytes at ``batch``, quickly.

        A block may be up to 1 MiB larger than its tensor. The bound ignores this surplus, which
        only a replay through the allocator gives.

        Args:
            batch: Examples in a micro-batch.
            workspace_bytes: As for ``events``.
        """
        constant, slope, workspaces, sign = self._columns
        size = constant + slope * batch + workspaces * workspace_bytes
        unit = block_bytes(1)
        blocks = -(-np.maximum(size, 0) // unit) * unit
        return int((sign * blocks).cumsum().max(initial=0))

    @functools.cached_property
    def _columns(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """One column for each change: constant, slope, number of workspaces, and 1 or -1."""
        born: dict[int, tuple[int, int, int]] = {}
        rows = []
        for name, constant, slope, site in self.changes:
            if site is not None:
                born[name] = (constant, slope, int(site == WORKSPACE))
            rows.append((*born[name], 1 if site is not None else -1))
        return np.array(rows, dtype=np.int64).reshape(-1, 4).T

    def site_of(self, name: int) -> AllocationSite:
        """Return the part of the step that allocates ``name``, the name of an event."""
        return next(c.site for c in self.changes if c.name == abs(name) and c.site is not None)

    def live_bytes(self, events: Sequence[AllocatorEvent], until: int) -> Counter[str]:
        """Return the bytes in use after the event with index ``until``, by kind."""
        held: dict[int, int] = {}
        for name, size in events[: until + 1]:
            if size:
                held[name] = block_bytes(size)
            else:
                del held[name]
        total: Counter[str] = Counter()
        for name, size in held.items():
            total[self.kinds.get(abs(name), ACTIVATIONS)] += size
        return total


class Program(Protocol):
    """A function whose allocations are traced."""

    def __call__(self, batch: int, recorder: "Recorder") -> None:
        """Run at ``batch`` examples, and label tensors and the start of the window."""


class Recorder(OnFakeCuda):
    """A dispatch mode that notes each allocation and each end of an allocation on a fake device.

    Args:
        device: The fake device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._phase = "setup"
        self._changes: list[AllocationChange] = []
        self._kinds: dict[int, str] = {}
        self._live: dict[int, int] = {}  # The names of live allocations, by the storage's address.
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sites: dict[tuple[str, Any], AllocationSite] = {}
        self._multiplied: set[bool] = set()  # Forward and backward passes multiply in two threads.
        self._names = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Mark the beginning and the end of each optimizer step inside."""

        def begins(optimizer: torch.optim.Optimizer, *_: object) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            self.label(GRADIENTS, [g for g in gradients if g is not None])
            self._changes.append(AllocationChange(0, 0, 0, UPDATE))
            self._phase = "optimizer"

        def ends(*_: object) -> None:
            self._changes.append(AllocationChange(0, 0, 0, UPDATED))
            self._phase = "forward"

        with ExitStack() as stack:
            for hook in (
                register_optimizer_step_pre_hook(begins),
                register_optimizer_step_post_hook(ends),
            ):
                stack.callback(hook.remove)
            yield

    def begin(self) -> None:
        """End the set-up: tensors that were made until now exist before the first step."""
        self._phase = "forward"

    def begin_window(self) -> None:
        """Begin the window, which lasts to the program's end, and which training repeats."""
        self._changes.append(AllocationChange(0, 0, 0, WINDOW))

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Set the kind of the allocations that hold ``tensors``."""
        for tensor in tensors:
            if tensor.layout is not torch.strided:
                continue
            name = self._live.get(tensor.untyped_storage()._cdata)
            if name is not None:
                self._kinds[name] = kind

    def trace(self, batch: int) -> Trace:
        """Return the trace of the program, which has run at ``batch``."""
        changes, same = _in_place_sums(_in_order(self._changes))
        return Trace(
            changes=changes,
            kinds={same.get(name, name): kind for name, kind in self._kinds.items()},
            guessed=dict(self.guessed),
            batch=batch,
        )

    def operation_ran(self, func: Any, args: Sequence[Any], out: object) -> None:
        """Note the storages of an operation's results, and the memory that only its kernel uses."""
        phase = "backward" if self.backward else self._phase
        site = self._sites.get((phase, func))
        if site is None:
            operation = str(func).removeprefix("aten.").removesuffix(".default")
            site = self._sites[phase, func] = AllocationSite(phase, operation)
        self._note(out, site)
        if func in _PRODUCTS and self.backward not in self._multiplied:
            self._multiplied.add(self.backward)
            self._born(0, WORKSPACE)
        elif func is _FLASH_BACKWARD:
            self._changes.append(
                AllocationChange(self._born(_flash_bytes(args[1]), site), 0, 0, None)
            )

    def _note(self, out: object, site: AllocationSite) -> None:
        if isinstance(out, Tensor):
            device = fake_device_of(out)
            # A sparse tensor consists of strided ones, which the recorder has noted.
            is_own = device is not None and device.type == self.device.type
            if is_own and out.layout is torch.strided:
                self._note_storage(out.untyped_storage(), site)
        elif isinstance(out, list | tuple):
            for part in out:
                self._note(part, site)

    def _note_storage(self, storage: torch.UntypedStorage, site: AllocationSite) -> None:
        key = storage._cdata
        if key in self._live or not storage.nbytes():
            return
        name = self._live[key] = self._born(int(storage.nbytes()), site)
        self._watched[name] = weakref.ref(storage, lambda _: self._dies(key, name))

    def _born(self, size: int, site: AllocationSite) -> int:
        self._names += 1
        self._changes.append(AllocationChange(self._names, size, 0, site))
        return self._names

    def _dies(self, key: int, name: int) -> None:
        del self._watched[name]
        if self._live.get(key) == name:
            del self._live[key]
        self._changes.append(AllocationChange(name, 0, 0, None))


def record(load: Callable[[], Program], batch: int, recorder: Recorder, *, flash: bool) -> Trace:
    """Return the trace of the program that ``load`` returns.

    Args:
        load: A function that makes the program with its tensors. It is called while tensors on the
            recorder's device are fake.
        batch: Examples in a micro-batch.
        recorder: A recorder that has not been used before.
        flash: Whether the GPU has flash attention.

    Raises:
        Exception: The error that ``load`` or the program raises.
    """
    with fake_cuda(recorder, flash=flash), recorder.recording():
        program = load()
        recorder.begin()
        with fake_looks_real():  # By now the program's libraries are imported.
            program(batch, recorder)
        return recorder.trace(batch)


def fit_traces(small: Trace, larger: Trace, *proofs: Trace) -> Trace | None:
    """Return the trace of every batch, or None if the allocations differ in more than their size.

    Args:
        small: The trace of one batch.
        larger: The trace of a larger batch.
        proofs: Traces of other batches, with which the result must agree.

    Example:
        >>> every = fit_traces(trace_of_6, trace_of_9, trace_of_33)
    """
    assert small.batch is not None, "the trace of one batch"
    assert larger.batch is not None, "the trace of one batch"
    if not _alike(small, larger):
        return None
    step = larger.batch - small.batch
    changes = []
    for one, other in zip(small.changes, larger.changes, strict=True):
        slope, rest = divmod(other.constant - one.constant, step)
        if rest:
            return None
        changes.append(one._replace(constant=one.constant - slope * small.batch, slope=slope))
    found = Trace(changes=changes, kinds=small.kinds, guessed=larger.guessed)
    return found if all(_proves(proof, found) for proof in proofs) else None


def with_updates(step: Trace, other: Trace) -> Trace | None:
    """Return ``step`` with its optimizer steps replaced by those of ``other``.

    The memory of an optimizer depends on its parameters and their gradients, not on the batch.

    Args:
        step: The trace of a step, at one batch or at every batch.
        other: The trace of another optimizer alone, which makes its state in its first step.

    Returns:
        The new trace; None if the optimizer steps cannot be replaced, because the two traces have
        different numbers of them or different gradients before them, or because an optimizer step
        frees a tensor that other code has made.
    """
    ours, theirs = _updates(step), _updates(other)
    if not _exchangeable(step, other, ours, theirs):
        return None
    shift = max((change.name for change in step.changes), default=0)
    gone = {name for name, kind in step.kinds.items() if kind == STATE}
    gone |= {change.name for part in ours for change in step.changes[part]} - {0}
    changes: list[AllocationChange] = []
    done = 0
    for our, their in zip(ours, theirs, strict=True):
        changes += step.changes[done : our.start]
        changes += (c._replace(name=c.name + shift) for c in other.changes[their])
        done = our.stop
    changes += step.changes[done:]
    return replace(
        step,
        changes=[change for change in changes if change.name not in gone],
        kinds=step.kinds | {name + shift: kind for name, kind in other.kinds.items()},
    )


def _updates(trace: Trace) -> list[slice]:
    """Return the changes within each optimizer step, without its marks."""
    begin = [at for at, change in enumerate(trace.changes) if change.site == UPDATE]
    end = [at for at, change in enumerate(trace.changes) if change.site == UPDATED]
    return [slice(first + 1, last) for first, last in zip(begin, end, strict=True)]


def _exchangeable(
    step: Trace, other: Trace, ours: Sequence[slice], theirs: Sequence[slice]
) -> bool:
    return (
        len(ours) == len(theirs)
        and all(_own(step.changes[part]) for part in ours)
        and all(_own(other.changes[part]) for part in theirs)
        and all(
            _gradients(step, our) == _gradients(other, their)
            for our, their in zip(ours, theirs, strict=True)
        )
    )


def _own(changes: Sequence[AllocationChange]) -> bool:
    """Return whether each allocation that ends here also begins here."""
    born = {change.name for change in changes if change.site is not None}
    return all(change.name in born for change in changes)


def _gradients(trace: Trace, update: slice) -> Counter[tuple[int, int]]:
    """Return constant and slope of each gradient that exists before an optimizer step."""
    live: dict[int, tuple[int, int]] = {}
    for name, constant, slope, site in trace.changes[: update.start]:
        if site is None:
            live.pop(name, None)
        elif trace.kinds.get(name) == GRADIENTS:
            live[name] = (constant, slope)
    return Counter(live.values())


def _alike(one: Trace, other: Trace) -> bool:
    return [(c.name, c.site) for c in one.changes] == [(c.name, c.site) for c in other.changes]


def _proves(proof: Trace, found: Trace) -> bool:
    assert proof.batch is not None
    return _alike(proof, found) and proof.events(proof.batch) == found.events(proof.batch)


def _again(window: Sequence[AllocatorEvent]) -> list[AllocatorEvent]:
    """Return the window's events under negative names, without those that no repetition has.

    Allocations that outlive the window exist in the repetition already.
    """
    born = {name for name, size in window if size}
    die = {name for name, size in window if not size}
    return [(-name, size) for name, size in window if name in born and name in die]


def _in_order(changes: Sequence[AllocationChange]) -> list[AllocationChange]:
    """Sort neighbouring ends by name: autocast frees its copies in the order of a hash table."""
    ordered: list[AllocationChange] = []
    dead: list[AllocationChange] = []
    for change in changes:
        if change.site is None:
            dead.append(change)
        else:
            ordered += [*sorted(dead), change]
            dead.clear()
    return ordered + sorted(dead)


def _in_place_sums(
    changes: Sequence[AllocationChange],
) -> tuple[list[AllocationChange], dict[int, int]]:
    """Make sums of gradients take place in the old gradient's memory, as for plain tensors.

    A fake tensor is a tensor subclass, for which autograd's engine puts the sum into a new tensor
    and frees the old one. To a plain tensor the engine adds the summand in place.

    Returns:
        The changes, and for each name that was dropped the name of the same memory.
    """
    kept: list[AllocationChange] = []
    size: dict[int, int] = {}
    same: dict[int, int] = {}  # Dropped names, and the names of the same memory.
    position = 0
    while position < len(changes):
        change = changes[position]
        position += 1
        if change.site is None:
            kept.append(change._replace(name=same.get(change.name, change.name)))
            continue
        size[change.name] = change.constant
        old = _summed_into(change, changes, position, size)
        if old is None:
            kept.append(change)
        else:
            same[change.name] = same.get(old.name, old.name)
            dying = list(_deaths(changes, position))
            position += len(dying)
            kept += [d._replace(name=same.get(d.name, d.name)) for d in dying if d is not old]
    return kept, same


def _summed_into(
    change: AllocationChange,
    changes: Sequence[AllocationChange],
    position: int,
    size: dict[int, int],
) -> AllocationChange | None:
    """Return the end, right after ``change``, of a summand, if ``change`` allocates a sum."""
    if change.site != AllocationSite("backward", _SUM):
        return None
    deaths = _deaths(changes, position)
    return next((d for d in deaths if size.get(d.name) == change.constant), None)


def _deaths(changes: Sequence[AllocationChange], position: int) -> Iterator[AllocationChange]:
    while position < len(changes) and changes[position].site is None:
        yield changes[position]
        position += 1


def _flash_bytes(query: Tensor) -> int:
    """Return the bytes that flash attention's backward pass allocates in float32.

    For each row the kernel allocates a gradient of the query and one sum. The kernel rounds the
    length up to a multiple of 128 and the width to a multiple of 32
    (csrc/flash_attn/flash_api.cpp).

    Args:
        query: The queries, ``(batch, heads, length, width)``.
    """
    batch, heads, length, width = query.shape
    rows = int(batch * heads) * -(-int(length) // 128) * 128
    return 4 * rows * (-(-int(width) // 32) * 32 + 1)
