"""Compare a step of autobatch with the plain loop and with other libraries, in turns."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from reference import twin
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from autobatch import Accumulator
from autobatch.compat.torchvision import import_torchvision
from benchmarks.engine import peers
from benchmarks.engine.peers import LEARNING_RATE, NOTHING, Pair, Window
from benchmarks.harness.records import SEED, Fields, Records
from benchmarks.harness.timing import Samples

_TITLE: Final = (
    "engine: a window of micro-batches by everyone in turns, same values and data; "
    "median (quartiles) [minimum, maximum]"
)
_VERDICTS: Final = "engine: autobatch against what is wanted of it, by the median"
_RATIO_WANTED: Final = 0.99
_PLAIN: Final = "plain"
_OURS: Final = "autobatch"
_AGAIN: Final = "plain again"  # The control: the same work, timed a second time.


class Case(NamedTuple):
    """A model on the device, the shape of one example, and how many steps are timed."""

    model: nn.Module
    shape: tuple[int, ...]
    micro_batch: int
    micro_batches: int
    steps: int  # Optimizer steps in one sample.
    rounds: int
    requires_ratio: bool  # From 5 ms a micro-batch on; below, nothing but being ahead of the peers.


class Spread(Samples):
    """Samples with their quartiles: the extremes of hundreds of samples are accidents."""

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middles of the lower and of the upper half."""
        low, high = np.percentile(self, (25, 75))
        return float(low), float(high)

    def __str__(self) -> str:
        parts = [_short(value) for value in (self.median, *self.quartiles, min(self), max(self))]
        return "{} ({} to {}) [{}, {}]".format(*parts)


def run(records: Records) -> None:
    """Measure every engine in turns."""
    for name, case in records.in_time(_cases(records)):
        _measure(name, case, records)


def plain_step(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor, size: int
) -> float:
    """Run the accumulation loop by hand, with exact weights; return the logical batch's loss."""
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    optimizer.zero_grad()
    for x, y in zip(inputs.split(size), targets.split(size), strict=True):
        outputs = model(x.to(device, non_blocking=True))
        loss = F.cross_entropy(outputs, y.to(device, non_blocking=True), reduction="sum")
        loss = loss / len(targets)
        loss.backward()
        total += loss.detach()
    optimizer.step()
    return total.item()


def turn(names: Sequence[str], place: int) -> list[str]:
    """Return the order of round ``place``: rotated every other round, and reversed in between.

    Every engine has each place equally often, and no engine always follows the same one.
    """
    first = place // 2 % len(names)
    forwards = [*names[first:], *names[:first]]
    return forwards[::-1] if place % 2 else forwards


def _measure(name: str, case: Case, records: Records) -> None:
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(case.micro_batch * case.micro_batches, *case.shape, generator=generator)
    targets = torch.randint(0, 10, (len(inputs),), generator=generator)
    models = {by: twin(case.model) for by in (_PLAIN, _OURS, *peers.installed(), _AGAIN)}
    windows, drive = _windows(models, case, (inputs, targets), records.device)
    seconds: dict[str, list[float]] = {by: [] for by in windows}
    differences: dict[str, float] = {}

    def work() -> Iterator[Pair]:
        yield from _rounds(
            windows, case.steps, 1, records, {by: [] for by in windows}
        )  # A warm-up.
        for by in models:
            differences[by] = _difference(models[by], models[_PLAIN], case.model)
        yield from _rounds(windows, case.steps, case.rounds, records, seconds)

    drive(work())
    _report(name, case, seconds, differences, records)


def _windows(
    models: Mapping[str, nn.Module], case: Case, batch: Pair, device: torch.device
) -> tuple[dict[str, Window], Callable[[Iterator[Pair]], object]]:
    """Return the window of every engine, and the function that runs a sequence of them."""
    accumulator = Accumulator(
        models[_OURS],
        SGD(models[_OURS].parameters(), lr=LEARNING_RATE),
        nn.CrossEntropyLoss(),
        micro_batch=case.micro_batch,
    )

    def ours() -> Iterable[Pair]:
        accumulator.step(batch)
        return NOTHING

    def plain(model: nn.Module) -> Window:
        optimizer = SGD(model.parameters(), lr=LEARNING_RATE)

        def window() -> Iterable[Pair]:
            plain_step(model, optimizer, *batch, case.micro_batch)
            return NOTHING

        return window

    windows = {_PLAIN: plain(models[_PLAIN]), _OURS: ours, _AGAIN: plain(models[_AGAIN])}
    x, y = (part.split(case.micro_batch) for part in batch)
    micro_batches = list(
        zip(x, y, strict=True)
    )  # Peers get batches that are cut already, in their favour.
    if (model := models.get(peers.ACCELERATE)) is not None:
        windows[peers.ACCELERATE] = peers.accelerate_window(model, micro_batches, device)
    if (model := models.get(peers.LIGHTNING)) is not None:
        fit = peers.Fit(model, micro_batches, device)
        windows[peers.LIGHTNING] = fit.window
        return windows, fit.drive
    return windows, deque[Pair](maxlen=0).extend  # Runs the work; it yields nothing.


def _rounds(
    windows: Mapping[str, Window],
    steps: int,
    rounds: int,
    records: Records,
    seconds: Mapping[str, list[float]],
) -> Iterator[Pair]:
    """Time a sample of every engine in each round; after the deadline only the first round runs.

    A machine that slows down for a while slows a whole round, so the ratios of a round stay.
    """
    for place in range(rounds):
        if place and time.monotonic() > records.deadline:
            return
        for by in turn(list(windows), place):
            started = time.perf_counter()
            for _ in range(steps):
                yield from windows[by]()
            _synchronize(records.device)
            seconds[by].append(time.perf_counter() - started)


def _report(
    name: str,
    case: Case,
    seconds: Mapping[str, list[float]],
    differences: Mapping[str, float],
    records: Records,
) -> None:
    per_us = case.steps * case.micro_batches / 1e6
    plain = seconds[_PLAIN]
    for by in (_PLAIN, _OURS, *peers.ALL, _AGAIN):
        if by not in seconds:
            records.add(_TITLE, _row(name, by, "not installed"))
            continue
        taken = Spread(own / per_us for own in seconds[by])
        pairs = list(zip(plain, seconds[by], strict=True))
        ratio = Spread(one / own for one, own in pairs)
        on_top = Spread((own - one) / per_us for one, own in pairs)
        row = _row(
            name, by, f"{len(pairs)} of {case.rounds}", taken, ratio, on_top, differences[by]
        )
        quartiles = {key: cell.quartiles for key, cell in row.items() if isinstance(cell, Spread)}
        records.add(_TITLE, row, quartiles=quartiles)
        if by == _OURS and case.requires_ratio:
            verdict = _held_at_least("plain / autobatch", _RATIO_WANTED, ratio)
            records.add(_VERDICTS, {"model": name, **verdict})
    for by in peers.ALL:
        if by in seconds:
            both = zip(seconds[by], seconds[_OURS], strict=True)
            ahead = _held_at_least(f"{by} / autobatch", 1, Samples(t / own for t, own in both))
            records.add(_VERDICTS, {"model": name, **ahead})


def _row(
    name: str,
    by: str,
    rounds: str,
    taken: object = "-",
    ratio: object = "-",
    on_top: object = "-",
    difference: object = "-",
) -> Fields:
    return {
        "model": name,
        "by": by,
        "rounds": rounds,
        "us per micro-batch": taken,
        "plain / it": ratio,
        "on top of plain, us per micro-batch": on_top,
        "update differs by": difference,
    }


def _held_at_least(name: str, least: float, ratio: Samples) -> Fields:
    found = ratio.median
    return {
        "wanted": f"{name} >= {least:g}",
        "measured": f"{found:.4g}",
        "verdict": "held" if found >= least else "NOT held",
    }


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(one: nn.Module, other: nn.Module, start: nn.Module) -> float:
    """Return how far two models differ, relative to how far ``other`` has moved from ``start``."""
    vectors = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (one, other, start))
    first, second, before = vectors
    return float((first - second).norm() / (second - before).norm())


def _cases(records: Records) -> dict[str, Case]:
    torch.manual_seed(SEED)
    quick, device = records.quick, records.device
    mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    rounds = 6 if quick else 200
    cases = {
        f"MLP 32-64-10, {count} x 32": Case(
            mlp, (32,), 32, count, steps=32 // count, rounds=rounds, requires_ratio=False
        )
        for count in (8, 1)
    }
    if not quick:
        resnet = import_torchvision().models.resnet18(num_classes=10).to(device)
        # The smallest images show a window's own cost best; 64 pixels are the demo's size.
        shapes = ((16, 32, 240), (16, 64, 160)) if device.type == "cpu" else ((64, 224, 80),)
        for size, pixels, rounds in shapes:
            cases[f"resnet18 at {pixels} px, 4 x {size}"] = Case(
                resnet, (3, pixels, pixels), size, 4, steps=1, rounds=rounds, requires_ratio=True
            )
    return cases
