"""The values of result files, as text for people."""

from collections.abc import Iterable, Mapping
from typing import Final

from autobatch.units import format_bytes
from benchmarks.harness.records import Fields

NOTHING: Final = "-"
_NEVER_SHOWN: Final = ("table", "quartiles", "forwards")


def number(value: object) -> float | None:
    """Return a number, or the median of samples; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("median")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def whole(value: object) -> int | None:
    """Return an integer, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def inner(row: Fields, name: str) -> Fields:
    """Return a field that holds fields; no fields where it is null."""
    value = row.get(name)
    return value if isinstance(value, Mapping) else {}


def inners(row: Fields, name: str) -> list[Fields]:
    """Return a field that holds a list of fields; an empty list where it is null."""
    value = row.get(name)
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def text(value: object) -> str:
    """Return numbers with three figures, samples as ``median [minimum, maximum]``."""
    if value is None or value in ("-", ""):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        is_long = isinstance(value, int) or abs(value) >= 1000
        return f"{value:,.0f}" if is_long else f"{value:.3g}"
    if isinstance(value, Mapping):
        middle, low, high = (
            text(number(value.get(key))) for key in ("median", "minimum", "maximum")
        )
        return f"{middle} [{low}, {high}]"
    return str(value)


def size(value: object) -> str:
    """Return bytes in the unit that suits them."""
    count = number(value)
    return NOTHING if count is None else format_bytes(int(count))


def percent(value: object) -> str:
    """Return a fraction in percent."""
    fraction = number(value)
    return NOTHING if fraction is None else f"{100 * fraction:.1f} %"


def columns(rows: Iterable[Fields]) -> list[str]:
    """Return the names of the columns that can be shown and are not empty in every row."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row if name not in _NEVER_SHOWN)
    return [name for name in names if any(_can_be_shown(row.get(name)) for row in rows)]


def _can_be_shown(value: object) -> bool:
    if isinstance(value, Mapping):
        return "median" in value
    return not isinstance(value, list) and value not in (None, "")


def cell(row: Fields, name: str) -> str:
    """Return one cell; samples with their quartiles after the median, where the row has them."""
    shown, pair = text(row.get(name)), inner(row, "quartiles").get(name)
    if not isinstance(row.get(name), Mapping) or not isinstance(pair, list) or len(pair) != 2:
        return shown
    return shown.replace(" [", f" ({text(pair[0])} to {text(pair[1])}) [", 1)
