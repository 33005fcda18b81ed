"""What the others did beside autobatch on a device, a line for each of them."""

import statistics
from typing import Final

from benchmarks.harness.records import Fields
from benchmarks.reporting import cells
from benchmarks.reporting.results import Results

LARGEST: Final = "found the largest"
ON_TOP: Final = "on top of plain, us per micro-batch"
_COST: Final = "cost in seconds"


def search_cost(results: Results) -> dict[str, str]:
    """Steps that a search costs on real models, by searcher: median [minimum, maximum] of them.

    Only searches count whose find runs.
    """
    costs: dict[str, list[float]] = {}
    for row in results.rows("search", "real models"):
        own = costs.setdefault(str(row.get("by")), [])
        cost = cells.number(row.get(_COST))
        if row.get("runs") is True and cost is not None:
            own.append(cost)
    return {by: _spread(own) for by, own in costs.items()}


def _spread(values: list[float]) -> str:
    if not values:
        return cells.NOTHING
    ends = {"minimum": min(values), "maximum": max(values)}
    return cells.text({"median": statistics.median(values), **ends})


def on_top(results: Results) -> dict[tuple[str, str], str]:
    """What a micro-batch costs on top of the plain loop, by model and engine."""
    rows = results.rows("engine", "a window of micro-batches")
    return {
        (str(row.get("model")), str(row.get("by"))): cells.cell(row, ON_TOP)
        for row in rows
        if row.get("by") != "plain"
    }


def gradients(results: Results) -> dict[str, str]:
    """The most that an update is off, by engine."""
    rows = results.rows("exactness", "relative difference")
    return {str(row.get("by")): _worst(row) for row in rows}


def _worst(row: Fields) -> str:
    worst = worst_update(row)
    if worst is not None:
        return f"{worst:.1g}"
    return "not installed" if "not installed" in row.values() else cells.NOTHING


def worst_update(row: Fields) -> float | None:
    """Return the largest difference in a row of the table of gradients."""
    return max((value for value in row.values() if isinstance(value, float)), default=None)


def survivals(results: Results) -> dict[str, str]:
    """What became of trainings in which memory ran out, by engine."""
    found: dict[str, list[Fields]] = {}
    for row in results.rows("exactness", "memory runs out"):
        found.setdefault(str(row.get("by")), []).append(row)
    return {by: _survival(rows) for by, rows in found.items()}


def _survival(rows: list[Fields]) -> str:
    if any(row.get("outcome") == "not installed" for row in rows):
        return "not installed"
    gone_on = [row for row in rows if row.get("outcome") == "goes on"]
    off = [value for row in gone_on if (value := cells.number(row.get("parameters off by")))]
    told = f"goes on in {len(gone_on)} of {len(rows)}"
    return f"{told}, at most {max(off):.1g} off" if off else told
