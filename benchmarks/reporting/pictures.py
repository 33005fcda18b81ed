"""Draw results, where matplotlib is installed."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

from benchmarks.harness.records import Fields
from benchmarks.reporting import cells
from benchmarks.reporting.capacity import measured, setting
from benchmarks.reporting.cells import inner, inners

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# On a page these colours become CSS variables, so that the page can be light or dark.
_INK, _FAINT, _GRID, _BAR = "#1f2328", "#656d76", "#e6e6e6", "#a9b1ba"
_COLOURS: Final = ("#0072b2", "#c2410c", "#00805e", "#8250a0")
_VARIABLES: Final = {
    _INK: "--ink",
    _FAINT: "--faint",
    _GRID: "--grid",
    _BAR: "--bar",
    **dict(zip(_COLOURS, ("--first", "--second", "--third", "--fourth"), strict=True)),
}
_MARKERS: Final = "osD^"
_SIZES: Final = (6.5, 5.0, 3.5, 2.5)  # A smaller marker does not hide the one below it.
_LOOKS: Final = tuple(zip(_COLOURS, _MARKERS, _SIZES, strict=True))
_ACROSS: Final = 3
_OURS: Final = "autobatch"
_LEAST_SCALE: Final = 0.75  # Below it, letters are too small to be read.
_REACH: Final = 15.0  # Percent to each side, at least.

Draw = Callable[["Axes"], None]


def available() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401  # A test of presence.
    except ModuleNotFoundError:
        return False
    return True


def _styled() -> AbstractContextManager[None]:
    """Set a style that is independent of the user's, for one block."""
    import matplotlib as mpl

    return mpl.rc_context(
        {
            "svg.fonttype": "none",  # Text stays text, which can be selected and searched.
            "svg.hashsalt": "autobatch",
            "text.parse_math": False,  # A name may contain a dollar sign.
            "font.size": 9.0,
            "axes.titlesize": 9.5,
            "axes.edgecolor": _FAINT,
            "axes.labelcolor": _FAINT,
            "xtick.color": _FAINT,
            "ytick.color": _FAINT,
            "text.color": _INK,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": _GRID,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def svg(panels: Mapping[str, Draw], stamp: str) -> str:
    """Draw panels, by title, as an SVG element for a page."""
    target = io.StringIO()
    with _styled():
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _figure(panels, stamp).savefig(target, format="svg", transparent=True, metadata=none)
    return _inline(target.getvalue())


def png(panels: Mapping[str, Draw], stamp: str) -> bytes:
    """Draw panels, by title, as a PNG image for the README."""
    target = io.BytesIO()
    with _styled():
        none = {"Software": None}
        _figure(panels, stamp).savefig(
            target, format="png", dpi=130, facecolor="white", metadata=none
        )
    return target.getvalue()


def _inline(drawn: str) -> str:
    """Return the SVG element alone, in the page's colours and without references to other files."""
    element = drawn[drawn.index("<svg") :]
    element = re.sub(r' xmlns(:xlink)?="[^"]*"', "", element)
    points = float(element.partition(' width="')[2].partition("pt")[0])
    least = f'<svg style="min-width: {_LEAST_SCALE * points:.0f}pt"'  # A narrow page scrolls.
    element = element.replace("<svg", least, 1)
    element = re.sub(
        r'<g id="[a-z_]+\d+">', "<g>", element
    )  # Other drawings on the page use the same ids.
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, f"var({variable})")
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit; font-family: inherit", element)


def _figure(panels: Mapping[str, Draw], stamp: str) -> "Figure":
    from matplotlib.figure import Figure

    across = 2 if len(panels) == 4 else min(_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    width = {1: 5.8, 2: 5.4}.get(across, 3.9)
    figure = Figure(figsize=(width * across, 2.9 * down + 0.3 * bool(stamp)), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes, (title, draw) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(title, loc="left", color=_INK)
        draw(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    if stamp:
        colour = _COLOURS[1] if stamp.startswith(("imitated", "quick")) else _FAINT
        figure.supxlabel(stamp, color=colour, fontsize=9)
    return figure


def memory(cases: Sequence[Fields]) -> dict[str, Draw]:
    """Return a panel of memory over size, with the limit, for each model."""
    return {model: _memory(own) for model, own in _by_model(measured(cases)).items()}


def speed(cases: Sequence[Fields]) -> dict[str, Draw]:
    """Return a panel of examples per second over size for each model."""
    timed = [case for case in measured(cases) if inners(case, "sizes")]
    return {model: _speed(own) for model, own in _by_model(timed).items()}


def chosen(cases: Sequence[Fields]) -> list[Fields]:
    """Return the cases that are drawn."""
    return [case for own in _by_model(cases).values() for case in own]


def _by_model(cases: Sequence[Fields]) -> dict[str, list[Fields]]:
    """Return trainings with the optimizer that was measured first; inference if there is none."""
    found: dict[str, list[Fields]] = {}
    for case in cases:
        found.setdefault(str(case.get("model")), []).append(case)
    return {model: _alike(own) for model, own in found.items()}


def _alike(cases: Sequence[Fields]) -> list[Fields]:
    trained = [case for case in cases if case.get("mode") == "train"] or list(cases)
    return [case for case in trained if case.get("optimizer") == trained[0].get("optimizer")]


def _memory(cases: Sequence[Fields]) -> Draw:
    def draw(axes: "Axes") -> None:
        limit_bytes = max((cells.number(case.get("limit_bytes")) or 0 for case in cases), default=0)
        unit, name = (2**30, "GiB") if limit_bytes >= 2**32 else (2**20, "MiB")
        limit = limit_bytes / unit
        for case, (colour, marker, ms) in zip(cases, _LOOKS, strict=False):
            tried = [(_size(one), one.get("passed"), _peak(one)) for one in inners(case, "memory")]
            ran = sorted((size, peak / unit) for size, passed, peak in tried if passed and peak)
            failed = sorted(size for size, passed, _ in tried if not passed)
            x, y = [size for size, _ in ran], [peak for _, peak in ran]
            axes.plot(x, y, marker, ls="-", lw=1, ms=ms, color=colour, label=setting(case))
            axes.plot(failed, [limit] * len(failed), "x", color=colour, ms=6, mew=1.6)
        if limit:
            _draw_limit(axes, limit)
        axes.set_xlim(0)
        axes.set_xlabel("size")
        axes.set_ylabel(f"peak allocated, {name}")
        axes.legend(fontsize=8, loc="lower right")

    return draw


def _size(row: Fields) -> int:
    return cells.whole(row.get("size")) or 0


def _peak(row: Fields) -> float:
    return cells.number(row.get("peak_bytes")) or 0.0


def _draw_limit(axes: "Axes", limit: float) -> None:
    axes.axhline(limit, color=_INK, lw=1, ls=(0, (5, 3)))
    place = axes.get_yaxis_transform()
    offset = "offset points"
    axes.annotate("limit", (0.02, limit), (0, 2), xycoords=place, textcoords=offset, fontsize=8)
    axes.set_ylim(0, 1.15 * limit)


def _speed(cases: Sequence[Fields]) -> Draw:
    def draw(axes: "Axes") -> None:
        for case, (colour, marker, ms) in zip(cases, _LOOKS, strict=False):
            timed = sorted(inners(case, "sizes"), key=_size)
            x = [_size(one) for one in timed]
            rates = [inner(one, "examples_per_second") for one in timed]
            y, low, high = (
                [cells.number(rate.get(key)) or 0.0 for rate in rates]
                for key in ("median", "minimum", "maximum")
            )
            label = setting(case)
            axes.plot(x, y, marker, ls="-", lw=1, ms=ms, color=colour, label=label)
            axes.vlines(x, low, high, color=colour, lw=1.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:,g}")
        axes.set_ylim(0)
        axes.set_xlabel("size")
        axes.set_ylabel("examples per second")
        axes.legend(fontsize=8, loc="lower right")

    return draw


def bars(
    rows: Sequence[Fields], name: str, unit: str, *, beside: str = "", words: str = ""
) -> Draw:
    """Return a bar for each ``by``, with its value and another column; autobatch has a colour."""
    known = [(row, value) for row in rows if (value := _finite(row, name)) is not None]

    def draw(axes: "Axes") -> None:
        names = [str(row.get("by")) for row, _ in known]
        values = [value for _, value in known]
        colours = [_COLOURS[0] if by == _OURS else _BAR for by in names]
        ranges = _quartiles([row for row, _ in known], name)
        uppers = {place: [high] for place, _, high in zip(*ranges, strict=True)}
        axes.barh(names, values, color=colours, height=0.6)
        for place, (row, value) in enumerate(known):
            label = cells.text(value) + (f", {words} {cells.text(row[beside])}" if beside else "")
            where = (max(value, 0.0, *uppers.get(place, [])), place)
            axes.annotate(label, where, (4, 0), textcoords="offset points", va="center")
        axes.hlines(*ranges, color=_INK, lw=1.2)
        axes.invert_yaxis()
        ends = [0.0, *values, *ranges[1], *ranges[2]]
        axes.set_xlim(1.1 * min(ends), (1.6 if beside else 1.25) * max(ends) or 1)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(unit)

    return draw


def _quartiles(rows: Sequence[Fields], name: str) -> tuple[list[int], list[float], list[float]]:
    """Return the indices, lower and upper quartiles of the rows that have quartiles."""
    found = [(place, inner(row, "quartiles").get(name)) for place, row in enumerate(rows)]
    known = [(place, ends) for place, ends in found if isinstance(ends, list) and len(ends) == 2]
    places, ends = [place for place, _ in known], [pair for _, pair in known]
    return places, [low for low, _ in ends], [high for _, high in ends]


def _finite(row: Fields, name: str) -> float | None:
    value = cells.number(row.get(name))
    return value if value is not None and math.isfinite(value) else None


def agreement(pairs: Mapping[str, Sequence[tuple[float, float]]], unit: str) -> Draw:
    """Return a panel of prediction errors in percent over measured values, with lines at 10 %.

    Args:
        pairs: The measured and predicted values by name; the first name is drawn on top.
        unit: The unit of the values.
    """

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator

        for share, width, style in ((0, 1, "-"), (-10, 0.8, ":"), (10, 0.8, ":")):
            axes.axhline(share, color=_FAINT if share else _INK, lw=width, ls=style)
        named = zip(pairs.items(), _COLOURS, _MARKERS, strict=False)
        farthest = 0.0
        for place, ((name, points), colour, marker) in enumerate(named):
            known = [value for value, _ in points]
            off = [100 * (predicted / value - 1) for value, predicted in points]
            farthest = max(farthest, *map(abs, off))
            axes.plot(known, off, marker, ms=4, color=colour, zorder=4 - place, label=name)
        reach = max(_REACH, 1.2 * farthest)
        axes.set(xscale="log", ylim=(-reach, reach))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set_xlabel(f"measured, {unit}")
        axes.set_ylabel("predicted over measured, %")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.0f}" if value else "0")
        axes.legend(fontsize=8, loc="upper left", ncols=2)

    return draw
