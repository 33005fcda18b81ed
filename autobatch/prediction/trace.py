"""What a step allocates and frees, found without a GPU, at any batch.

A program runs on tensors without values; each storage that is born or dies is an event. Every
single allocation is ``c + d * batch`` bytes, so two runs at small batches give the events of every
batch, and a third proves it. (The total is not: which moment is the peak depends on the batch.)
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

from autobatch.prediction.caching_allocator import Event, block_bytes
from autobatch.prediction.fake_cuda import OnFakeCuda, fake_cuda, fake_is_real, home_of

_aten: Final[Any] = torch.ops.aten
_PRODUCTS: Final = (
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default),
)
_FLASH_BACKWARD: Final = _aten._scaled_dot_product_flash_attention_backward.default
_SUM: Final = "add.Tensor"


class Place(NamedTuple):
    """Where in a step something is allocated: ``("backward", "convolution_backward")``."""

    phase: str
    operation: str


ACTIVATIONS: Final = "activations and temporaries"  # What is nothing else.
WORKSPACE: Final = Place("", "cublas workspace")  # Its bytes are the GPU's.
WINDOW: Final = Place("", "a window begins")  # No bytes: what follows is done again and again.
UPDATE: Final = Place("", "an optimizer's step begins")  # No bytes, as its end.
UPDATED: Final = Place("", "an optimizer's step ends")
GRADIENTS: Final = "gradients"
STATE: Final = "optimizer state"


class Change(NamedTuple):
    """An allocation of ``constant + slope * batch`` bytes, or, with ``place`` None, its end."""

    name: int
    constant: int
    slope: int
    place: Place | None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The allocations of a program, as they follow from the batch.

    Attributes:
        changes: In order.
        kinds: What a name holds, where that is known: ``"parameters"``, ``"gradients"`` and so on.
        guessed: How often a value was needed that nobody knows, by what was guessed and where.
        batch: The only batch that it is right for; None where it is right for every one.
    """

    changes: Sequence[Change]
    kinds: dict[int, str]
    guessed: dict[str, int]
    batch: int | None = None

    def events(self, batch: int, *, workspace_bytes: int = 0) -> list[Event]:
        """Return what the allocator is asked for at ``batch``, with the window done twice.

        The second time it finds the segments that the first has left.

        Args:
            batch: Examples in a micro-batch.
            workspace_bytes: What cuBLAS takes, once for each thread that multiplies matrices.
        """
        if self.batch not in (None, batch):
            raise ValueError(f"this trace is of a batch of {self.batch} only, got {batch}")
        events: list[Event] = []
        absent: set[int] = set()  # An allocation may come to nothing at one batch.
        window: int | None = None
        for name, constant, slope, place in self.changes:
            size = workspace_bytes if place == WORKSPACE else constant + slope * batch
            if place == WINDOW:
                window = len(events)
            elif place is not None and size <= 0:
                absent.add(name)
            elif name not in absent:
                events.append((name, size if place is not None else 0))
        return events if window is None else events + _again(events[window:])

    def allocated_bytes(self, batch: int, *, workspace_bytes: int = 0) -> int:
        """Return the least that the peak of allocated bytes is at ``batch``, fast.

        What blocks have beyond their tensors, up to 1 MiB each, only a replay knows.
        """
        constant, slope, workspaces, sign = self._columns
        size = constant + slope * batch + workspaces * workspace_bytes
        unit = block_bytes(1)
        blocks = -(-np.maximum(size, 0) // unit) * unit
        return int((sign * blocks).cumsum().max(initial=0))

    @functools.cached_property
    def _columns(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """For each change, what it is made of: constant, slope, workspaces, and 1 or -1."""
        born: dict[int, tuple[int, int, int]] = {}
        rows = []
        for name, constant, slope, place in self.changes:
            if place is not None:
                born[name] = (constant, slope, int(place == WORKSPACE))
            rows.append((*born[name], 1 if place is not None else -1))
        return np.array(rows, dtype=np.int64).reshape(-1, 4).T

    def place_of(self, name: int) -> Place:
        """Return where ``name``, of an event, was allocated."""
        return next(c.place for c in self.changes if c.name == abs(name) and c.place is not None)

    def live_bytes(self, events: Sequence[Event], until: int) -> Counter[str]:
        """Return the bytes in use after event number ``until``, by what they hold."""
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
    """What is traced."""

    def __call__(self, batch: int, recorder: "Recorder") -> None:
        """Run at ``batch`` examples; say what is what to ``recorder``."""


class Recorder(OnFakeCuda):
    """Notes each storage on the device when it is born and when it dies.

    Args:
        device: Whose memory it is.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._phase = "setup"
        self._changes: list[Change] = []
        self._kinds: dict[int, str] = {}
        self._live: dict[int, int] = {}  # Name by the storage's address.
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._places: dict[tuple[str, Any], Place] = {}
        self._multiplied: set[bool] = set()  # Forward passes and backward passes: two threads.
        self._names = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Look on, and see where optimizers' steps begin and end."""

        def begins(optimizer: torch.optim.Optimizer, *_: object) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            self.label(GRADIENTS, [g for g in gradients if g is not None])
            self._changes.append(Change(0, 0, 0, UPDATE))
            self._phase = "optimizer"

        def ends(*_: object) -> None:
            self._changes.append(Change(0, 0, 0, UPDATED))
            self._phase = "forward"

        with ExitStack() as stack:
            for hook in (
                register_optimizer_step_pre_hook(begins),
                register_optimizer_step_post_hook(ends),
            ):
                stack.callback(hook.remove)
            yield

    def begin(self) -> None:
        """Say that what was made until now was there before the first step."""
        self._phase = "forward"

    def begin_window(self) -> None:
        """Say that what follows, up to the end of the program, is done again and again."""
        self._changes.append(Change(0, 0, 0, WINDOW))

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what the memory of ``tensors`` holds."""
        for tensor in tensors:
            if tensor.layout is not torch.strided:
                continue
            name = self._live.get(tensor.untyped_storage()._cdata)
            if name is not None:
                self._kinds[name] = kind

    def trace(self, batch: int) -> Trace:
        """Return what was seen, at the batch that was run."""
        changes, same = _in_place_sums(_in_order(self._changes))
        return Trace(
            changes=changes,
            kinds={same.get(name, name): kind for name, kind in self._kinds.items()},
            guessed=dict(self.guessed),
            batch=batch,
        )

    def seen(self, func: Any, args: Sequence[Any], out: object) -> None:
        """Note the storages of an operation's results, and what its kernel takes meanwhile."""
        phase = "backward" if self.backward else self._phase
        place = self._places.get((phase, func))
        if place is None:
            operation = str(func).removeprefix("aten.").removesuffix(".default")
            place = self._places[phase, func] = Place(phase, operation)
        self._note(out, place)
        if func in _PRODUCTS and self.backward not in self._multiplied:
            self._multiplied.add(self.backward)
            self._born(0, WORKSPACE)
        elif func is _FLASH_BACKWARD:
            self._changes.append(Change(self._born(_flash_bytes(args[1]), place), 0, 0, None))

    def _note(self, out: object, place: Place) -> None:
        if isinstance(out, Tensor):
            home = home_of(out)
            # A sparse one is made of others, which have been noted.
            is_own = home is not None and home.type == self.device.type
            if is_own and out.layout is torch.strided:
                self._note_storage(out.untyped_storage(), place)
        elif isinstance(out, list | tuple):
            for part in out:
                self._note(part, place)

    def _note_storage(self, storage: torch.UntypedStorage, place: Place) -> None:
        key = storage._cdata
        if key in self._live or not storage.nbytes():
            return
        name = self._live[key] = self._born(int(storage.nbytes()), place)
        self._watched[name] = weakref.ref(storage, lambda _: self._dies(key, name))

    def _born(self, size: int, place: Place) -> int:
        self._names += 1
        self._changes.append(Change(self._names, size, 0, place))
        return self._names

    def _dies(self, key: int, name: int) -> None:
        del self._watched[name]
        if self._live.get(key) == name:
            del self._live[key]
        self._changes.append(Change(name, 0, 0, None))


def record(load: Callable[[], Program], batch: int, recorder: Recorder, *, flash: bool) -> Trace:
    """Run what ``load`` returns, which makes its own tensors, and return what was seen.

    Args:
        load: Called on the fake device.
        batch: Examples in a micro-batch.
        recorder: A new one.
        flash: Whether the GPU has flash attention.
    """
    with fake_cuda(recorder, flash=flash), recorder.recording():
        program = load()
        recorder.begin()
        with fake_is_real():  # Loading the program has imported what it needs.
            program(batch, recorder)
        return recorder.trace(batch)


def fitted(small: Trace, larger: Trace, *proofs: Trace) -> Trace | None:
    """Return the trace of every batch, or None where batches take different ways.

    Args:
        small: Of one batch.
        larger: Of another.
        proofs: Of others, which have to agree.
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
    """Return ``step`` with the optimizer's steps of ``other``, whose state is new.

    What an optimizer takes follows from its parameters and their gradients, not from the batch.

    Args:
        step: Of one batch or of every one.
        other: Of an optimizer alone; it steps as often, and makes its state in its first step.

    Returns:
        None where the steps cannot be exchanged: there are not as many, they find other
        gradients, or they free what others have made.
    """
    ours, theirs = _updates(step), _updates(other)
    if not _exchangeable(step, other, ours, theirs):
        return None
    shift = max((change.name for change in step.changes), default=0)
    gone = {name for name, kind in step.kinds.items() if kind == STATE}
    gone |= {change.name for part in ours for change in step.changes[part]} - {0}
    changes: list[Change] = []
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
    """Where an optimizer steps, without the marks."""
    begin = [place for place, change in enumerate(trace.changes) if change.place == UPDATE]
    end = [place for place, change in enumerate(trace.changes) if change.place == UPDATED]
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


def _own(changes: Sequence[Change]) -> bool:
    """Whether what dies in them was born in them."""
    born = {change.name for change in changes if change.place is not None}
    return all(change.name in born for change in changes)


def _gradients(trace: Trace, update: slice) -> Counter[tuple[int, int]]:
    """The gradients that a step finds, each as constant and slope."""
    live: dict[int, tuple[int, int]] = {}
    for name, constant, slope, place in trace.changes[: update.start]:
        if place is None:
            live.pop(name, None)
        elif trace.kinds.get(name) == GRADIENTS:
            live[name] = (constant, slope)
    return Counter(live.values())


def _alike(one: Trace, other: Trace) -> bool:
    return [(c.name, c.place) for c in one.changes] == [(c.name, c.place) for c in other.changes]


def _proves(proof: Trace, found: Trace) -> bool:
    assert proof.batch is not None
    return _alike(proof, found) and proof.events(proof.batch) == found.events(proof.batch)


def _again(window: Sequence[Event]) -> list[Event]:
    """The same once more, under negative names; what stays from the first time is there."""
    born = {name for name, size in window if size}
    die = {name for name, size in window if not size}
    return [(-name, size) for name, size in window if name in born and name in die]


def _in_order(changes: Sequence[Change]) -> list[Change]:
    """Sort what dies at once: autocast lets go of its copies in the order of a hash."""
    ordered: list[Change] = []
    dead: list[Change] = []
    for change in changes:
        if change.place is None:
            dead.append(change)
        else:
            ordered += [*sorted(dead), change]
            dead.clear()
    return ordered + sorted(dead)


def _in_place_sums(changes: Sequence[Change]) -> tuple[list[Change], dict[int, int]]:
    """Undo what the engine does for a tensor subclass only.

    It sums gradients in a new tensor, and lets the old one go at once; for plain tensors it adds
    to the old one. So the new name becomes another one of the old memory: those are returned too.
    """
    kept: list[Change] = []
    size: dict[int, int] = {}
    same: dict[int, int] = {}  # The memory that a name is another name of.
    position = 0
    while position < len(changes):
        change = changes[position]
        position += 1
        if change.place is None:
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
    change: Change, changes: Sequence[Change], position: int, size: dict[int, int]
) -> Change | None:
    """The death, right behind ``change``, of a tensor that it is the sum of."""
    if change.place != Place("backward", _SUM):
        return None
    deaths = _deaths(changes, position)
    return next((d for d in deaths if size.get(d.name) == change.constant), None)


def _deaths(changes: Sequence[Change], position: int) -> Iterator[Change]:
    while position < len(changes) and changes[position].place is None:
        yield changes[position]
        position += 1


def _flash_bytes(query: Tensor) -> int:
    """What the backward pass of flash attention keeps in float32 (csrc/flash_attn/flash_api.cpp).

    One gradient of the queries and one sum a row, of lengths rounded up to 128 and widths to 32.
    """
    batch, heads, length, width = query.shape
    rows = int(batch * heads) * -(-int(length) // 128) * 128
    return 4 * rows * (-(-int(width) // 32) * 32 + 1)
