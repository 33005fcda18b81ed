"""Compare searches for the largest size: what each finds, costs and leaves changed."""

import gc
import math
import statistics
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from benchmarks.harness.records import Fields, Records
from benchmarks.search import peers
from benchmarks.search.measure import (
    OURS,
    SearchMeasurement,
    largest_by_hand,
    largest_possible,
    measure_search,
)
from benchmarks.search.workloads import SearchWorkload, black_boxes, real_models

_BOXES: Final = "search: black boxes that run out of memory above K examples"
_MODELS: Final = (
    "search: real models under a limit; cost is the whole search in trial steps at the found size"
)
_ALL: Final = ", all of them together"
_VERDICTS: Final = "search: autobatch against what is wanted of it"
_EVERYONE: Final = (OURS, *peers.PEERS)
_REPEATS: Final = 3  # Repeats of autobatch's search; only the seconds differ.


_BOX_FAILURES: Final = 43  # The failures of plain doubling and bisection.
_Line = tuple[str, str, bool]  # The requirement, the measured value, whether it was held.


def run(records: Records) -> None:
    """Let every searcher search the black boxes, then the real models under limits."""
    boxes = black_boxes(records.device)
    models, missing = real_models(records.device)
    cases = {_BOXES: len(boxes), _MODELS: len(models) + len(missing)}
    if records.quick:
        boxes, models = dict(list(boxes.items())[:3]), dict(list(models.items())[:1])
    with light_heap():
        _measure_in(_BOXES, boxes, records)
        _measure_in(_MODELS, models, records)
    measurements = {title: _measurements(title, records) for title in (_BOXES, _MODELS)}
    for name, package in missing.items():
        records.add(_MODELS, {"case": name, "by": package, **_absent()})
    measured = {title: by for title, by in measurements.items() if by[OURS]}
    for title, everyone in measured.items():
        for by, own in everyone.items():
            records.add(title + _ALL, {"by": by, **_sums(own)})
    for title, everyone in measured.items():
        for line in verdicts(everyone, cases[title], on_boxes=title == _BOXES):
            records.add(_VERDICTS, line)


def _measure_in(title: str, workloads: Mapping[str, SearchWorkload], records: Records) -> None:
    """Let every searcher search every workload."""
    present = {OURS, *peers.installed()}
    for name, workload in records.in_time(workloads):
        _measure_all(title, name, workload, records, present)


def _measure_all(
    title: str, name: str, workload: SearchWorkload, records: Records, present: Container[str]
) -> None:
    """Let every searcher search one workload; autobatch first, whose size is then verified."""
    possible = by_hand = workload.possible
    for by in _EVERYONE:
        if by not in present:
            records.add(title, {"case": name, "by": by, **_absent()})
            continue
        _freeze()  # Some libraries import more modules at their first search.
        own = measure_search(by, workload, _REPEATS if by == OURS and not records.quick else 1)
        if possible is None or by_hand is None:
            possible = largest_possible(workload, own.found)
            by_hand = largest_by_hand(workload, possible)
        own = replace(own, possible=possible if by == OURS else by_hand)
        row = {"case": name, "by": by, **_row(own)}
        records.add(title, row, forwards=own.forwards, error=own.error, measurement=own.as_json())


def _measurements(title: str, records: Records) -> dict[str, list[SearchMeasurement]]:
    """Return every searcher's measurements, from the rows of all rounds."""
    done: dict[str, list[SearchMeasurement]] = {by: [] for by in (OURS, *peers.installed())}
    for row in records.rows(title):
        if "measurement" in row:
            done.setdefault(str(row["by"]), []).append(SearchMeasurement.read(row["measurement"]))
    return done


@contextmanager
def light_heap() -> Iterator[None]:
    """Exclude the imported modules of six libraries from garbage collection.

    Other libraries collect after every failure, and would spend nearly all of their time on that.
    """
    _freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()


def _row(one: SearchMeasurement) -> Fields:
    return {
        "found": "an error" if one.error else one.found,
        "possible": one.possible,
        "runs": one.runs,
        "trials": len(one.tried),
        "out_of_memory": one.out_of_memory,
        "seconds": one.seconds,
        "cost in seconds": one.cost_seconds or "-",
        "in examples": "-" if one.cost_examples is None else one.cost_examples,
        "unchanged": one.unchanged,
    }


def _absent() -> Fields:
    columns = ("possible", "runs", "trials", "out_of_memory", "seconds", "cost in seconds")
    return {"found": "not installed", **dict.fromkeys((*columns, "in examples", "unchanged"), "-")}


def _sums(measurements: Sequence[SearchMeasurement]) -> Fields:
    shares = [one.share for one in measurements]
    trials, failures = _trials(measurements), _failures(measurements)
    return {
        "found the largest": f"{sum(one.share == 1 for one in measurements)} of {len(shares)}",
        "mean found / possible": f"{statistics.fmean(shares):.3f}",
        "worst": f"{min(shares):.3f}",
        "do not run": sum(not one.runs for one in measurements),
        "trials": sum(trials),
        "median": statistics.median(trials),
        "out_of_memory": sum(failures),
        "median of them": statistics.median(failures),
        "seconds": f"{sum(one.seconds.median for one in measurements):.3g}",
        "median cost in seconds": _cost_seconds(measurements),
        "in examples": _cost_examples(measurements),
        "unchanged": f"{sum(one.unchanged for one in measurements)} of {len(measurements)}",
    }


def verdicts(
    measurements: Mapping[str, Sequence[SearchMeasurement]], cases: int, *, on_boxes: bool
) -> list[Fields]:
    """Return each requirement of autobatch, the measured value, and whether it was held.

    Args:
        measurements: The measurements of every searcher, in the same cases.
        cases: The number of cases; fewer were measured if time was short.
        on_boxes: Whether the cases are black boxes, and not real models.
    """
    ours = measurements[OURS]
    others = {by: own for by, own in measurements.items() if by != OURS}
    where = "black boxes" if on_boxes else "real models"
    figures = _on_boxes(ours) if on_boxes else _on_models(ours, others)
    exact = sum(one.share == 1 for one in ours)
    lines = [(f"finds the largest in all {cases}", f"{exact} of {len(ours)}", exact == cases)]
    lines += [*figures, *_rivals(ours, others)]
    return [
        {"on": where, "wanted": wanted, "measured": measured, "verdict": _verdict(held)}
        for wanted, measured, held in lines
    ]


def _on_boxes(ours: Sequence[SearchMeasurement]) -> list[_Line]:
    return [_at_most("out of memory", sum(_failures(ours)), _BOX_FAILURES)]


def _on_models(
    ours: Sequence[SearchMeasurement], others: Mapping[str, Sequence[SearchMeasurement]]
) -> list[_Line]:
    lines = [
        _at_most("trials, median", statistics.median(_trials(ours)), 3),
        _at_most("out of memory, median", statistics.median(_failures(ours)), 0),
        _at_most("out of memory, mean", statistics.fmean(_failures(ours)), 0.5),
    ]
    for what, cost, most in (("seconds", _cost_seconds, 2.5), ("examples", _cost_examples, 2.0)):
        lines.append(_at_most(f"trial steps in {what}, median", cost(ours), most))
        costs = {by: cost(own) for by, own in others.items()}
        lines.append(_least(f"no one cheaper in {what}, median", cost(ours), costs))
    return [*lines, _as_far(ours, others)]


def _rivals(
    ours: Sequence[SearchMeasurement], others: Mapping[str, Sequence[SearchMeasurement]]
) -> list[_Line]:
    """Compare autobatch with the searchers that find the largest size in every case."""
    exact = {by: own for by, own in others.items() if all(one.share == 1 for one in own)}
    return [
        _least(
            f"no one who finds all with fewer {what}",
            sum(count(ours)),
            {by: sum(count(own)) for by, own in exact.items()},
        )
        for what, count in (("trials", _trials), ("out of memory", _failures))
    ]


def _as_far(
    ours: Sequence[SearchMeasurement], others: Mapping[str, Sequence[SearchMeasurement]]
) -> _Line:
    """Compare each search that found the largest size with autobatch's in the same case.

    A search that stops halfway costs half, and a search that returns a size that does not run saves
    the trial of it; neither counts here.
    """
    finds = [
        (by, rival.cost_seconds.median < own.cost_seconds.median)
        for by, rivals in others.items()
        for own, rival in zip(ours, rivals, strict=False)
        if rival.share == 1
    ]
    cheaper = [by for by, is_cheaper in finds if is_cheaper]
    measured = f"{len(cheaper)} of {len(finds)} such finds" + "".join(
        f", {by}" for by in set(cheaper)
    )
    return "no one cheaper in seconds where the largest is found", measured, not cheaper


def _at_most(what: str, measured: float, most: float) -> _Line:
    return f"{what} <= {most:g}", f"{measured:.3g}", measured <= most


def _least(what: str, own: float, others: Mapping[str, float]) -> _Line:
    values = [f"{by} {value:.3g}" for by, value in others.items()] or ["no one else"]
    return what, f"{own:.3g}; {', '.join(values)}", all(own <= value for value in others.values())


def _verdict(held: bool) -> str:
    return "held" if held else "NOT held"


def _trials(measurements: Sequence[SearchMeasurement]) -> list[int]:
    return [len(one.tried) for one in measurements]


def _failures(measurements: Sequence[SearchMeasurement]) -> list[int]:
    return [one.out_of_memory for one in measurements]


def _cost_seconds(measurements: Sequence[SearchMeasurement]) -> float:
    """Return the median over the cases whose size runs; infinite if there is no such case."""
    costs = [one.cost_seconds.median for one in measurements if one.runs and one.cost_seconds]
    return statistics.median(costs or [math.inf])


def _cost_examples(measurements: Sequence[SearchMeasurement]) -> float:
    costs = [one.cost_examples or 0.0 for one in measurements if one.runs]
    return statistics.median(costs or [math.inf])
