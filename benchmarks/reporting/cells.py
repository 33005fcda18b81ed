"""A value of a result file, as people read it."""

from collections.abc import Iterable, Mapping
from typing import Final

from autobatch.units import format_bytes
from benchmarks.harness.records import Fields

_HIDDEN: Final = ("table", "quartiles", "forwards")
NOTHING: Final = "-"


def number(value: object) -> float | None:
    """Return a number, or the median of samples; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("median")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def whole(value: object) -> int | None:
    """Return an integer, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def text(value: object) -> str:
    """Return numbers at three figures, samples as ``median [minimum, maximum]``."""
    if value is None or value in ("-", ""):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _number(value)
    if isinstance(value, Mapping):
        parts = [number(value.get(key)) for key in ("median", "minimum", "maximum")]
        middle, low, high = (NOTHING if part is None else _number(part) for part in parts)
        return f"{middle} [{low}, {high}]"
    return str(value)


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def size(value: object) -> str:
    """Return bytes in the unit that suits them."""
    count = number(value)
    return NOTHING if count is None else format_bytes(int(count))


def percent(value: object) -> str:
    """Return a share in percent."""
    share = number(value)
    return NOTHING if share is None else f"{100 * share:.1f} %"


def columns(rows: Iterable[Fields]) -> list[str]:
    """Return the names of the columns that can be shown and say something."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return [
        name for name in names if name not in _HIDDEN and any(_shown(row, name) for row in rows)
    ]


def _shown(row: Fields, name: str) -> bool:
    value = row.get(name)
    if isinstance(value, Mapping):
        return "median" in value
    return not isinstance(value, list) and value not in (None, "")


def cell(row: Fields, name: str) -> str:
    """Return one cell; with the quartiles between median and extremes, where they are written."""
    value = row.get(name)
    told, quartiles = text(value), row.get("quartiles")
    if not isinstance(value, Mapping) or not isinstance(quartiles, Mapping):
        return told
    pair = quartiles.get(name)
    if not isinstance(pair, list) or len(pair) != 2:
        return told
    low, high = (text(end) for end in pair)
    return told.replace(" [", f" ({low} to {high}) [", 1)
