"""The picture of the peak over the batch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import pytest
from matplotlib.figure import Figure
from test_plot import legend, words

from autobatch.prediction.gpu_catalogue import CATALOGUE, Gpu, find_gpu, possible_bytes, safe_bytes
from autobatch.prediction.plot import peak_over_batch
from autobatch.units import format_bytes

GIB = 2**30


@dataclass(frozen=True)
class Linear:
    """A gigabyte, and so many bytes for each example; all that is allocated is what is reserved."""

    gpu: Gpu
    slope: int = GIB // 10

    @property
    def tolerable(self) -> int:
        return max((self.safe_bytes - GIB) // self.slope, 0)

    @property
    def largest(self) -> int:
        return max((possible_bytes(self.gpu) - GIB) // self.slope, 0)

    @property
    def safe_bytes(self) -> int:
        return safe_bytes(self.gpu)

    @property
    def size(self) -> int:
        return max(self.tolerable, 1)

    @property
    def peak_reserved_bytes(self) -> int:
        return self.peak_bytes(self.size)

    def peak_bytes(self, batch: int) -> int:
        return GIB + self.slope * batch

    def curve(self, widest: int) -> list[tuple[int, int]]:
        return [(batch, self.peak_bytes(batch)) for batch in (1, widest)]


def points(figure: Figure) -> dict[str, list[float]]:
    """What is drawn, by its name in the legend: batches."""
    lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    return {
        str(line.get_label()): [float(x) for x in cast("list[float]", line.get_xdata())]
        for line in lines
    }


def drawn(*names: str, **changes: int) -> tuple[Figure, Sequence[Linear]]:
    predictions = [Linear(find_gpu(name), **changes) for name in names]
    return peak_over_batch(predictions), predictions


def test_one_gpu_has_its_two_limits_and_its_two_batches() -> None:
    figure, (found,) = drawn("RTX 4090")
    told = points(figure)
    assert told["tolerable batch"] == [found.tolerable]
    assert told[f"larger than {found.largest:,} runs out"] == [found.largest]
    assert told["reserved by the allocator"] == [found.tolerable]
    assert max(told["predicted peak allocated"]) > found.largest
    assert f"RTX 4090: safe limit {format_bytes(found.safe_bytes)}" in words(figure)
    assert f"at most {format_bytes(possible_bytes(found.gpu))}" in words(figure)
    peak = format_bytes(found.peak_bytes(found.tolerable))
    assert f"tolerable batch {found.tolerable:,}\npeak {peak}" in words(figure)


def test_several_gpus_are_named_with_what_each_tolerates() -> None:
    figure, found = drawn("T4", "L4", "A100 40GB")
    assert figure.axes[0].get_xscale() == "linear"
    assert points(figure)["tolerable batch, at the safe limit"] == [p.tolerable for p in found]
    assert words(figure) == [f"{p.gpu.name}: {p.tolerable}" for p in found]


def test_a_catalogue_can_be_read() -> None:
    predictions = [Linear(gpu) for gpu in CATALOGUE]
    figure = peak_over_batch(predictions)
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    told = points(figure)["tolerable batch, at the safe limit"]
    assert sorted(told) == sorted(p.tolerable for p in predictions)
    names = words(figure)
    assert "B200: " in names[-1]
    assert any(" + " in name and " to " in name for name in names), "close ones share a label"
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(low.y1 < high.y0 + 2 for low, high in itertools.pairwise(boxes))
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert "64 GiB" in labels


def test_kernels_that_make_a_difference_have_curves_of_their_own() -> None:
    with_flash, without = Linear(find_gpu("L4")), Linear(find_gpu("T4"))
    assert legend(peak_over_batch([with_flash, without]).axes[0])[0] == "predicted peak allocated"
    other = replace(without, slope=2 * without.slope)
    assert legend(peak_over_batch([with_flash, other]).axes[0])[:2] == [
        *("peak with flash attention", "without"),
    ]


@pytest.mark.parametrize("names", [("T4",), ("T4", "B200")])
def test_what_fits_nowhere_is_drawn_too(names: tuple[str, ...]) -> None:
    figure, _ = drawn(*names, slope=2**40)
    figure.canvas.draw()
    assert "predicted peak allocated" in legend(figure.axes[0])
