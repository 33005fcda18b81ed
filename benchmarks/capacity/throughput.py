"""Time single sizes and accumulated logical batches, in turns."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from autobatch import (
    Accumulator,
    BatchPlan,
    DoesNotFitError,
    ReplayLimitError,
    SearchResult,
    StepInterruptedError,
)
from autobatch.devices.base import MemoryDevice
from autobatch.devices.factory import open_device
from benchmarks.capacity.case import OPTIMIZERS, Case
from benchmarks.harness.models import Batch
from benchmarks.harness.records import as_json
from benchmarks.harness.timing import Samples

DESIRED: Final = (256, 1024, 4096)
_ROUNDS: Final = 5
_WHOLE: Final = 4  # A window begins only with time for this many runs.
_SAMPLE_SECONDS: Final = 0.05  # At least, so that reading the clock does not matter.
_MOST_STEPS: Final = 50  # In one sample.
_AS_FAST: Final = 0.98  # A share of the largest throughput; the rest is not worth more memory.
_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}

# The errors of a step that did not fit in memory.
_NO_ROOM: Final = (
    torch.OutOfMemoryError,
    DoesNotFitError,
    ReplayLimitError,
    StepInterruptedError,
)

Key = TypeVar("Key", int, str)


class BatchPool:
    """Batches of any size on the host, all views of one batch; pinned where a GPU reads them."""

    def __init__(self, sample: Batch, device: torch.device) -> None:
        self._sample = sample
        self._pinned = device.type == "cuda"
        self._batch = sample

    def first(self, size: int) -> Batch:
        """Return a batch of ``size`` examples."""
        if size > len(_tensors(self._batch)[0]):
            self._batch = _mapped(self._sample, lambda values: self._repeated(values, size))
        return _mapped(self._batch, lambda values: values[:size])

    def _repeated(self, values: Tensor, size: int) -> Tensor:
        rows = values[torch.arange(size) % len(values)]
        return rows.pin_memory() if self._pinned else rows


_BEST: Final = 0  # The key of the best single size, beside logical batches by their examples.


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A step, or a forward pass, that is timed.

    Attributes:
        examples: The examples of one run.
        run: Runs the window; returns whether it was cut as requested.
        seconds: The expected duration.
    """

    examples: int
    run: Callable[[], bool]
    seconds: float


@dataclass(frozen=True, slots=True)
class Timed:
    """A window's samples, and its peak in bytes, or None where the peak was not read."""

    seconds: Samples
    peak_bytes: int | None


def measure(case: Case, model: nn.Module, found: SearchResult, until: float) -> dict[str, object]:
    """Return the sizes, the fastest size, the logical batches, and the memory of each trial."""
    model.train(case.config.mode == "train")
    bench = _Bench(case, model)
    each = _seconds_each(found)
    sizes = {size: bench.single(size, size * each) for size in reversed(ladder(found.size))}
    timed = in_turns(sizes, bench.device, by(until, 0.6))
    rates = {size: size / timed[size].seconds.median for size in timed}
    fastest = fastest_of(rates)
    memory: list[dict[str, object]] = [
        {"size": trial.size, "peak_bytes": trial.peak_bytes, "passed": trial.fits}
        for trial in found.trials
    ]
    memory += [
        {"size": size, "peak_bytes": one.peak_bytes, "passed": True}
        for size, one in timed.items()
        if one.peak_bytes is not None
    ]
    return {
        "sizes": [{"size": size, **_timing(size, timed[size].seconds)} for size in sorted(timed)],
        "fastest": fastest,
        "desired": _desired(bench, found.size, fastest, rates, until),
        "memory": memory,
    }


def by(until: float, share: float) -> float:
    """Return the moment when this share of the time until ``until`` is over."""
    now = time.monotonic()
    return now + share * (until - now)


def ladder(largest: int) -> list[int]:
    """Return the sizes to time, ascending: ``largest``, three quarters of it, and its halves."""
    halves = {largest >> power for power in range(largest.bit_length())}
    return sorted(halves | {max(largest * 3 // 4, 1)})


def fastest_of(rates: Mapping[int, float]) -> int | None:
    """Return the smallest size within 2 % of the most examples per second."""
    enough = _AS_FAST * max(rates.values(), default=0.0)
    return min((size for size, rate in rates.items() if rate >= enough), default=None)


def in_turns(windows: Mapping[Key, Window], device: MemoryDevice, until: float) -> dict[Key, Timed]:
    """Time windows in turns, so that a change of the machine's speed concerns all of them.

    Each window runs once unmeasured. Windows that run out of memory are left out, and so are
    windows that would take the time of all others.

    Args:
        windows: The windows by name.
        device: Where the windows run.
        until: No run begins that is expected to end later, by ``time.monotonic``.
    """
    taken, peaks = _warm(windows, device, until)
    samples: dict[Key, list[float]] = {key: [] for key in taken}
    for _ in range(_ROUNDS):
        for key in list(taken):
            steps = _steps(taken[key])
            if time.monotonic() + steps * taken[key] > until:
                continue
            seconds = _sample(windows[key], device, steps)
            if seconds is None:
                del taken[key], samples[key]
            else:
                samples[key].append(seconds)
                taken[key] = seconds
    return {key: Timed(Samples(own), peaks[key]) for key, own in samples.items() if own}


def _warm(
    windows: Mapping[Key, Window], device: MemoryDevice, until: float
) -> tuple[dict[Key, float], dict[Key, int | None]]:
    """Run each window once; return its seconds and its peak in bytes."""
    taken: dict[Key, float] = {}
    peaks: dict[Key, int | None] = {}
    for key, window in windows.items():
        if time.monotonic() + _WHOLE * window.seconds > until:
            continue
        device.reset_peak()
        seconds = _sample(window, device, 1)
        if seconds is not None:
            taken[key] = seconds
            # The meter only counts inside a limit.
            is_host = device.torch_device.type == "cpu"
            peaks[key] = None if is_host else device.read().peak_bytes
    return taken, peaks


def _sample(window: Window, device: MemoryDevice, steps: int) -> float | None:
    """Return a window's mean seconds over ``steps`` runs; None if it was not cut as requested."""
    device.synchronize()
    began = time.perf_counter()
    try:
        ran = all(window.run() for _ in range(steps))
        device.synchronize()
    except _NO_ROOM:
        ran = False
    seconds = (time.perf_counter() - began) / steps
    if not ran:
        device.release_cached()
    return seconds if ran else None


def _steps(seconds: float) -> int:
    return min(max(math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-9)), 1), _MOST_STEPS)


class _Bench:
    """A model to time, with one optimizer for all sizes."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self._case = case
        self._model = model
        self._pool = BatchPool(case.spec.sample(), case.device)
        self.device = open_device(case.device)
        name = case.config.optimizer
        self._optimizer = None if name is None else OPTIMIZERS[name](model.parameters())

    @property
    def trains(self) -> bool:
        """True if optimizer steps are timed, and not forward passes."""
        return self._optimizer is not None

    def single(self, size: int, seconds: float) -> Window:
        """Return one step, or one forward pass, on an undivided batch."""
        return self.cut(size, size, seconds) if self.trains else self._forward(size, seconds)

    def cut(self, examples: int, micro_batch: int, seconds: float) -> Window:
        """Return one optimizer step on ``examples`` examples, in micro-batches."""
        assert self._optimizer is not None, "inference accumulates nothing"
        accumulator = Accumulator(
            self._model,
            self._optimizer,
            self._case.spec.loss,
            micro_batch=micro_batch,
            precision=self._case.config.precision,
            nonfinite="ignore",  # The inputs are noise.
        )
        count = -(-examples // micro_batch)

        def run() -> bool:
            result = accumulator.step(self._pool.first(examples))
            return len(result.micro_batch_sizes) == count and not result.replays

        return Window(examples=examples, run=run, seconds=seconds)

    def _forward(self, size: int, seconds: float) -> Window:
        device, dtype = self._case.device, _DTYPES.get(self._case.config.precision)
        cast = nullcontext() if dtype is None else torch.autocast(device.type, dtype)

        def run() -> bool:
            inputs = _tensors(self._pool.first(size))[0]
            with torch.inference_mode(), cast:
                self._model(inputs.to(device, non_blocking=True))
            return True

        return Window(examples=size, run=run, seconds=seconds)


def _desired(
    bench: _Bench, largest: int, fastest: int | None, rates: Mapping[int, float], until: float
) -> list[dict[str, object]]:
    """Return how logical batches are cut and, as far as time allows, how fast they are.

    Micro-batches have the fastest size, or the largest where no size was timed. The best single
    size is timed in turns with the logical batches.
    """
    if not bench.trains:
        return []
    plans = {d: BatchPlan(desired=d, tolerable=fastest or largest) for d in DESIRED}
    timed: dict[int, Timed] = {}
    if fastest is not None:
        best = max(rates, key=rates.__getitem__)
        windows = {_BEST: bench.single(best, best / rates[best])}
        for desired, plan in plans.items():
            windows[desired] = bench.cut(desired, plan.micro_batch, desired / rates[fastest])
        timed = in_turns(windows, bench.device, until)
    of_best = best / timed[_BEST].seconds.median if _BEST in timed else None
    rows: list[dict[str, object]] = []
    for desired, plan in plans.items():
        row: dict[str, object] = {
            "desired": desired,
            "micro_batch": plan.micro_batch,
            "accumulation_steps": plan.accumulation_steps,
            "fewest_steps": BatchPlan(desired=desired, tolerable=largest).accumulation_steps,
            **dict.fromkeys(("seconds", "examples_per_second", "of_best")),
        }
        if of_best is not None and desired in timed:
            seconds = timed[desired].seconds
            row |= {**_timing(desired, seconds), "of_best": desired / seconds.median / of_best}
        rows.append(row)
    return rows


def _timing(examples: int, seconds: Samples) -> dict[str, object]:
    rates = Samples(examples / second for second in seconds)
    return {"seconds": as_json(seconds), "examples_per_second": as_json(rates)}


def _seconds_each(found: SearchResult) -> float:
    """Return the least seconds per example of the trials that fitted."""
    ran: Sequence[float] = [t.seconds / t.size for t in found.trials if t.fits]
    return min(ran, default=0.0)


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return tuple(batch.values()) if isinstance(batch, dict) else batch


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, dict):
        return {name: change(values) for name, values in batch.items()}
    inputs, targets = batch
    return change(inputs), change(targets)
