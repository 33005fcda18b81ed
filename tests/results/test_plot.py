import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from matplotlib import colors, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from autobatch.results.plot import check_plot
from autobatch.results.search import SearchResult, Trial, Upper
from autobatch.results.verdict import Verdict

MIB = 2**20


def fits(size: int, peak_mib: float, reserved_mib: float | None = None) -> Trial:
    return Trial(
        size=size,
        fits=True,
        peak_bytes=int(peak_mib * MIB),
        reserved_bytes=None if reserved_mib is None else int(reserved_mib * MIB),
    )


def failed(*sizes: int) -> list[Trial]:
    return [Trial(size=n, fits=False, failure=Verdict.OUT_OF_MEMORY) for n in sizes]


def search(*trials: Trial, limit_mib: float = 256) -> SearchResult:
    size = max(trial.size for trial in trials if trial.fits)
    return SearchResult(
        size=size,
        trials=trials,
        ceiling=10**6,
        limit_bytes=int(limit_mib * MIB),
        limited_by="memory",
        upper=Upper(reason="ran out", size=size + 1),
    )


MANY = search(fits(4, 188, 190), fits(64, 240, 250), *failed(128, 70), fits(69, 244, 254))


def points(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """What is drawn as points, by its name in the legend: sizes and MiB."""
    lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    return {
        str(line.get_label()): [
            (float(x), float(y) / MIB)
            for x, y in zip(
                cast("list[float]", line.get_xdata()),
                cast("list[float]", line.get_ydata()),
                strict=True,
            )
        ]
        for line in lines
    }


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def legend(axes: Axes) -> list[str]:
    drawn = axes.get_legend()
    assert drawn is not None
    return [text.get_text() for text in drawn.get_texts()]


def test_every_trial_is_drawn_and_the_failed_ones_lie_at_the_limit() -> None:
    figure = MANY.plot()
    assert points(figure) == {
        "reserved by the allocator": [(4, 190), (64, 250), (69, 254)],
        "fits: peak allocated": [(4, 188), (64, 240), (69, 244)],
        "failed": [(70, 256), (128, 256)],
    }
    assert legend(figure.axes[0]) == list(points(figure))
    assert words(figure) == ["limit 256.0 MiB", "tolerable batch 69\npeak 244.0 MiB"]
    rule = next(line for line in figure.axes[0].lines if line.get_linestyle() == "--")
    assert {float(y) for y in cast("list[float]", rule.get_ydata())} == {256 * MIB}


def test_only_what_there_is_has_a_name() -> None:
    figure = search(fits(4, 180), fits(86, 250)).plot()
    assert legend(figure.axes[0]) == ["fits: peak allocated"]


def test_failures_far_beyond_are_told_so_that_the_rest_can_be_read() -> None:
    figure = search(fits(4, 180), fits(90, 250), *failed(2**20, 4096, 181, 180, 91)).plot()
    assert points(figure)["failed"] == [(91, 256), (180, 256)]
    assert words(figure)[-1] == "3 more failed, up to 1,048,576 →"
    assert figure.axes[0].get_xlim()[1] < 200


def test_a_limit_far_above_is_told_so_that_the_rest_can_be_read() -> None:
    figure = search(fits(4, 180), fits(256, 500), limit_mib=80 * 1024).plot()
    assert "↑ limit 80.0 GiB" in words(figure)
    assert figure.axes[0].get_ylim()[1] < 600 * MIB
    with_failure = search(fits(4, 180), fits(256, 500), *failed(257), limit_mib=80 * 1024).plot()
    assert with_failure.axes[0].get_ylim()[1] > 80 * 1024 * MIB, "a failure lies at the limit"


@pytest.mark.parametrize(
    ("limit_mib", "labels"),
    [
        (0.08, ["0", "16 KiB", "32 KiB", "48 KiB", "64 KiB", "80 KiB"]),
        (256, ["0", "64 MiB", "128 MiB", "192 MiB", "256 MiB"]),
        (24 * 1024, ["0", "4 GiB", "8 GiB", "12 GiB", "16 GiB", "20 GiB", "24 GiB"]),
        (
            1.5 * 1024,
            ["0", "0.25 GiB", "0.5 GiB", "0.75 GiB", "1 GiB", "1.25 GiB", "1.5 GiB"],
        ),
    ],
)
def test_bytes_are_counted_in_binary_steps_from_nothing(
    limit_mib: float, labels: list[str]
) -> None:
    axes = search(fits(4, limit_mib / 2), *failed(5), limit_mib=limit_mib).plot().axes[0]
    assert axes.get_ylim()[0] == axes.get_xlim()[0] == 0
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert [axes.yaxis.get_major_formatter()(tick) for tick in ticks] == labels


CASES = {
    "many": MANY,
    "one": search(fits(1, 180)),
    "three": search(fits(4, 188), fits(16, 207), fits(86, 316), limit_mib=336),
    "nearly full from the start": search(fits(1, 240), fits(2, 245), fits(7, 255), *failed(8)),
    "a million": search(fits(2, 50), fits(761_234, 255), *failed(10**6, 761_235)),
    "far below": search(fits(2, 10), fits(400, 15), fits(500, 16), *failed(501)),
    "far failures": search(fits(4, 180), fits(90, 250), *failed(2**20, 181, 91)),
    "nothing measured": search(Trial(size=3, fits=True)),
}


@pytest.mark.parametrize("found", CASES.values(), ids=CASES)
def test_no_word_covers_another_nor_a_point(found: SearchResult) -> None:
    figure = found.plot()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticklabels() if low <= tick.get_position()[0] <= high]
    boxes += [tick.get_window_extent() for tick in ticks]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
        assert box.x0 >= 0, "it is cut off"
        assert box.x1 <= figure.bbox.x1, "it is cut off"
    assert all(text.get_window_extent().x1 <= axes.bbox.x1 + 1 for text in axes.texts)
    for line in axes.lines:
        if line.get_marker() == "o":
            spots = axes.transData.transform(line.get_xydata())
            for text in axes.texts:
                assert not any(text.get_window_extent().contains(*spot) for spot in spots)


def test_it_is_written_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    path.write_text("the one before")
    figure = MANY.plot(path)
    assert isinstance(figure, Figure)
    with Image.open(path) as image:
        assert image.size == (800, 450)
        image.load()
    assert os.listdir(tmp_path) == ["memory.png"]
    MANY.plot(str(tmp_path / "memory.SVG"))
    assert (tmp_path / "memory.SVG").read_text().lstrip().startswith("<?xml")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_plot_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: Figure, file: Path, **__: object) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "memory.png"
    path.write_text("the one before")
    monkeypatch.setattr(Figure, "savefig", breaks)
    with pytest.raises(OSError, match="No space left"):
        MANY.plot(path)
    assert path.read_text() == "the one before"
    assert os.listdir(tmp_path) == ["memory.png"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory.xyz", r"ends in \.png, \.svg or \.pdf, got .*memory\.xyz"),
        ("memory", "plot must name a file that ends in"),
        ("nowhere/memory.png", "plot must name a file in a folder that exists and can be"),
        ("folder.png", "plot must name a file in a folder that exists and can be"),
    ],
)
def test_a_path_that_takes_no_plot_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=text):
        check_plot(tmp_path / name)
    with pytest.raises(ValueError, match=text):
        MANY.plot(tmp_path / name)


def test_a_folder_that_may_not_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # Root may write anywhere.
    with pytest.raises(ValueError, match=r"can be written to, got .*memory\.png"):
        check_plot(tmp_path / "memory.png")


@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.figure"])
def test_without_matplotlib_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without(missing), *sys.meta_path])
    if missing == "matplotlib":
        monkeypatch.delitem(sys.modules, "matplotlib")
    with pytest.raises(ImportError, match=r"pip install 'torch-autobatch\[plot\]'") as caught:
        MANY.plot()
    assert caught.value.name == missing
    assert caught.value.__context__ is None


class _Without:
    """An import system that does not find a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_nothing_of_the_users_matplotlib_is_touched() -> None:
    code = (
        "import sys; from test_plot import MANY; import autobatch; "
        "import matplotlib; before = matplotlib.rcParams.copy(); MANY.plot(); "
        "assert matplotlib.rcParams.copy() == before; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root.parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_autobatch_does_not_import_matplotlib() -> None:
    code = "import autobatch, autobatch.cli, sys; assert 'matplotlib' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dark_style_of_the_users_leaves_it_readable(tmp_path: Path) -> None:
    style = tmp_path / "dark.mplstyle"
    inks = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    style.write_text("".join([f"{key}: w\n" for key in inks] + [f"{key}: k\n" for key in grounds]))
    with rc_context(fname=style):
        figure = MANY.plot()
    axes = figure.axes[0]
    assert colors.same_color(figure.get_facecolor(), "white")
    assert colors.same_color(axes.get_facecolor(), "white")
    texts = [*axes.texts, axes.xaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    assert not any(colors.same_color(text.get_color(), "white") for text in texts)
