"""Measures parts within one budget of time, and keeps what is done."""

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from autobatch.prediction.gpu_catalogue import Gpu
from benchmarks import report
from benchmarks.findings import Fields, Findings, Kept, Notice
from benchmarks.machine import environment, keep_freed_memory, slug, write_atomically
from benchmarks.progress import Tell, shown

# A figure stands beside another in one file only where all of these are the same.
_SAME: Final = (
    *("part", "quick", "imitated", "device", "driver", "torch", "code", "python", "threads"),
    "seed",
)
_WORTH_SECONDS: Final = 5.0  # Of time left over, for another round.
_INTERRUPTED: Final = 130  # What a shell returns for Ctrl-C.


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A kind of benchmark.

    Attributes:
        run: Measures it.
        weight: Its share of the time, against the others'.
    """

    run: Callable[[Findings], None]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked for.

    Attributes:
        device: Where models run.
        minutes: No case begins later.
        out: The folder of results; None writes nothing.
        quick: Only to see that it works.
        models: The names of those that are wanted; none are all.
        imitated: The card that the CPU's meter stands for.
        fresh: Whether to begin anew where there are results to go on from.
    """

    device: torch.device
    minutes: float
    out: Path | None = None
    quick: bool = False
    models: Sequence[str] = ()
    imitated: Gpu | None = None
    fresh: bool = False


@dataclass(slots=True)
class _Work:
    """A part that is being measured: its findings, and its facts for the file."""

    facts: dict[str, object]
    findings: Findings
    path: Path | None
    seconds: float = 0.0
    began: float = field(default_factory=lambda: time.monotonic())

    def write(self) -> None:
        """Replace the part's file, if anything was measured."""
        if self.path is None or not self.findings.cases:
            return
        spent = {"seconds": round(self.seconds + time.monotonic() - self.began, 1)}
        found = self.findings
        measured = {"left_out": found.left_out, "done": found.done, "cases": found.cases}
        write_atomically(self.path, self.facts | spent | measured)


def run(parts: Mapping[str, Part], options: Options) -> int:
    """Measure the parts and report; return an exit code: 0, 1 if one failed, 130 if interrupted.

    Every part gets its share of what is left of the time, by weight. What that leaves is spent on
    those that were short of it.
    """
    folder = None if options.out is None else options.out / _folder(options)
    failed: set[str] = set()
    code = 0
    try:
        with _terminable(), shown(list(parts), options.minutes) as tell:
            _measure_all(parts, options, folder, failed, tell)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first.
        print("interrupted: what is done is kept, and the same command goes on with it")
        code = _INTERRUPTED
    if folder is not None and folder.is_dir() and not _report(folder):
        failed.add("report")
    return code or int(bool(failed))


def share(left_seconds: float, weights: Sequence[float]) -> float:
    """Return the first one's seconds of what is left for all of them."""
    return max(left_seconds, 0.0) * weights[0] / sum(weights)


def _measure_all(
    parts: Mapping[str, Part],
    options: Options,
    folder: Path | None,
    failed: set[str],
    tell: Tell,
) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    kept_memory = keep_freed_memory()
    before: dict[str, Kept] = {}
    waiting = list(parts)
    for fresh in (options.fresh, False):
        short = []
        for place, name in enumerate(waiting):
            weights = [parts[other].weight for other in waiting[place:]]
            work = _begin(name, options, folder, kept_memory, tell)
            work.findings.deadline = time.monotonic() + share(deadline - time.monotonic(), weights)
            _take_up(work, before.get(name), fresh=fresh)
            if not _measure(parts[name], work):
                failed.add(name)
            before[name] = _kept(work)
            if work.findings.short and name not in failed:
                short.append(name)
        waiting = short
        if deadline - time.monotonic() < _WORTH_SECONDS:
            return


def _begin(
    name: str, options: Options, folder: Path | None, kept_memory: bool, tell: Tell
) -> _Work:
    card = options.imitated
    facts = {
        "part": name,
        "quick": options.quick,
        "imitated": card and card.name,
        **environment(options.device),
        "freed_memory_kept": kept_memory,
    }
    findings = Findings(
        device=options.device, quick=options.quick, models=options.models, imitated=card
    )
    work = _Work(facts, findings, None if folder is None else folder / f"{name}.json")

    def notice(what: Notice) -> None:
        tell(name, what)

    findings.notice, findings.save = notice, work.write
    return work


def _take_up(work: _Work, before: Kept | None, *, fresh: bool) -> None:
    """Go on from what this run has done, else from a file of the same code on the same device."""
    kept = before
    if kept is None and work.path is not None and not fresh:
        kept = read_kept(work.path, work.facts)
    if kept is not None:
        work.findings.take_up(kept)
        work.seconds = kept.seconds


def read_kept(path: Path, facts: Fields) -> Kept | None:
    """Return the finished cases of a file; None if it is another's, or not to be read."""
    try:
        written: Any = json.loads(path.read_text(encoding="utf-8"))
        if any(written.get(name) != facts.get(name) for name in _SAME):
            return None
        cases, done = written["cases"], written["done"]
        kept = Kept(cases=cases, done=done, seconds=written["seconds"])
        Findings(device=torch.device("cpu")).take_up(kept)  # That every place is there.
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return kept


def _kept(work: _Work) -> Kept:
    found, seconds = work.findings, work.seconds + time.monotonic() - work.began
    last = found.last_seconds
    return Kept(cases=found.cases, done=found.done, seconds=seconds, last_seconds=last)


def _measure(part: Part, work: _Work) -> bool:
    """Measure one part and tell it; return whether it came to its end."""
    told = {key: value for key, value in work.facts.items() if value is not None}
    print(", ".join(f"{key} {value}" for key, value in told.items()), end="\n\n", flush=True)
    if work.findings.done:
        print(f"{len(work.findings.done)} cases were measured before", end="\n\n")
    error: Exception | None = None
    try:
        part.run(work.findings)
    except Exception as problem:  # noqa: BLE001  # The other parts are measured all the same.
        traceback.print_exc()
        error, work.facts["failed"] = problem, repr(problem)
    work.write()
    spent = time.monotonic() - work.began
    print(work.findings, f"{work.facts['part']} took {spent:.1f} s", sep="\n", end="\n\n")
    if work.path is not None and work.findings.cases:
        print(f"written to {work.path}", end="\n\n", flush=True)
    return error is None


def _folder(options: Options) -> str:
    if options.imitated is not None:
        return f"imitated-{slug(options.imitated.name)}"
    return slug(str(environment(options.device)["device"]))


def _report(folder: Path) -> bool:
    """Let the report be written from the files of a folder; return whether it could be."""
    try:
        written = report.write(folder)
    except Exception:  # noqa: BLE001  # What was measured is in its files all the same.
        traceback.print_exc()
        return False
    for path in written:
        print(f"written to {path}", flush=True)
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C: whoever ends this process shall find a report."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
