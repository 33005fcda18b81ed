"""A figure of the predicted peak over the batch, with the limits of the GPUs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

from autobatch.prediction.gpu_catalogue import Gpu, possible_bytes
from autobatch.results.plot import (
    ALLOCATED,
    FAILED,
    FAINT,
    INK,
    RESERVED,
    draw_legend,
    draw_points,
    draw_tolerable,
    new_figure,
    scale,
    write_at,
)
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEYOND: Final = 1.12  # The curve ends at this multiple of the largest batch.
_NEAR: Final = 0.05  # Limits whose distance is less than this part of the height share a label.
_NAMED: Final = 2  # The number of GPUs that a label names.
_FAR: Final = 4.0  # Scales are logarithmic if the largest limit is so many times the smallest.
_SAME: Final = 1.01  # Curves whose ends differ by less than a percent are drawn as one.
_DASHES: Final = (0, (5, 3))
_STYLES: Final = ("-", ":")


class Predicted(Protocol):
    """A prediction for one GPU, as far as the figure needs it."""

    @property
    def gpu(self) -> Gpu:
        """The GPU."""

    @property
    def tolerable(self) -> int:
        """The largest batch that fits safely."""

    @property
    def largest(self) -> int:
        """The largest batch that may fit."""

    @property
    def safe_bytes(self) -> int:
        """The most bytes that the allocator may reserve at the tolerable batch."""

    @property
    def size(self) -> int:
        """The batch of ``peak_reserved_bytes``."""

    @property
    def peak_reserved_bytes(self) -> int:
        """The peak of the bytes that the allocator reserves at ``size``."""

    def peak_bytes(self, batch: int) -> int:
        """Return the peak of allocated bytes at a batch."""

    def curve(self, widest: int) -> list[tuple[int, int]]:
        """Return pairs of a batch and its peak in bytes, up to ``widest`` examples."""


def peak_over_batch(predictions: Sequence[Predicted]) -> "Figure":
    """Return a figure of one GPU with its two limits, or of several with their safe limits.

    Args:
        predictions: The predictions of the same step for each GPU.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    widest = max(1, *(prediction.largest for prediction in predictions))
    limits = [possible_bytes(prediction.gpu) for prediction in predictions]
    curves = _curves(predictions, round(widest * _BEYOND) + 1)
    for style, (name, curve) in zip(_STYLES, curves.items(), strict=False):
        batches, peaks = zip(*curve, strict=True)
        axes.plot(batches, peaks, color=ALLOCATED, lw=2, linestyle=style, label=name, zorder=3)
    scale(axes, widest, max(limits))
    if len(predictions) == 1:
        _draw_limits(axes, predictions[0])
    else:
        if max(limits) > _FAR * min(limits):
            _scale_logarithmically(axes, predictions)
        _draw_gpus(axes, predictions)
    draw_legend(axes)
    return figure


def _curves(predictions: Sequence[Predicted], widest: int) -> dict[str, list[tuple[int, int]]]:
    """Return one curve for all GPUs, or two if flash attention changes the peak, by label."""
    by_kernel = {prediction.gpu.flash: prediction.curve(widest) for prediction in predictions}
    ends = [curve[-1][1] for curve in by_kernel.values()]
    if max(ends) < _SAME * min(ends):
        return {"predicted peak allocated": next(iter(by_kernel.values()))}
    names = {True: "peak with flash attention", False: "without"}
    return {names[flash]: by_kernel[flash] for flash in (True, False)}


def _scale_logarithmically(axes: "Axes", predictions: Sequence[Predicted]) -> None:
    """Make both axes logarithmic, with bytes in powers of two, so that small cards lie apart."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    fitting = [p for p in predictions if p.tolerable]
    least = min((p.safe_bytes for p in fitting), default=1)
    most = max(p.safe_bytes for p in predictions)
    for axis in (axes.xaxis, axes.yaxis):
        written = axis.get_major_formatter()  # A new scale would replace it by powers of ten.
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        axis.set_major_formatter(written)
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_locator(FixedLocator([2**power for power in range(20, 50)]))
    # The names of the cards need the room at the left.
    axes.set_xlim(min((p.tolerable for p in fitting), default=1) / 16)
    axes.set_ylim(least / 1.5, most * 1.3)


def _draw_limits(axes: "Axes", prediction: Predicted) -> None:
    """Draw the safe limit, the largest limit, and the batches that they allow."""
    gpu, safe = prediction.gpu, prediction.safe_bytes
    possible = possible_bytes(gpu)
    axes.axhspan(safe, possible, color=RESERVED, alpha=0.25, linewidth=0, zorder=1)
    axes.axhline(safe, color=INK, linewidth=1.2, linestyle=_DASHES, zorder=2)
    axes.axhline(possible, color=INK, linewidth=0.8, zorder=2)
    write_at(axes, safe, f"{gpu.name}: safe limit {format_bytes(safe)}", below=True)
    write_at(axes, possible, f"at most {format_bytes(possible)}")
    reserved = (prediction.size, prediction.peak_reserved_bytes)
    draw_points(axes, [reserved], RESERVED, "reserved by the allocator", hollow=True)
    for batch, marker, color, name in (
        (prediction.largest, "D", FAILED, f"larger than {prediction.largest:,} runs out"),
        (prediction.tolerable, "o", ALLOCATED, "tolerable batch"),
    ):
        point = (batch, prediction.peak_bytes(max(batch, 1)))
        draw_points(axes, [point], color, name, marker=marker)
    draw_tolerable(axes, prediction.tolerable, prediction.peak_bytes(max(prediction.tolerable, 1)))


def _draw_gpus(axes: "Axes", predictions: Sequence[Predicted]) -> None:
    """Draw each GPU's safe limit up to its tolerable batch. Close limits share a label."""
    fitting = sorted((p for p in predictions if p.tolerable), key=lambda p: p.safe_bytes)
    for prediction in fitting:
        axes.hlines(
            prediction.safe_bytes,
            axes.get_xlim()[0],
            prediction.tolerable,
            color=FAINT,
            linewidth=0.8,
            linestyle=_DASHES,
            zorder=2,
        )
    axes.plot(
        [prediction.tolerable for prediction in fitting],
        [prediction.safe_bytes for prediction in fitting],
        *("o",),
        color=FAILED,
        markersize=5,
        label="tolerable batch, at the safe limit",
        clip_on=False,
        zorder=4,
    )
    groups: list[list[Predicted]] = []
    for prediction in fitting:
        if groups and _height(axes, prediction) - _height(axes, groups[-1][0]) < _NEAR:
            groups[-1].append(prediction)
        else:
            groups.append([prediction])
    for group in groups:
        _name(axes, group)


def _height(axes: "Axes", prediction: Predicted) -> float:
    """Return the height of the GPU's limit in the figure: 0 at the bottom, 1 at the top."""
    _, high = axes.transData.transform((1, prediction.safe_bytes))
    return float(axes.transAxes.inverted().transform((0, high))[1])


def _name(axes: "Axes", group: Sequence[Predicted]) -> None:
    """Write a group's label at the beginning of its lowest line."""
    axes.annotate(
        _label(group),
        (0.01, group[0].safe_bytes),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 2),
        textcoords="offset points",
        va="bottom",
        color=INK,
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        zorder=5,
    )


def _label(group: Sequence[Predicted]) -> str:
    """Return a label such as ``"RTX 3090, A10G + 2: 310 to 330"``."""
    names = ", ".join(prediction.gpu.name for prediction in group[:_NAMED])
    more = f" + {len(group) - _NAMED}" if len(group) > _NAMED else ""
    sizes = sorted({prediction.tolerable for prediction in group})
    return f"{names}{more}: {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
