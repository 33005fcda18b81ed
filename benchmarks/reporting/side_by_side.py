"""What autobatch and the other libraries did on one device, a cell for each."""

import statistics
from typing import Final

from benchmarks.harness.records import Fields
from benchmarks.reporting import cells
from benchmarks.reporting.results import Results

LARGEST: Final = "found the largest"
ON_TOP: Final = "on top of plain, us per micro-batch"
_NOT_INSTALLED: Final = "not installed"


def search_cost(results: Results) -> dict[str, str]:
    """Return what a search costs in steps, by searcher: median [minimum, maximum] of real models.

    Only searches count that found a size that runs.
    """
    costs: dict[str, list[float]] = {}
    for row in results.rows("search", "real models"):
        own = costs.setdefault(str(row.get("by")), [])
        cost = cells.number(row.get("cost in seconds"))
        if row.get("runs") is True and cost is not None:
            own.append(cost)
    return {by: _spread(own) for by, own in costs.items()}


def _spread(values: list[float]) -> str:
    if not values:
        return cells.NOTHING
    ends = {"minimum": min(values), "maximum": max(values)}
    return cells.text({"median": statistics.median(values), **ends})


def on_top(results: Results) -> dict[tuple[str, ...], str]:
    """Return what a micro-batch costs on top of the plain loop, by model and engine."""
    rows = results.rows("engine", "a window of micro-batches")
    return {
        (str(row.get("model")), str(row.get("by"))): cells.cell(row, ON_TOP)
        for row in rows
        if row.get("by") != "plain"
    }


def gradients(results: Results) -> dict[str, str]:
    """Return the largest difference of an update, by engine."""
    return {
        str(row.get("by")): _worst(row) for row in results.rows("exactness", "relative difference")
    }


def _worst(row: Fields) -> str:
    worst = worst_update(row)
    if worst is not None:
        return f"{worst:.1g}"
    return _NOT_INSTALLED if _NOT_INSTALLED in row.values() else cells.NOTHING


def worst_update(row: Fields) -> float | None:
    """Return the largest difference in a row of the table of gradients."""
    return max((value for value in row.values() if isinstance(value, float)), default=None)


def survivals(results: Results) -> dict[str, str]:
    """Return how trainings ended in which memory ran out, by engine."""
    found: dict[str, list[Fields]] = {}
    for row in results.rows("exactness", "memory runs out"):
        found.setdefault(str(row.get("by")), []).append(row)
    return {by: _survival(rows) for by, rows in found.items()}


def _survival(rows: list[Fields]) -> str:
    if any(row.get("outcome") == _NOT_INSTALLED for row in rows):
        return _NOT_INSTALLED
    survived = [row for row in rows if row.get("outcome") == "goes on"]
    off = [value for row in survived if (value := cells.number(row.get("parameters off by")))]
    text = f"goes on in {len(survived)} of {len(rows)}"
    return f"{text}, at most {max(off):.1g} off" if off else text
