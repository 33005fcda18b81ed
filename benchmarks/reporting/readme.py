"""The README's figures: from the committed results, between two comments."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.reporting import capacity, cells, pictures
from benchmarks.reporting.document import Table
from benchmarks.reporting.markdown import escaped, table_lines
from benchmarks.reporting.results import Results, read
from benchmarks.reporting.side_by_side import LARGEST, gradients, on_top, search_cost, survivals

BEGIN: Final = "<!-- benchmarks: written by python -m benchmarks readme -->"
_LIMITS: Final = ", each model under six times its weights and 512 MiB"
_PLANS: Final = "micro-batches x size, where timed the examples per second, and of the best size's"
END: Final = "<!-- /benchmarks -->"


def updated(text: str, root: Path) -> str:
    """Return the README with its figures as the results under ``root`` have them.

    Args:
        text: The README.
        root: The folder of the repository.

    Raises:
        ValueError: If the two comments are not there, once each and in order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"the README must have {BEGIN} and after it {END}, once each")
    folder = root / "benchmarks" / "results"
    found = [read(path) for path in sorted(folder.iterdir()) if any(path.glob("*.json"))]
    ordered = sorted(found, key=lambda results: results.imitated is not None)
    lines = [line for results in ordered for line in _device(results, root)]
    return "\n".join([head + BEGIN, *lines, END + tail])


def _device(results: Results, root: Path) -> Iterator[str]:
    where = results.folder.relative_to(root).as_posix()
    facts = ", ".join(f"{n} {escaped(results.fact(n))}" for n in ("driver", "torch", "commit"))
    told = f"**{escaped(results.name)}**"
    if results.imitated is not None:
        told += f" (every figure is imitated, on {escaped(results.device)})"
    link = f"[report]({where}/report.md)"
    yield from (f"{told}: {facts}, {escaped(results.fact('date'))}; {link}", "")
    if (results.folder / "overview.png").exists():
        yield from (f"![{escaped(results.name)} at a glance]({where}/overview.png)", "")
    for title, table in _tables(results):
        if table.rows:
            stamped = " · ".join(filter(None, (title, results.stamp)))
            yield from (f"{escaped(stamped)}:", "", *table_lines(table), "")


def _tables(results: Results) -> Iterator[tuple[str, Table]]:
    cases = pictures.chosen(list(results.rows("capacity")))
    is_limited = results.imitated is None and results.device.startswith("CPU")
    yield "Largest training batch" + _LIMITS * is_limited, capacity.held(cases)
    yield f"Its accumulation at the fastest size: {_PLANS}", capacity.accumulations(cases)
    yield "A search on real models, median [minimum, maximum] of them", _search(results)
    yield "On top of the plain loop, us per micro-batch", _engine(results)
    yield "An accumulated step in float64, and memory that runs out in training", _exact(results)


def _search(results: Results) -> Table:
    costs = search_cost(results)
    rows = [
        [
            str(row.get("by")),
            cells.text(row.get(LARGEST)),
            cells.text(row.get("do not run")),
            cells.text(row.get("out_of_memory")),
            costs.get(str(row.get("by")), cells.NOTHING),
            cells.text(row.get("unchanged")),
        ]
        for row in results.rows("search", "real models", "together")
    ]
    header = ["by", "finds the largest", "found, but does not run", "out of memory"]
    return Table(header=[*header, "cost in steps", "leaves all as it was"], rows=rows)


def _engine(results: Results) -> Table:
    told = on_top(results)
    models = list(dict.fromkeys(model for model, _ in told))
    names = list(dict.fromkeys(by for _, by in told))
    rows = [[by, *(told.get((model, by), cells.NOTHING) for model in models)] for by in names]
    return Table(header=["by", *models], rows=rows)


def _exact(results: Results) -> Table:
    off, after = gradients(results), survivals(results)
    rows = [
        [by, off.get(by, cells.NOTHING), after.get(by, cells.NOTHING)] for by in _both(off, after)
    ]
    return Table(header=["by", "at most off by", "when memory runs out"], rows=rows)


def _both(*columns: dict[str, str]) -> Sequence[str]:
    return list(dict.fromkeys(name for column in columns for name in column))
