"""One search measured: how far it came, what it took, and what it left behind."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple

import torch
from states import fingerprint
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch import check, find_batch_size
from autobatch.devices.choose import open_device
from benchmarks.harness.timing import Samples
from benchmarks.search.peers import PEERS, SearchTask, largest_by_doubling
from benchmarks.search.workloads import SearchWorkload, residents

OURS: Final = "autobatch"
_MICRO_BATCHES: Final = 2  # Of a rehearsal.
_MOST_ATTEMPTS: Final = 500  # A tenth less at a time, from 4096, are 75. A search may be endless.
_LOSS: Final = nn.CrossEntropyLoss()


class Tried(NamedTuple):
    """One trial."""

    size: int
    fits: bool
    seconds: float


@dataclass(slots=True)
class Passes:
    """The forward passes of one model, in trials and outside. No search puts it back."""

    begun: list[int] = field(default_factory=list)  # Examples.
    ended: int = 0

    def watch(self, model: nn.Module) -> None:
        """Count from now on."""
        model.register_forward_pre_hook(lambda _, inputs: self.begun.append(len(inputs[0])))
        model.register_forward_hook(lambda *_: self._end())

    @property
    def failed(self) -> int:
        """Those that did not end."""
        return len(self.begun) - self.ended

    def _end(self) -> None:
        self.ended += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchMeasurement:
    """A search: what was found, what it took, and what it left behind.

    Attributes:
        found: The size; 0 if the search raised an error.
        error: That error, or ``""``.
        tried: Every trial.
        forwards: All passes of the model, those outside trials too.
        examples: Run forward in them.
        out_of_memory: Trials that failed, or passes that did not end if those are more.
        seconds: As often as it was measured.
        cost_seconds: Each in rehearsals at the found size, as the search itself took for one; empty
            if it ran none.
        unchanged: Whether model, optimizer and generators were left as they were.
        possible: The largest size that the step runs at which was searched with.
    """

    found: int
    error: str = ""
    tried: Sequence[Tried]
    forwards: int
    examples: int
    out_of_memory: int
    seconds: Samples
    cost_seconds: Samples
    unchanged: bool
    possible: int = 0

    def as_json(self) -> dict[str, object]:
        """Return what ``read`` makes this of again."""
        return asdict(self)

    @classmethod
    def read(cls, written: Any) -> "SearchMeasurement":
        """Return the measurement that was written, as JSON gives it back."""
        return cls(
            **written
            | {
                "tried": tuple(Tried(*trial) for trial in written["tried"]),
                "seconds": Samples(written["seconds"]),
                "cost_seconds": Samples(written["cost_seconds"]),
            }
        )

    @property
    def cost_examples(self) -> float | None:
        """Examples run forward, in rehearsals at the found size."""
        return self.examples / (_MICRO_BATCHES * self.found) if self.found else None

    @property
    def runs(self) -> bool:
        """Whether one can train at what was found."""
        return 0 < self.found <= self.possible

    @property
    def share(self) -> float:
        """Found over possible; nothing if what was found does not run."""
        return self.found / self.possible if self.runs else 0.0


def measure_search(by: str, workload: SearchWorkload, repeats: int) -> SearchMeasurement:
    """Let one search ``repeats`` times, each in a model of its own; only the seconds differ."""
    measurements = [_measure_once(by, workload) for _ in range(repeats)]
    return replace(
        measurements[-1],
        seconds=Samples(second for done in measurements for second in done.seconds),
        cost_seconds=Samples(cost for done in measurements for cost in done.cost_seconds),
        unchanged=all(done.unchanged for done in measurements),
    )


def _measure_once(by: str, workload: SearchWorkload) -> SearchMeasurement:
    open_device(workload.device).release_cached()  # What the last one left.
    model = workload.make()
    optimizer = workload.optimizer(model.parameters())
    passes = Passes()
    passes.watch(model)
    tried: list[Tried] = []
    before, found, error = fingerprint(model, optimizer), 0, ""
    started = time.perf_counter()
    try:
        if by == OURS:
            found = _autobatch(workload, model, optimizer, tried)
        else:
            _, search = PEERS[by]
            attempt = _attempt(workload, model, optimizer, tried)
            found = search(SearchTask(attempt, workload.ceiling, model, optimizer))
    except Exception as problem:  # noqa: BLE001  # A search that raises has found nothing.
        error = repr(problem)
    seconds = time.perf_counter() - started
    unchanged = fingerprint(model, optimizer) == before
    one = [trial.seconds for trial in tried if trial.fits and trial.size == found]
    return SearchMeasurement(
        found=found,
        error=error,
        tried=tuple(tried),
        forwards=len(passes.begun),
        examples=sum(passes.begun),
        out_of_memory=max(passes.failed, sum(not trial.fits for trial in tried)),
        seconds=Samples([seconds]),
        cost_seconds=Samples([seconds / one[-1]] if one else []),
        unchanged=unchanged,
    )


def _autobatch(
    workload: SearchWorkload, model: nn.Module, optimizer: Optimizer, tried: list[Tried]
) -> int:
    found = find_batch_size(
        model,
        workload.data,
        ceiling=workload.ceiling,
        loss=_LOSS,
        optimizer=optimizer,
        device=workload.device,
        memory_limit=_memory_limit(workload),
    )
    tried.extend(Tried(trial.size, trial.fits, trial.seconds) for trial in found.trials)
    return found.size


def _attempt(
    workload: SearchWorkload, model: nn.Module, optimizer: Optimizer, tried: list[Tried]
) -> Callable[[int], None]:
    """Return what others try: the same rehearsal, two micro-batches and a step, under the limit.

    The limit holds in the window alone, as for autobatch: on the CPU the meter would else count
    the host's batch and what a search saves. What is cut outside is copied inside, as by a move.
    """
    memory = open_device(workload.device, lambda: residents(model, optimizer))
    limit = workload.limit_bytes

    def window(size: int) -> None:
        x, y = (part[:size] for part in workload.data)
        with nullcontext() if limit is None else memory.limited_to(limit):
            rehearse(model, optimizer, x, y, workload.device)
            memory.synchronize()

    def attempt(size: int) -> None:
        if len(tried) == _MOST_ATTEMPTS:
            raise TimeoutError(f"the search has not ended after {_MOST_ATTEMPTS} attempts")
        started, fits = time.perf_counter(), False
        try:
            window(size)
            fits = True
        except torch.OutOfMemoryError as error:
            # The meter's words; accelerate, Lightning and toma know CUDA's.
            error.args = ("CUDA out of memory. Tried to allocate 1.00 GiB.",)
            raise
        finally:
            tried.append(Tried(size, fits, time.perf_counter() - started))

    return attempt


def rehearse(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    device: torch.device,
) -> None:
    """Take one step on two micro-batches, each a copy of the same; the gradient is kept between."""
    # On a GPU training copies the next micro-batch ahead, so one more is there, and in a trial too.
    ahead = (x.to(device), y.to(device)) if device.type == "cuda" else None
    optimizer.zero_grad()
    for _ in range(_MICRO_BATCHES):
        inputs, targets = x.to(device, copy=True), y.to(device, copy=True)
        _LOSS(model(inputs), targets).backward()
        del inputs, targets  # As training lets go of them, before the step.
    optimizer.step()
    del ahead


def largest_possible(workload: SearchWorkload, found: int) -> int:
    """The largest size by autobatch's ``check`` alone, looked for beside ``found`` first."""
    model = workload.make()
    optimizer = workload.optimizer(model.parameters())

    def fits(size: int) -> bool:
        trial = check(
            model,
            workload.data,
            size,
            loss=_LOSS,
            optimizer=optimizer,
            device=workload.device,
            memory_limit=_memory_limit(workload),
        )
        return trial.fits

    if found and fits(found) and (found == workload.ceiling or not fits(found + 1)):
        return found
    return largest_by_doubling(fits, workload.ceiling)


def largest_by_hand(workload: SearchWorkload, near: int) -> int:
    """The largest size of the step that others try, with the optimizer's state there.

    It needs a little less than autobatch's, which can take its window back: by buffers, say.
    """
    model = workload.make()
    attempt = _attempt(workload, model, workload.optimizer(model.parameters()), [])
    attempt(min(2, near))

    def fits(size: int) -> bool:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            return False
        return True

    while near < workload.ceiling and fits(near + 1):
        near += 1
    while near and not fits(near):
        near -= 1
    return near


def _memory_limit(workload: SearchWorkload) -> int | None:
    """The limit of the whole process, whose context on a GPU comes on top."""
    if workload.limit_bytes is None:
        return None
    return workload.limit_bytes + open_device(workload.device).read().outside_bytes
