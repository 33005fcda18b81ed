"""Measure one search: the size that it finds, its cost, and what it leaves changed."""

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
from autobatch.devices.factory import open_device
from benchmarks.harness.timing import Samples
from benchmarks.search.peers import PEERS, SearchTask, largest_by_doubling
from benchmarks.search.workloads import SearchWorkload, residents

OURS: Final = "autobatch"
_MICRO_BATCHES: Final = 2  # In a trial step.
_MOST_ATTEMPTS: Final = 500  # 75 attempts go from 4096 to 1 by tenths; some searches never end.
_LOSS: Final = nn.CrossEntropyLoss()


class Tried(NamedTuple):
    """A trial of a size."""

    size: int
    fits: bool
    seconds: float


@dataclass(slots=True)
class Passes:
    """Counts the forward passes of a model, in trials and outside them; no search resets it."""

    begun: list[int] = field(default_factory=list)  # The examples of each pass.
    ended: int = 0

    def watch(self, model: nn.Module) -> None:
        """Count the model's passes from now on."""
        model.register_forward_pre_hook(lambda _, inputs: self.begun.append(len(inputs[0])))
        model.register_forward_hook(lambda *_: self._end())

    @property
    def failed(self) -> int:
        """The passes that did not end."""
        return len(self.begun) - self.ended

    def _end(self) -> None:
        self.ended += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchMeasurement:
    """A search: the size that it found, its cost, and what it left changed.

    Attributes:
        found: The size; 0 if the search raised an error.
        error: The error, or ``""``.
        tried: Every trial.
        forwards: All forward passes of the model, including those outside trials.
        examples: The examples of these passes.
        out_of_memory: The failed trials, or the passes that did not end if there are more of them.
        seconds: The seconds of each repeat.
        cost_seconds: The seconds over those of one trial at the found size; empty without such a
            trial.
        unchanged: Whether model, optimizer and generators were left as they were.
        possible: The largest size at which the searched step runs.
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
        """Return the fields for JSON, from which ``read`` makes the measurement again."""
        return asdict(self)

    @classmethod
    def read(cls, written: Any) -> "SearchMeasurement":
        """Return the measurement from the fields of ``as_json``."""
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
        """The examples of all passes, over those of one trial step at the found size."""
        return self.examples / (_MICRO_BATCHES * self.found) if self.found else None

    @property
    def runs(self) -> bool:
        """True if the step runs at the found size."""
        return 0 < self.found <= self.possible

    @property
    def share(self) -> float:
        """The found size over the possible size; 0 if the found size does not run."""
        return self.found / self.possible if self.runs else 0.0


def measure_search(by: str, workload: SearchWorkload, repeats: int) -> SearchMeasurement:
    """Run one search ``repeats`` times, each on a new model; only the seconds differ."""
    measurements = [_measure_once(by, workload) for _ in range(repeats)]
    return replace(
        measurements[-1],
        seconds=Samples(second for done in measurements for second in done.seconds),
        cost_seconds=Samples(cost for done in measurements for cost in done.cost_seconds),
        unchanged=all(done.unchanged for done in measurements),
    )


def _measure_once(by: str, workload: SearchWorkload) -> SearchMeasurement:
    open_device(workload.device).release_cached()  # The memory of the search before.
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
    except Exception as problem:  # noqa: BLE001  # A search that raises finds nothing.
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
    """Return the trial that other searches run: two micro-batches and a step, under the limit.

    The limit holds only in the trial step, as in autobatch: outside it, the CPU's meter would count
    the host's batch and the state that a search saves. The batch is copied inside the limit.
    """
    memory = open_device(workload.device, lambda: residents(model, optimizer))
    limit = workload.limit_bytes

    def window(size: int) -> None:
        x, y = (part[:size] for part in workload.data)
        with nullcontext() if limit is None else memory.limited_to(limit):
            take_trial_step(model, optimizer, x, y, workload.device)
            memory.synchronize()

    def attempt(size: int) -> None:
        if len(tried) == _MOST_ATTEMPTS:
            raise TimeoutError(f"the search has not ended after {_MOST_ATTEMPTS} attempts")
        started, fits = time.perf_counter(), False
        try:
            window(size)
            fits = True
        except torch.OutOfMemoryError as error:
            # accelerate, Lightning and toma recognise only CUDA's message.
            error.args = ("CUDA out of memory. Tried to allocate 1.00 GiB.",)
            raise
        finally:
            tried.append(Tried(size, fits, time.perf_counter() - started))

    return attempt


def take_trial_step(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    device: torch.device,
) -> None:
    """Take one step on two micro-batches with the same examples; keep the gradient in between."""
    # On a GPU autobatch copies the next micro-batch ahead, in training and in trials.
    ahead = (x.to(device), y.to(device)) if device.type == "cuda" else None
    optimizer.zero_grad()
    for _ in range(_MICRO_BATCHES):
        inputs, targets = x.to(device, copy=True), y.to(device, copy=True)
        _LOSS(model(inputs), targets).backward()
        del inputs, targets  # Training frees them before the step, too.
    optimizer.step()
    del ahead


def largest_possible(workload: SearchWorkload, found: int) -> int:
    """Return the largest size by autobatch's ``check`` alone, which tries ``found`` first."""
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
    """Return the largest size of the other searches' step, with the optimizer's state in memory.

    That step needs a little less memory than autobatch's, which keeps a copy of the buffers.
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
    """Return the limit of the whole process, which on a GPU includes the context."""
    if workload.limit_bytes is None:
        return None
    return workload.limit_bytes + open_device(workload.device).read().outside_bytes
