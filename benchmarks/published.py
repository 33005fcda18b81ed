"""Training runs that others published, beside what is predicted of them.

Peaks as NVML saw them, and the same runs again under a limit: which of them ran out of memory.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from autobatch.compat.torchvision import import_torchvision
from autobatch.prediction.caching_allocator import Replay, replay
from autobatch.prediction.gpu_catalogue import find_gpu
from autobatch.prediction.trace import Trace
from benchmarks.findings import Fields, Findings
from benchmarks.programs import PublishedLoop, traces, without_values

DATA: Final = Path(__file__).parent / "data"
_MIB: Final = 2**20
_PEAKS: Final = "prediction: the peak of published runs, as NVML saw it (MiB)"
_PEAKS_ALL: Final = "prediction: the published peaks together, absolute errors in percent"
_LIMITED: Final = "prediction: published runs again, under a limit (MiB)"
_LIMITED_ALL: Final = "prediction: whether a run fits under a limit"
_FIRST: Final = "the first 13"
_NOT_RECORDED: Final = 1  # Of zero_grad: what the programs did by themselves.
_PIXELS: Final = 86
_CLOSE: Final = 0.05  # A limit to what is needed: far from it, anybody would be right.


@dataclass(frozen=True, slots=True)
class _Program:
    """What runs of several batches have in common."""

    torchvision: str
    num_classes: int
    optimizer: str
    zero_grad: int

    def __str__(self) -> str:
        return f"{self.torchvision}, {self.optimizer}, zero_grad {self.zero_grad}"

    def traces(self, batches: Sequence[int]) -> list[Trace]:
        with without_values():
            model = import_torchvision().models.get_model(
                self.torchvision, weights=None, num_classes=self.num_classes
            )
        loop = PublishedLoop(
            model=model, optimizer=self.optimizer, pixels=_PIXELS, zero_grad=self.zero_grad
        )
        return traces(loop, batches)


def compare(findings: Findings) -> None:
    """Predict every published run, and add its peak and what became of it under limits."""
    published = json.loads((DATA / "published_runs.json").read_text())
    first = json.loads((DATA / "measured_peaks.json").read_text())["runs"]
    totals: Mapping[str, int] = published["gpu_total_bytes"]
    programs: dict[str, tuple[_Program, list[dict[str, Any]]]] = {}
    for run in published["runs"]:
        program = _program_of(run)
        programs.setdefault(str(program), (program, []))[1].append(run)
    if findings.quick:
        programs = dict(list(programs.items())[-1:])
    marks = {_mark_of(run) for run in first}
    for _, (program, runs) in findings.in_time(programs):
        for run, trace in zip(runs, program.traces([r["batch"] for r in runs]), strict=True):
            _add_peak(run, trace, totals[run["gpu"]], findings, first=_mark_of(run) in marks)
            for limit in run["capped"]:
                _add_limited(run, limit, trace, totals[run["gpu"]], findings)
    _sum_up(findings)


def _program_of(run: Mapping[str, Any]) -> _Program:
    mode = run["zero_grad_mode"]
    return _Program(
        run["torchvision"],
        run["num_classes"],
        run["optimizer"],
        _NOT_RECORDED if mode is None else mode,
    )


def _name_of(run: Mapping[str, Any]) -> str:
    return f"{run['torchvision']}, {run['optimizer']}, {run['batch']}, {run['gpu']}"


def _mark_of(run: Mapping[str, Any]) -> tuple[str, int]:
    """Runs of one name differ in when they let go of gradients, which not every file tells."""
    return _name_of(run), run["measured_peak_bytes"]


def _replayed(run: Mapping[str, Any], trace: Trace, limit_bytes: int | None) -> Replay:
    workspace = find_gpu(run["gpu"]).workspace_bytes
    return replay(trace.events(run["batch"], workspace_bytes=workspace), limit_bytes=limit_bytes)


def _add_peak(
    run: Mapping[str, Any], trace: Trace, total_bytes: int, findings: Findings, *, first: bool
) -> None:
    context = sum(find_gpu(run["gpu"]).context_bytes) // 2
    ran = _replayed(run, trace, total_bytes - context)
    measured = run["measured_peak_bytes"]
    errors = {
        "xMem": _percent(run["xmem_bytes"], measured),
        "allocator": _percent(ran.peak_reserved, measured),
        "context": _percent(ran.peak_reserved + context, measured),
    }
    row = {
        "run": _name_of(run),
        "zero_grad": run["zero_grad_mode"],
        _FIRST: first,
        "measured": measured // _MIB,
        "xMem": run["xmem_bytes"] // _MIB,
        "reserved": ran.peak_reserved // _MIB,
        "allocated": ran.peak_allocated // _MIB,
        "xMem_%": round(errors["xMem"], 1),
        "error_%": round(errors["allocator"], 1),
        "with_context_%": round(errors["context"], 1),
        "fits": ran.fits,
    }
    findings.add(_PEAKS, row, absolute_errors=[abs(error) for error in errors.values()])


def _needed_bytes(run: Mapping[str, Any], trace: Trace) -> int:
    """Return the smallest limit under which the run is predicted to fit, to a thousandth.

    What is torn is not torn alike under every limit, so that a smaller one may fit as well.
    """
    most = _replayed(run, trace, None).peak_reserved
    too_small = trace.allocated_bytes(run["batch"]) // 2
    while most - too_small > most // 1000:
        middle = (most + too_small) // 2
        if _replayed(run, trace, middle).fits:
            most = middle
        else:
            too_small = middle
    return most


def _add_limited(
    run: Mapping[str, Any],
    limit: Mapping[str, Any],
    trace: Trace,
    total_bytes: int,
    findings: Findings,
) -> None:
    limit_bytes = int(limit["fraction"] * total_bytes)
    needed_bytes = _needed_bytes(run, trace)
    predicted = _replayed(run, trace, limit_bytes)
    measured = limit["peak_bytes"]
    known = measured is not None and predicted.fits
    row = {
        "run": _name_of(run),
        "limit": limit_bytes // _MIB,
        "that of": limit["by"],
        "of what is needed": round(limit_bytes / needed_bytes, 3),
        "ran": limit["ran"],
        "predicted": predicted.fits,
        "right": predicted.fits == limit["ran"],
        "measured": measured // _MIB if known else None,
        "reserved": predicted.peak_reserved // _MIB if known else None,
        "error_%": round(_percent(predicted.peak_reserved, measured), 1) if known else None,
    }
    findings.add(_LIMITED, row)


def _percent(predicted: int, measured: int) -> float:
    return 100 * (predicted / measured - 1)


def _sum_up(findings: Findings) -> None:
    rows: list[Any] = findings.rows(_PEAKS)
    for runs, chosen in ((_FIRST, [row for row in rows if row[_FIRST]]), ("all", rows)):
        for place, by in enumerate(
            ("xMem", "autobatch, allocator only", "autobatch, with context")
        ):
            errors = [row["absolute_errors"][place] for row in chosen]
            _add_errors({"runs": runs, "by": by}, errors, findings, _PEAKS_ALL)
    limited: list[Any] = findings.rows(_LIMITED)
    for became, ran in (("ran", True), ("ran out of memory", False)):
        rows = [row for row in limited if row["ran"] is ran]
        close = [row for row in rows if abs(row["of what is needed"] - 1) <= _CLOSE]
        if rows:
            row = {
                "published": became,
                "runs": len(rows),
                "predicted so": sum(row["right"] for row in rows),
                "limit within 5 % of what is needed": len(close),
                "of these predicted so": sum(row["right"] for row in close),
            }
            findings.add(_LIMITED_ALL, row)
    errors = [abs(row["error_%"]) for row in limited if row["error_%"] is not None]
    _add_errors(
        {"runs": "under a limit", "by": "autobatch, allocator only"}, errors, findings, _PEAKS_ALL
    )


def _add_errors(row: Fields, errors: Iterable[float], findings: Findings, table: str) -> None:
    found = list(errors)
    if found:
        spread = {"median": statistics.median(found), "worst": max(found), "number": len(found)}
        findings.add(table, {**row, **spread})
