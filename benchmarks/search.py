"""Finding the largest size: how far, at what cost, and what is left behind. Ours and others'."""

import gc
import math
import statistics
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from benchmarks import search_peers as peers
from benchmarks.findings import Fields, Findings
from benchmarks.hunts import OURS, Hunt, hunt, largest_by_hand, largest_possible
from benchmarks.subjects import Subject, black_boxes, real_models

_BOXES: Final = "search: black boxes that run out of memory above K examples"
_MODELS: Final = (
    "search: real models under a limit; cost is the whole search in rehearsals at the found size"
)
_ALL: Final = ", all of them together"
_VERDICTS: Final = "search: autobatch against what is wanted of it"
_EVERYONE: Final = (OURS, *peers.PEERS)
_REPEATS: Final = 3  # Of ours; only the seconds differ.


_BOX_FAILURES: Final = 43  # Of plain doubling and bisection.
_Line = tuple[str, str, bool]  # What is wanted, what was measured, whether it was held.


def run(findings: Findings) -> None:
    """Search in black boxes, then on real models under limits, everyone in each."""
    boxes = black_boxes(findings.device)
    models, missing = real_models(findings.device)
    cases = {_BOXES: len(boxes), _MODELS: len(models) + len(missing)}
    if findings.quick:
        boxes, models = dict(list(boxes.items())[:3]), dict(list(models.items())[:1])
    with light_heap():
        _hunt_in(_BOXES, boxes, findings)
        _hunt_in(_MODELS, models, findings)
    hunts = {title: _hunts(title, findings) for title in (_BOXES, _MODELS)}
    for name, package in missing.items():
        findings.add(_MODELS, {"case": name, "by": package, **_absent()})
    measured = {title: by for title, by in hunts.items() if by[OURS]}
    for title, everyone in measured.items():
        for by, own in everyone.items():
            findings.add(title + _ALL, {"by": by, **_sums(own)})
    for title, everyone in measured.items():
        for line in verdicts(everyone, cases[title], on_boxes=title == _BOXES):
            findings.add(_VERDICTS, line)


def _hunt_in(title: str, subjects: Mapping[str, Subject], findings: Findings) -> None:
    """Everyone hunts every subject."""
    present = {OURS, *peers.installed()}
    for name, subject in findings.in_time(subjects):
        _hunt_all(title, name, subject, findings, present)


def _hunt_all(
    title: str, name: str, subject: Subject, findings: Findings, present: Container[str]
) -> None:
    """Everyone hunts one subject; autobatch first, for the truth is looked for beside its find."""
    possible = by_hand = subject.possible
    for by in _EVERYONE:
        if by not in present:
            findings.add(title, {"case": name, "by": by, **_absent()})
            continue
        _freeze()  # Some import more at their first search.
        own = hunt(by, subject, _REPEATS if by == OURS and not findings.quick else 1)
        if possible is None or by_hand is None:
            possible = largest_possible(subject, own.found)
            by_hand = largest_by_hand(subject, possible)
        own = replace(own, possible=possible if by == OURS else by_hand)
        row = {"case": name, "by": by, **_told(own)}
        findings.add(title, row, forwards=own.forwards, error=own.error, hunt=own.as_json())


def _hunts(title: str, findings: Findings) -> dict[str, list[Hunt]]:
    """Return everyone's, from what is written: some may have been made before."""
    done: dict[str, list[Hunt]] = {by: [] for by in (OURS, *peers.installed())}
    for row in findings.rows(title):
        if "hunt" in row:
            done.setdefault(str(row["by"]), []).append(Hunt.read(row["hunt"]))
    return done


@contextmanager
def light_heap() -> Iterator[None]:
    """Keep the collector off what was imported: six frameworks.

    Others collect after every failure, and would spend nearly all of their time on that.
    """
    _freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()


def _told(hunt: Hunt) -> Fields:
    return {
        "found": "an error" if hunt.error else hunt.found,
        "possible": hunt.possible,
        "runs": hunt.runs,
        "trials": len(hunt.tried),
        "out_of_memory": hunt.out_of_memory,
        "seconds": hunt.seconds,
        "cost in seconds": hunt.cost_seconds or "-",
        "in examples": "-" if hunt.cost_examples is None else hunt.cost_examples,
        "unchanged": hunt.unchanged,
    }


def _absent() -> Fields:
    columns = ("possible", "runs", "trials", "out_of_memory", "seconds", "cost in seconds")
    return {"found": "not installed", **dict.fromkeys((*columns, "in examples", "unchanged"), "-")}


def _sums(hunts: Sequence[Hunt]) -> Fields:
    shares = [hunt.share for hunt in hunts]
    trials, failures = _trials(hunts), _failures(hunts)
    return {
        "found the largest": f"{sum(hunt.share == 1 for hunt in hunts)} of {len(hunts)}",
        "mean found / possible": f"{statistics.fmean(shares):.3f}",
        "worst": f"{min(shares):.3f}",
        "do not run": sum(not hunt.runs for hunt in hunts),
        "trials": sum(trials),
        "median": statistics.median(trials),
        "out_of_memory": sum(failures),
        "median of them": statistics.median(failures),
        "seconds": f"{sum(hunt.seconds.median for hunt in hunts):.3g}",
        "median cost in seconds": _cost_seconds(hunts),
        "in examples": _cost_examples(hunts),
        "unchanged": f"{sum(hunt.unchanged for hunt in hunts)} of {len(hunts)}",
    }


def verdicts(hunts: Mapping[str, Sequence[Hunt]], cases: int, *, on_boxes: bool) -> list[Fields]:
    """Return what is wanted of autobatch, what was measured, and whether it was held.

    Args:
        hunts: Everyone's, in the same cases.
        cases: How many there are; fewer were measured if time was short.
        on_boxes: Or on real models.
    """
    ours = hunts[OURS]
    others = {by: own for by, own in hunts.items() if by != OURS}
    where = "black boxes" if on_boxes else "real models"
    figures = _on_boxes(ours) if on_boxes else _on_models(ours, others)
    exact = sum(hunt.share == 1 for hunt in ours)
    lines = [(f"finds the largest in all {cases}", f"{exact} of {len(ours)}", exact == cases)]
    lines += [*figures, *_rivals(ours, others)]
    return [
        {"on": where, "wanted": wanted, "measured": measured, "verdict": _verdict(held)}
        for wanted, measured, held in lines
    ]


def _on_boxes(ours: Sequence[Hunt]) -> list[_Line]:
    return [_at_most("out of memory", sum(_failures(ours)), _BOX_FAILURES)]


def _on_models(ours: Sequence[Hunt], others: Mapping[str, Sequence[Hunt]]) -> list[_Line]:
    lines = [
        _at_most("trials, median", statistics.median(_trials(ours)), 3),
        _at_most("out of memory, median", statistics.median(_failures(ours)), 0),
        _at_most("out of memory, mean", statistics.fmean(_failures(ours)), 0.5),
    ]
    for what, cost, most in (("seconds", _cost_seconds, 2.5), ("examples", _cost_examples, 2.0)):
        lines.append(_at_most(f"rehearsals in {what}, median", cost(ours), most))
        costs = {by: cost(own) for by, own in others.items()}
        lines.append(_least(f"no one cheaper in {what}, median", cost(ours), costs))
    return [*lines, _as_far(ours, others)]


def _rivals(ours: Sequence[Hunt], others: Mapping[str, Sequence[Hunt]]) -> list[_Line]:
    """Those that find the largest size in every case that was measured."""
    exact = {by: own for by, own in others.items() if all(hunt.share == 1 for hunt in own)}
    return [
        _least(
            f"no one who finds all with fewer {what}",
            sum(count(ours)),
            {by: sum(count(own)) for by, own in exact.items()},
        )
        for what, count in (("trials", _trials), ("out of memory", _failures))
    ]


def _as_far(ours: Sequence[Hunt], others: Mapping[str, Sequence[Hunt]]) -> _Line:
    """Who stops halfway pays half, and who returns what does not run pays for no trial of it.

    So this one holds each find of a largest size against ours in the same case.
    """
    finds = [
        (by, rival.cost_seconds.median < own.cost_seconds.median)
        for by, rivals in others.items()
        for own, rival in zip(ours, rivals, strict=False)
        if rival.share == 1
    ]
    cheaper = [by for by, is_cheaper in finds if is_cheaper]
    told = f"{len(cheaper)} of {len(finds)} such finds" + "".join(f", {by}" for by in set(cheaper))
    return "no one cheaper in seconds where the largest is found", told, not cheaper


def _at_most(what: str, measured: float, most: float) -> _Line:
    return f"{what} <= {most:g}", f"{measured:.3g}", measured <= most


def _least(what: str, own: float, others: Mapping[str, float]) -> _Line:
    told = [f"{by} {value:.3g}" for by, value in others.items()] or ["no one else"]
    return what, f"{own:.3g}; {', '.join(told)}", all(own <= value for value in others.values())


def _verdict(held: bool) -> str:
    return "held" if held else "NOT held"


def _trials(hunts: Sequence[Hunt]) -> list[int]:
    return [len(hunt.tried) for hunt in hunts]


def _failures(hunts: Sequence[Hunt]) -> list[int]:
    return [hunt.out_of_memory for hunt in hunts]


def _cost_seconds(hunts: Sequence[Hunt]) -> float:
    """The median over the cases whose find runs; infinite if there is none."""
    costs = [hunt.cost_seconds.median for hunt in hunts if hunt.runs and hunt.cost_seconds]
    return statistics.median(costs or [math.inf])


def _cost_examples(hunts: Sequence[Hunt]) -> float:
    costs = [hunt.cost_examples or 0.0 for hunt in hunts if hunt.runs]
    return statistics.median(costs or [math.inf])
