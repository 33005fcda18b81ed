"""The tables of the part ``capacity``: the largest batches, and how fast each size trains."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from benchmarks.harness.records import Fields
from benchmarks.reporting import cells
from benchmarks.reporting.cells import inner, inners
from benchmarks.reporting.render import Table

DESIRED: Final = (256, 1024, 4096)
_FOUND_WANTED: Final = 0.99  # The found size over the exhaustive scan's.
_SPEED_WANTED: Final = 0.98  # Over the best of any single size, at the desired batch below.
_DESIRED_WANTED: Final = 1024

Column = Callable[[Fields], str]


def setting(case: Fields) -> str:
    """Return how a model was run: ``"fp32 AdamW"`` or ``"bf16 inference"``."""
    is_training = case.get("mode") == "train"
    return f"{case.get('precision')} {case.get('optimizer') if is_training else 'inference'}"


def measured(cases: Sequence[Fields]) -> list[Fields]:
    """Return the cases that did not end with an error."""
    return [case for case in cases if not case.get("error")]


def held(cases: Sequence[Fields]) -> Table:
    """Return the tolerable batch by model and setting."""
    settings = list(dict.fromkeys(setting(case) for case in cases))
    by_model: dict[str, dict[str, Fields]] = {}
    for case in cases:
        by_model.setdefault(str(case.get("model")), {})[setting(case)] = case
    rows = [
        [model, *_model_columns(own), *(_held(own.get(name)) for name in settings)]
        for model, own in by_model.items()
    ]
    title = "tolerable batch: the largest that ran, in examples"
    return Table(["model", "example", "parameters", *settings], rows, title)


def _model_columns(cases: Mapping[str, Fields]) -> list[str]:
    first = next(iter(cases.values()))
    count = cells.number(first.get("parameters"))
    parameters = cells.NOTHING if count is None else f"{count / 1e6:.1f} M"
    return [cells.text(first.get("example")), parameters]


def _held(case: Fields | None) -> str:
    if case is None:
        return cells.NOTHING
    return "failed" if case.get("error") else cells.text(case.get("tolerable"))


def searched(cases: Sequence[Fields]) -> Table:
    """Return what each search found and took."""
    columns: dict[str, Column] = {
        "tolerable": _value("tolerable"),
        "peak allocated": _value("peak_allocated_bytes", cells.size),
        "reserved": _value("peak_reserved_bytes", cells.size),
        "limit": _value("limit_bytes", cells.size),
        "reserved / limit": _value("share", cells.percent),
        "trials": _value("trials"),
        "out of memory": _value("out_of_memory"),
        "search, seconds": _value("search_seconds"),
        "found / scan": lambda case: cells.text(inner(case, "scan").get("found_over_largest")),
        "limited by": _value("limited_by"),
        "what rules out more": _ruled_out,
    }
    return _table(measured(cases), columns, "every search")._replace(folded=True)


def _ruled_out(case: Fields) -> str:
    upper = inner(case, "upper")
    size, reason = cells.text(upper.get("size")), cells.text(upper.get("reason"))
    if cells.number(upper.get("bytes")) is None:
        return reason if size == cells.NOTHING else f"{size} {reason}"
    return f"{size} needs {cells.size(upper.get('bytes'))} ({reason})"


def speeds(cases: Sequence[Fields]) -> Table:
    """Return the fastest size of each case, beside the tolerable size."""
    columns: dict[str, Column] = {
        "fastest size": _value("fastest"),
        "examples per second": lambda case: rate_at(case, "fastest"),
        "tolerable": _value("tolerable"),
        "examples per second there": lambda case: rate_at(case, "tolerable"),
    }
    return _table(measured(cases), columns, "examples per second by size")


def rate_at(case: Fields, name: str) -> str:
    """Return the examples per second at the size that is the case's ``name``."""
    sizes = inners(case, "sizes")
    rates = {cells.whole(one.get("size")): one.get("examples_per_second") for one in sizes}
    return cells.text(rates.get(cells.whole(case.get(name))))


def accumulations(cases: Sequence[Fields]) -> Table:
    """Return how each desired batch is cut, and how fast it is."""

    def column(desired: int) -> Column:
        return lambda case: plan_for(case, desired)

    planned = [case for case in measured(cases) if inners(case, "desired")]
    columns = {f"desired {desired}": column(desired) for desired in DESIRED}
    title = "micro-batches x size: examples per second, of the best of any single size"
    return _table(planned, columns, title)


def plan_for(case: Fields, desired: int) -> str:
    """Return how a desired batch is cut, how fast it is, and its share of the best size's speed."""
    plans = {cells.whole(plan.get("desired")): plan for plan in inners(case, "desired")}
    plan = plans.get(desired)
    if plan is None:
        return cells.NOTHING
    cut = " x ".join(cells.text(plan.get(key)) for key in ("accumulation_steps", "micro_batch"))
    rate = plan.get("examples_per_second")
    if rate is None:  # There was no time to measure it.
        return cut
    return f"{cut}: {cells.text(rate)}, {cells.percent(plan.get('of_best'))}"


def predicted(cases: Sequence[Fields]) -> Table:
    """Return the predictions beside what was found."""

    def prediction(name: str, show: Callable[[object], str] = cells.text) -> Column:
        return lambda case: show(inner(case, "predicted").get(name))

    columns: dict[str, Column] = {
        "found": _value("tolerable"),
        "predicted: safe": prediction("tolerable_safe"),
        "likely": prediction("tolerable_likely"),
        "peak reserved there": _value("peak_reserved_bytes", cells.size),
        "predicted peak there": prediction("peak_bytes_at_found", cells.size),
    }
    known = [case for case in measured(cases) if inner(case, "predicted")]
    return _table(known, columns, "largest batches, predicted before the search")


def failures(cases: Sequence[Fields]) -> Table:
    """Return the cases that ended with an error, with the reason."""
    failed = [case for case in cases if case.get("error")]
    return _table(failed, {"reason": _value("error")}, "what failed")


def verdicts(cases: Sequence[Fields]) -> Table:
    """Return each requirement, the worst that was measured, and whether it was held."""
    cases = measured(cases)
    scans = [inner(case, "scan").get("found_over_largest") for case in cases]
    plans = [plan for case in cases for plan in inners(case, "desired")]
    shares = [plan.get("of_best") for plan in plans if plan.get("desired") == _DESIRED_WANTED]
    rows = []
    for name, values, least in (
        ("found / the exhaustive scan's", scans, _FOUND_WANTED),
        (f"desired {_DESIRED_WANTED} / best of any size", shares, _SPEED_WANTED),
    ):
        known = [value for value in map(cells.number, values) if value is not None]
        if known:
            verdict = "held" if min(known) >= least else "NOT held"
            rows.append([f"{name} >= {least:g}", f"{min(known):.3f}", str(len(known)), verdict])
    return Table(["wanted of every model", "worst", "of", "verdict"], rows, "what is wanted")


def _value(name: str, show: Callable[[object], str] = cells.text) -> Column:
    return lambda case: show(case.get(name))


def _table(cases: Sequence[Fields], columns: Mapping[str, Column], title: str) -> Table:
    """Return a row for each case, which begins with the model and its setting."""
    every: dict[str, Column] = {"model": _value("model"), "setting": setting, **columns}
    return Table(list(every), [[show(case) for show in every.values()] for case in cases], title)
