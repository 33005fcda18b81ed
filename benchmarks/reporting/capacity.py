"""What a card holds, and how fast: the report's chapters of the part ``capacity``."""

from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks.harness.records import Fields
from benchmarks.reporting import cells
from benchmarks.reporting.document import Table

DESIRED: Final = (256, 1024, 4096)
_FOUND_WANTED: Final = 0.99  # Of the exhaustive scan's.
_SPEED_WANTED: Final = 0.98  # Of the best of any single size, at the desired batch below.
_DESIRED_WANTED: Final = 1024


def setting(case: Fields) -> str:
    """Return what a model was measured in: ``"fp32 AdamW"`` or ``"bf16 inference"``."""
    is_training = case.get("mode") == "train"
    return f"{case.get('precision')} {case.get('optimizer') if is_training else 'inference'}"


def sound(cases: Sequence[Fields]) -> list[Fields]:
    """Return the cases that were measured."""
    return [case for case in cases if not case.get("error")]


def held(cases: Sequence[Fields]) -> Table:
    """Models against settings: the tolerable batch of each."""
    settings = list(dict.fromkeys(setting(case) for case in cases))
    by_place = {(str(case.get("model")), setting(case)): case for case in cases}
    firsts = {str(case.get("model")): case for case in reversed(cases)}
    models = dict.fromkeys(str(case.get("model")) for case in cases)
    rows = [
        [model, *_kind(firsts[model]), *(_held(by_place.get((model, s))) for s in settings)]
        for model in models
    ]
    return Table(
        title="tolerable batch: the largest that ran, in examples",
        header=["model", "example", "parameters", *settings],
        rows=rows,
    )


def _kind(case: Fields) -> list[str]:
    count = cells.number(case.get("parameters"))
    return [
        cells.text(case.get("example")),
        cells.NOTHING if count is None else f"{count / 1e6:.1f} M",
    ]


def _held(case: Fields | None) -> str:
    if case is None:
        return cells.NOTHING
    return "failed" if case.get("error") else cells.text(case.get("tolerable"))


def searched(cases: Sequence[Fields]) -> Table:
    """How each was found and what it took."""
    header = [
        *("model", "setting", "tolerable", "peak allocated", "reserved", "limit"),
        *("reserved / limit", "trials", "out of memory", "search, seconds", "found / scan"),
        *("limited by", "what rules out more"),
    ]
    rows = [
        [
            cells.text(case.get("model")),
            setting(case),
            cells.text(case.get("tolerable")),
            cells.size(case.get("peak_allocated_bytes")),
            cells.size(case.get("peak_reserved_bytes")),
            cells.size(case.get("limit_bytes")),
            cells.percent(case.get("share")),
            cells.text(case.get("trials")),
            cells.text(case.get("out_of_memory")),
            cells.text(case.get("search_seconds")),
            cells.text(inner(case, "scan").get("found_over_largest")),
            cells.text(case.get("limited_by")),
            _ruled_out(inner(case, "upper")),
        ]
        for case in sound(cases)
    ]
    return Table(title="every search", header=header, rows=rows, folded=True)


def _ruled_out(upper: Fields) -> str:
    size, reason = cells.text(upper.get("size")), cells.text(upper.get("reason"))
    if cells.number(upper.get("bytes")) is None:
        return reason if size == cells.NOTHING else f"{size} {reason}"
    return f"{size} needs {cells.size(upper.get('bytes'))} ({reason})"


def speeds(cases: Sequence[Fields]) -> Table:
    """The fastest size of each, beside the tolerable one."""
    rows = []
    for case in sound(cases):
        row = [cells.text(case.get("model")), setting(case)]
        for name in ("fastest", "tolerable"):
            row += [cells.text(case.get(name)), rate_at(case, name)]
        rows.append(row)
    header = ["model", "setting", "fastest size", "examples per second"]
    header += ["tolerable", "examples per second there"]
    return Table(title="examples per second by size", header=header, rows=rows)


def rate_at(case: Fields, name: str) -> str:
    """Return the examples per second at the size that is the case's ``name``."""
    rates = {cells.whole(one.get("size")): one.get("examples_per_second") for one in sizes(case)}
    return cells.text(rates.get(cells.whole(case.get(name))))


def accumulations(cases: Sequence[Fields]) -> Table:
    """What each desired batch takes."""
    rows = []
    for case in sound(cases):
        if inners(case, "desired"):
            plans = [plan_for(case, desired) for desired in DESIRED]
            rows.append([cells.text(case.get("model")), setting(case), *plans])
    header = ["model", "setting", *(f"desired {desired}" for desired in DESIRED)]
    title = "micro-batches x size: examples per second, of the best of any single size"
    return Table(title=title, header=header, rows=rows)


def plan_for(case: Fields, wanted: int) -> str:
    """Return how a desired batch is cut, how fast it goes, and its share of the best."""
    plans = {cells.whole(plan.get("desired")): plan for plan in inners(case, "desired")}
    desired = plans.get(wanted)
    if desired is None:
        return cells.NOTHING
    steps, size = (cells.text(desired.get(key)) for key in ("accumulation_steps", "micro_batch"))
    if desired.get("examples_per_second") is None:  # There was no time for it.
        return f"{steps} x {size}"
    rate = cells.text(desired.get("examples_per_second"))
    return f"{steps} x {size}: {rate}, {cells.percent(desired.get('of_best'))}"


def predicted(cases: Sequence[Fields]) -> Table:
    """The prediction beside what was found."""
    rows = [
        [
            cells.text(case.get("model")),
            setting(case),
            cells.text(case.get("tolerable")),
            cells.text(told.get("tolerable_safe")),
            cells.text(told.get("tolerable_likely")),
            cells.size(case.get("peak_reserved_bytes")),
            cells.size(told.get("peak_bytes_at_found")),
        ]
        for case in sound(cases)
        if (told := inner(case, "predicted"))
    ]
    header = ["model", "setting", "found", "predicted: safe", "likely"]
    header += ["peak reserved there", "predicted peak there"]
    return Table(title="largest batches, predicted before the search", header=header, rows=rows)


def failures(cases: Sequence[Fields]) -> Table:
    """What failed, with the reason."""
    failed = [case for case in cases if case.get("error")]
    rows = [[cells.text(c.get("model")), setting(c), cells.text(c.get("error"))] for c in failed]
    return Table(title="what failed", header=["model", "setting", "reason"], rows=rows)


def verdicts(cases: Sequence[Fields]) -> Table:
    """What is wanted, the worst that was measured, and whether it was held."""
    scans = [cells.number(inner(case, "scan").get("found_over_largest")) for case in sound(cases)]
    shares = [
        cells.number(plan.get("of_best"))
        for case in sound(cases)
        for plan in inners(case, "desired")
        if plan.get("desired") == _DESIRED_WANTED
    ]
    lines = [
        _verdict("found / the exhaustive scan's", scans, _FOUND_WANTED),
        _verdict(f"desired {_DESIRED_WANTED} / best of any size", shares, _SPEED_WANTED),
    ]
    header = ["wanted of every model", "worst", "of", "verdict"]
    return Table(title="what is wanted", header=header, rows=[line for line in lines if line])


def _verdict(what: str, measured: Sequence[float | None], least: float) -> list[str]:
    known = [value for value in measured if value is not None]
    if not known:
        return []
    verdict = "held" if min(known) >= least else "NOT held"
    return [f"{what} >= {least:g}", f"{min(known):.3f}", str(len(known)), verdict]


def inner(case: Fields, name: str) -> Fields:
    """Return a field that has fields; none where it is null."""
    value = case.get(name)
    return value if isinstance(value, Mapping) else {}


def inners(case: Fields, name: str) -> list[Fields]:
    """Return a list of fields; none where it is null."""
    value = case.get(name)
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def sizes(case: Fields) -> list[Fields]:
    """Return the sizes that were timed."""
    return inners(case, "sizes")
