"""Measure parts within one budget of time, and write each part's file after every case."""

import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from autobatch.prediction.gpu_catalogue import Gpu
from benchmarks.harness.environment import environment, keep_freed_memory, slug, write_atomically
from benchmarks.harness.progress import Notify, shown
from benchmarks.harness.records import Notice, Records
from benchmarks.reporting import report

_ROUNDS: Final = 2  # The second round is for cases that had no time in the first.
_WORTH_SECONDS: Final = 5.0  # With less time left there is no second round.
_INTERRUPTED: Final = 130  # What a shell returns for Ctrl-C.


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A kind of benchmark.

    Attributes:
        run: Measures the part and adds rows to the records.
        weight: Its share of the time, relative to the other parts.
    """

    run: Callable[[Records], None]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a run.

    Attributes:
        device: Where models run.
        minutes: No case begins later.
        out: The folder of results; None writes nothing.
        quick: Only show that everything works.
        models: The names of the requested models; empty for all.
        imitated: The card whose memory the CPU's meter imitates.
    """

    device: torch.device
    minutes: float
    out: Path | None = None
    quick: bool = False
    models: Sequence[str] = ()
    imitated: Gpu | None = None


@dataclass(slots=True)
class _Work:
    """A part that is being measured: its records, and the facts that its file states."""

    facts: dict[str, object]
    records: Records
    path: Path | None
    seconds: float = 0.0  # In earlier rounds.
    began: float = field(default_factory=lambda: time.monotonic())

    def write(self) -> None:
        """Replace the part's file, if anything was measured."""
        if self.path is None or not self.records.cases:
            return
        spent = {"seconds": round(self.seconds + time.monotonic() - self.began, 1)}
        measured = {"left_out": self.records.left_out, "cases": self.records.cases}
        write_atomically(self.path, self.facts | spent | measured)

    def begin_again(self) -> None:
        """Prepare another round, for the cases that had no time."""
        now = time.monotonic()
        self.seconds, self.began = self.seconds + now - self.began, now
        self.records.begin_again()


def run(parts: Mapping[str, Part], options: Options) -> int:
    """Measure the parts and report; return an exit code: 0, 1 if one failed, 130 if interrupted.

    Each part gets a share of the remaining time, by weight. Time that is left after all parts goes
    to the parts that were short of it.
    """
    folder = None if options.out is None else options.out / _folder(options)
    failed: set[str] = set()
    code = 0
    try:
        with _terminable(), shown(list(parts), options.minutes) as notify:
            _measure_all(parts, options, folder, failed, notify)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second.
        print("interrupted: the finished cases are kept")
        code = _INTERRUPTED
    if folder is not None and folder.is_dir() and not _report(folder):
        failed.add("report")
    return code or int(bool(failed))


def share(left_seconds: float, weights: Sequence[float]) -> float:
    """Return the first part's seconds of the remaining time of all parts."""
    return max(left_seconds, 0.0) * weights[0] / sum(weights)


def _measure_all(
    parts: Mapping[str, Part],
    options: Options,
    folder: Path | None,
    failed: set[str],
    notify: Notify,
) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    kept_memory = keep_freed_memory()
    works: dict[str, _Work] = {}
    waiting = list(parts)
    for _ in range(_ROUNDS):
        short = []
        for place, name in enumerate(waiting):
            weights = [parts[other].weight for other in waiting[place:]]
            if name in works:
                works[name].begin_again()
            else:
                works[name] = _begin(name, options, folder, kept_memory, notify)
            records = works[name].records
            records.deadline = time.monotonic() + share(deadline - time.monotonic(), weights)
            if not _measure(parts[name], works[name]):
                failed.add(name)
            elif records.short:
                short.append(name)
        waiting = short
        if deadline - time.monotonic() < _WORTH_SECONDS:
            return


def _begin(
    name: str, options: Options, folder: Path | None, kept_memory: bool, notify: Notify
) -> _Work:
    card = options.imitated
    facts = {
        "part": name,
        "quick": options.quick,
        "imitated": card and card.name,
        **environment(options.device),
        "freed_memory_kept": kept_memory,
    }
    records = Records(
        device=options.device, quick=options.quick, models=options.models, imitated=card
    )
    work = _Work(facts, records, None if folder is None else folder / f"{name}.json")

    def notice(what: Notice) -> None:
        notify(name, what)

    records.notice, records.save = notice, work.write
    return work


def _measure(part: Part, work: _Work) -> bool:
    """Measure one part and print its tables; return whether it ended without an error."""
    facts = [f"{key} {value}" for key, value in work.facts.items() if value is not None]
    print(", ".join(facts), end="\n\n", flush=True)
    if work.records.done:
        print(f"{len(work.records.done)} cases were measured before", end="\n\n")
    error: Exception | None = None
    try:
        part.run(work.records)
    except Exception as problem:  # noqa: BLE001  # The other parts are measured anyway.
        traceback.print_exc()
        error, work.facts["failed"] = problem, repr(problem)
    work.write()
    spent = time.monotonic() - work.began
    print(work.records, f"{work.facts['part']} took {spent:.1f} s", sep="\n", end="\n\n")
    if work.path is not None and work.records.cases:
        print(f"written to {work.path}", end="\n\n", flush=True)
    return error is None


def _folder(options: Options) -> str:
    if options.imitated is not None:
        return f"imitated-{slug(options.imitated.name)}"
    return slug(str(environment(options.device)["device"]))


def _report(folder: Path) -> bool:
    """Write the report of a folder's files; return whether that succeeded."""
    try:
        written = report.write(folder)
    except Exception:  # noqa: BLE001  # The result files are complete without it.
        traceback.print_exc()
        return False
    for path in written:
        print(f"written to {path}", flush=True)
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that a run that is ended writes its report."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
