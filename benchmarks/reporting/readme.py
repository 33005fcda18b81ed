"""The figures of the README and of docs/benchmarks.md, from the committed results."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from benchmarks.harness.records import Fields
from benchmarks.reporting import capacity, cells, pictures
from benchmarks.reporting.render import Table, render
from benchmarks.reporting.report import key_figures
from benchmarks.reporting.results import Results, read
from benchmarks.reporting.side_by_side import (
    LARGEST,
    gradients,
    on_top,
    search_cost,
    survivals,
)

BEGIN: Final = "<!-- benchmarks: written by python -m benchmarks readme -->"
END: Final = "<!-- /benchmarks -->"
_KEY_FIGURES: Final = 3
_LIMITS: Final = ", each model under six times its weights and 512 MiB"
_PLANS: Final = "micro-batches x size, where timed the examples per second, and of the best size's"


def updated(text: str, root: Path) -> str:
    """Return the README with three figures and the picture of the first measured device.

    Args:
        text: The README.
        root: The folder of the repository.

    Raises:
        ValueError: If the two comments are not in the README, once each and in order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"the README must have {BEGIN} and after it {END}, once each")
    first = next((one for one in _devices(root) if one.imitated is None), None)
    figures = [] if first is None else list(islice(key_figures(first), _KEY_FIGURES))
    data = {"device": first, "figures": figures, "folder": _folder(first, root)}
    return f"{head}{BEGIN}\n{render('readme.md.j2', data)}{END}{tail}"


def tables_page(root: Path) -> str:
    """Return docs/benchmarks.md: the tables of every device under ``root``, imitated ones last."""
    devices = [
        {
            "results": results,
            "folder": _folder(results, root),
            "tables": [(title, table) for title, table in _tables(results) if table.rows],
        }
        for results in _devices(root)
    ]
    return render("benchmarks.md.j2", {"devices": devices})


def _devices(root: Path) -> list[Results]:
    """Return the committed results: GPUs first, imitated cards last."""
    folders = sorted((root / "benchmarks" / "results").iterdir())
    found = [read(path) for path in folders if any(path.glob("*.json"))]
    return sorted(found, key=lambda one: (one.imitated is not None, one.device.startswith("CPU")))


def _folder(results: Results | None, root: Path) -> Mapping[str, object]:
    """Return where a device's files are, and whether there is a picture among them."""
    if results is None:
        return {}
    has_picture = (results.folder / "overview.png").exists()
    return {"path": results.folder.relative_to(root).as_posix(), "has_picture": has_picture}


def _tables(results: Results) -> Iterator[tuple[str, Table]]:
    cases = pictures.chosen(results.rows("capacity"))
    is_limited = results.imitated is None and results.device.startswith("CPU")
    yield "Largest training batch" + _LIMITS * is_limited, capacity.held(cases)
    yield f"Its accumulation at the fastest size: {_PLANS}", capacity.accumulations(cases)
    yield "A search on real models, median [minimum, maximum] of them", _search(results)
    yield "On top of the plain loop, us per micro-batch", _engine(results)
    yield "An accumulated step in float64, and memory that runs out in training", _exact(results)


def _search(results: Results) -> Table:
    costs = search_cost(results)

    def row(of: Fields) -> list[str]:
        by = str(of.get("by"))
        counts = [cells.text(of.get(name)) for name in (LARGEST, "do not run", "out_of_memory")]
        return [by, *counts, costs.get(by, cells.NOTHING), cells.text(of.get("unchanged"))]

    header = ["by", "finds the largest", "found, but does not run", "out of memory"]
    rows = [row(of) for of in results.rows("search", "real models", "together")]
    return Table([*header, "cost in steps", "leaves all as it was"], rows)


def _engine(results: Results) -> Table:
    cost = on_top(results)
    models = list(dict.fromkeys(model for model, _ in cost))
    names = dict.fromkeys(by for _, by in cost)
    rows = [[by, *(cost.get((model, by), cells.NOTHING) for model in models)] for by in names]
    return Table(["by", *models], rows)


def _exact(results: Results) -> Table:
    off, after = gradients(results), survivals(results)
    rows = [
        [by, off.get(by, cells.NOTHING), after.get(by, cells.NOTHING)] for by in {**off, **after}
    ]
    return Table(["by", "at most off by", "when memory runs out"], rows)
