"""The plot of a search, memory over size, and helpers for similar plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from autobatch.files import atomic_file, check_file
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind people can distinguish; shapes differ as well.
ALLOCATED: Final = "#0072B2"
RESERVED: Final = "#56B4E9"
FAILED: Final = "#D55E00"
INK: Final = "#333333"
FAINT: Final = "#999999"
_FAR: Final = 5.0  # A limit this many times the largest peak is written, not drawn.
_REACH: Final = 2.0  # Failures above this many tolerable batches are counted, not drawn.
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_TICKS: Final = 6
_FORMATS: Final = ("png", "svg", "pdf")  # The formats that matplotlib needs nothing else for.
_ENDINGS: Final = ".png, .svg or .pdf"


class PlottedTrial(Protocol):
    """The attributes of a trial that a plot needs."""

    @property
    def size(self) -> int:
        """Examples in each micro-batch."""

    @property
    def fits(self) -> bool:
        """Whether the trial ran within the limit."""

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes allocated at once."""

    @property
    def reserved_bytes(self) -> int | None:
        """The most bytes that the caching allocator held."""


class PlottedSearch(Protocol):
    """The attributes of a search result that a plot needs."""

    @property
    def size(self) -> int:
        """The tolerable batch."""

    @property
    def trials(self) -> Sequence[PlottedTrial]:
        """All trials."""

    @property
    def limit_bytes(self) -> int:
        """The bytes that a step may allocate."""

    @property
    def peak_bytes(self) -> int | None:
        """The peak at the tolerable batch."""


def check_plot(path: str | Path) -> None:
    """Raise unless a plot can be written to ``path``.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the suffix is none of .png, .svg and .pdf, or the file cannot be written.
    """
    path = Path(path)
    new_figure()
    if _format(path) not in _FORMATS:
        raise ValueError(f"plot must name a file that ends in {_ENDINGS}, got {path}")
    check_file(path, "plot")


def memory_over_size(search: PlottedSearch) -> "Figure":
    """Return a plot of all trials: the peaks, the failed sizes and the limit.

    The figure opens no window and leaves the global state of matplotlib unchanged.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    reach = _REACH * search.size
    fitting = [trial for trial in search.trials if trial.fits and trial.peak_bytes is not None]
    failed = [trial.size for trial in search.trials if not trial.fits]
    near = sorted(size for size in failed if size <= reach)
    widest = max([search.size, *(trial.size for trial in fitting), *near])
    tallest = max(
        [0, *(t.peak_bytes or 0 for t in fitting), *(t.reserved_bytes or 0 for t in fitting)]
    )
    _draw_trials(axes, fitting, near, search.limit_bytes)
    is_far = not failed and search.limit_bytes > _FAR * tallest > 0
    _draw_limit(axes, search.limit_bytes, is_far=is_far)
    scale(axes, widest, tallest if is_far else max(tallest, search.limit_bytes))
    draw_tolerable(axes, search.size, search.peak_bytes)
    _draw_beyond(axes, len(failed) - len(near), max(failed, default=0))
    draw_legend(axes)
    return figure


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure to a file, completely or not at all.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If ``check_plot`` refuses the path.
    """
    path = Path(path)
    check_plot(path)
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, format=_format(path), dpi="figure", facecolor="white")


def _format(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def new_figure() -> "Figure":
    """Return an empty figure without a window, independent of the user's matplotlib style.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        missing = error.name
    else:
        # Set here, because the user's own style may be dark.
        return Figure(figsize=(8, 4.5), dpi=100, layout="constrained", facecolor="white")
    raise ImportError(
        f"a plot needs {missing}, which is not installed: pip install 'torch-autobatch[plot]'",
        name=missing,
    )


def _draw_trials(
    axes: "Axes", fitting: Sequence[PlottedTrial], failed: Sequence[int], limit_bytes: int
) -> None:
    cached = [(t.size, t.reserved_bytes) for t in fitting if t.reserved_bytes is not None]
    if cached:
        draw_points(axes, cached, RESERVED, "reserved by the allocator", hollow=True)
    peaks = [(trial.size, trial.peak_bytes or 0) for trial in fitting]
    draw_points(axes, peaks, ALLOCATED, "fits: peak allocated")
    if failed:
        axes.plot(
            failed,
            [limit_bytes] * len(failed),
            *("x",),
            color=FAILED,
            markersize=9,
            markeredgewidth=2.2,
            label="failed",
            zorder=3,  # Below the points: a failed size may touch the tolerable batch.
        )


def draw_points(
    axes: "Axes",
    points: Sequence[tuple[int, int]],
    color: str,
    name: str,
    *,
    marker: str = "o",
    hollow: bool = False,
) -> None:
    """Draw points (size, bytes) with an entry in the legend; hollow points lie below the others."""
    axes.plot(
        [size for size, _ in points],
        [height for _, height in points],
        marker,
        ls="",
        color=color,
        markerfacecolor="white" if hollow else color,
        markersize=7,
        label=name,
        clip_on=False,  # Size 1 of a million touches the axis.
        zorder=3 if hollow else 4,
    )


def write_at(axes: "Axes", height: int, text: str, *, below: bool = False) -> None:
    """Write text at the left end of a horizontal line, above or below the line."""
    axes.annotate(
        text,
        (0.01, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, -4 if below else 4),
        textcoords="offset points",
        va="top" if below else "bottom",
        color=INK,
        bbox={
            "facecolor": "white",
            "edgecolor": "none",
            "pad": 1,
        },  # Hides the grid behind the text.
    )


def _draw_limit(axes: "Axes", limit_bytes: int, *, is_far: bool) -> None:
    """Draw a line at the limit; write only its number if it is far above all points."""
    text = f"limit {format_bytes(limit_bytes)}"
    if is_far:
        axes.text(0.01, 0.97, f"↑ {text}", transform=axes.transAxes, va="top", color=INK)
        return
    axes.axhline(limit_bytes, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
    write_at(axes, limit_bytes, text)


def scale(axes: "Axes", widest: int, tallest: int) -> None:
    """Scale both axes from 0: sizes in round steps, bytes in powers of two."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

    step = 2 ** math.ceil(math.log2(max(tallest, 1) / _TICKS))
    power = min(int(math.log2(max(tallest, 1)) / 10), len(_UNITS) - 1)
    axes.set_xlim(0, 1.06 * widest)
    axes.set_ylim(0, 1.14 * max(tallest, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.yaxis.set_major_locator(MultipleLocator(step))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{n / 1024**power:g} {_UNITS[power]}" if n else "0")
    )
    axes.set_xlabel("size: examples in a micro-batch", color=INK)
    axes.set_facecolor("white")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def draw_tolerable(axes: "Axes", size: int, peak_bytes: int | None) -> None:
    """Draw a vertical line at the tolerable batch, and write its name beside the line."""
    peak_bytes = peak_bytes or 0
    peak = f"\npeak {format_bytes(peak_bytes)}" if peak_bytes else ""
    axes.vlines(size, 0, peak_bytes, color=ALLOCATED, linewidth=1, linestyle=":", zorder=1)
    foot, top = axes.get_ylim()
    side = 1 if size < sum(axes.get_xlim()) / 2 else -1
    axes.annotate(
        f"tolerable batch {size:,}{peak}",
        (size, peak_bytes if peak_bytes < top / 4 else foot),
        xytext=(6 * side, 10),
        textcoords="offset points",
        ha="left" if side == 1 else "right",
        va="bottom",
        color=ALLOCATED,
        fontweight="bold",
    )


def _draw_beyond(axes: "Axes", count: int, largest: int) -> None:
    if count:
        axes.annotate(
            f"{count} more failed, up to {largest:,} →",
            (1, 1),
            xycoords="axes fraction",
            ha="right",
            va="top",
            color=FAILED,
        )


def draw_legend(axes: "Axes") -> None:
    """Draw the legend above the axes, where no point can lie."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3,
        frameon=False,
        borderaxespad=0.2,
        handletextpad=0.3,
        labelcolor=INK,
    )
