"""The report says what was measured, on what, and what is missing; it needs nothing but itself."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import made_up
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.reporting import capacity, cells, pictures, report
from benchmarks.reporting.render import Document, Section, Table, escaped, markdown, page
from benchmarks.reporting.results import PARTS, read

ROOT = Path(__file__).parent.parent.parent
VOID = {"meta", "br", "img", "path", "use"}
CHAPTERS = {
    "capacity": "What this card holds",
    "search": "What a search costs",
    "engine": "What a step costs",
    "exactness": "Whether the step is the same",
    "prediction": "Predicted against measured",
}
needs_matplotlib = pytest.mark.skipif(not pictures.available(), reason="matplotlib")


class Reader(HTMLParser):
    """Collects the words, the elements, and what refers to elsewhere; checks the nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.elements: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        named = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        self.references += [value or "" for name, value in attrs if name in named]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawings take most of the time."""
    monkeypatch.setattr(pictures, "available", lambda: False)


def written(folder: Path) -> tuple[str, str]:
    """Write the report; return the Markdown and the page."""
    report.write(folder)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_the_page_says_what_was_measured_and_on_what(tmp_path: Path) -> None:
    told, shown = written(made_up.write(tmp_path))
    text = Reader(shown).text
    for fact in ("Made Up 9000", "1.2.3", "2.13.0", "abc1234", "2026-01-02"):
        assert fact in told
        assert fact in text
    for chapter in CHAPTERS.values():
        assert f"## {chapter}" in told
        assert chapter in text
    for figure in ("90", "170", "164 [148, 180]", "16 x 64: 163 [147, 179], 99.5 %", "NOT held"):
        assert figure in text
    assert "| resnet50 | 3 x 224 x 224 | 25.6 M | 90 | 170 |" in told
    assert "no kernel" in told, "a model that failed is a row with its reason"
    assert "24.5 (23.3 to 25.7) [22.1, 27]" in told
    assert "median with minimum and maximum" in text


def test_nothing_on_the_page_is_fetched(tmp_path: Path) -> None:
    _, shown = written(made_up.write(tmp_path))
    reader = Reader(shown)
    assert not re.search(r"https?:|//|@import|url\((?!#)", shown)
    assert all(reference.startswith("#") for reference in reader.references)
    assert not {"script", "link", "iframe", "object", "embed"} & set(reader.elements)


def test_a_reference_would_be_seen() -> None:
    """The control of the test above."""
    assert Reader('<p><img src="//cdn/a.png"></p>').references == ["//cdn/a.png"]


def test_every_drawing_is_in_the_colours_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, shown = written(made_up.write(tmp_path))
    drawings = re.findall(r"<svg.*?</svg>", shown, re.DOTALL)
    assert len(drawings) == 6, "memory, speed, three others, and predicted before the search"
    colours = {colour for drawing in drawings for colour in re.findall(r"#[0-9a-f]{6}\b", drawing)}
    assert colours <= {"#ffffff", "#000000"}
    variables = set(re.findall(r"var\((--[a-z]+)\)", "".join(drawings)))
    assert {"--ink", "--first", "--second"} <= variables
    light, dark = (set(re.findall(r"(--[a-z-]+):", part)) for part in shown.split("@media")[:2])
    assert variables <= light == dark


@needs_matplotlib
def test_a_prediction_far_off_is_in_the_picture() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    pairs = {"autobatch": [(100.0, 130.0), (200.0, 200.0)], "xMem": [(100.0, 98.0)]}
    pictures.agreement(pairs, "MiB")(axes)
    ours, others = axes.get_lines()[-2:]
    x, y = (np.asarray(values).tolist() for values in (ours.get_xdata(), ours.get_ydata()))
    assert (x, y) == ([100, 200], pytest.approx([30, 0]))
    low, high = axes.get_ylim()
    assert low < -30 < 30 < high
    assert ours.get_zorder() > others.get_zorder()


@needs_matplotlib
def test_the_limit_is_drawn_in_and_failed_sizes_are_crosses() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    pictures.memory([made_up.capacity()])["resnet50"](axes)
    ran, failed, limit = axes.lines
    x, crosses, y = (
        np.asarray(values).tolist()
        for values in (ran.get_xdata(), failed.get_xdata(), limit.get_ydata())
    )
    assert x == [1, 64, 90]
    assert (crosses, failed.get_marker()) == ([91], "x")
    assert set(y) == {10}, "GiB"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("missing", PARTS)
def test_a_part_that_is_missing_is_said_and_the_others_are_told(
    missing: str, tmp_path: Path
) -> None:
    parts = {name: cases for name, cases in made_up.PARTS.items() if name != missing}
    told, shown = written(made_up.write(tmp_path, parts))
    assert f"Not measured here: {missing}." in told
    assert f"Not measured here: {missing}." in Reader(shown).text
    for name, chapter in CHAPTERS.items():
        assert (f"## {chapter}" in told) == (name != missing)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("only", PARTS)
def test_a_single_part_is_enough(only: str, tmp_path: Path) -> None:
    told, shown = written(made_up.write(tmp_path, {only: made_up.PARTS[only]}))
    assert f"## {CHAPTERS[only]}" in told
    Reader(shown)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_without_any_case_is_no_error(name: str, tmp_path: Path) -> None:
    Reader(written(made_up.write(tmp_path, {**made_up.PARTS, name: []}))[1])


def test_what_was_left_out_and_what_failed_is_said(tmp_path: Path) -> None:
    folder = made_up.write(tmp_path, left_out=["gpt2: no time"], failed="RuntimeError('broken')")
    told, shown = written(folder)
    for text in (told, Reader(shown).text):
        assert "Left out (1): gpt2: no time." in text
        assert "This part ended with an error: RuntimeError('broken')" in text


def test_much_that_was_left_out_is_folded_away(tmp_path: Path) -> None:
    told, shown = written(made_up.write(tmp_path, left_out=[f"net {n}: no time" for n in range(9)]))
    for text in (told, Reader(shown).text):
        assert "left out (9)" in text
        assert all(f"net {n}: no time" in text for n in range(9))
    assert "<details><summary>left out (9)" in shown


def test_an_imitation_says_so_at_every_figure(tmp_path: Path) -> None:
    told, shown = written(made_up.write(tmp_path, imitated="RTX 3060"))
    stamp = "imitated RTX 3060"
    assert "Every figure here is imitated RTX 3060" in told
    assert "None was measured on that card" in Reader(shown).text
    for figure in re.findall(r"<figure>.*?</figure>", shown, re.DOTALL):
        assert stamp in re.sub(r"<svg.*</svg>", "", figure, flags=re.DOTALL)
        assert stamp in figure[: figure.index("</svg>")], "in the drawing itself"
    tables = re.findall(r"<(?:h3|summary)>(.*?)</(?:h3|summary)>", shown)
    tiles = re.findall(r"<li><b>(.*?)</li>", shown)
    assert len(tables) > 8
    assert all(stamp in title for title in (*tables, *tiles))
    assert shown.count("<table>") == len(tables), "every table has a title to bear the stamp"


def test_measured_figures_bear_no_stamp(tmp_path: Path) -> None:
    for text in written(made_up.write(tmp_path)):
        assert "imitated" not in text
        assert "quick run" not in text


def test_a_quick_run_means_nothing_and_says_so(tmp_path: Path) -> None:
    for text in written(made_up.write(tmp_path, quick=True)):
        assert "the figures mean nothing" in text
        assert text.count("quick run") > 8


def test_imitated_and_measured_parts_are_not_reported_together(tmp_path: Path) -> None:
    made_up.write(tmp_path, {"search": made_up.PARTS["search"]})
    made_up.write(tmp_path, {"engine": made_up.PARTS["engine"]}, imitated="RTX 3060")
    with pytest.raises(ValueError, match=r"mixes.*imitating RTX 3060"):
        report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_parts_of_two_devices_are_not_reported_together(tmp_path: Path) -> None:
    made_up.write(tmp_path, {"search": made_up.PARTS["search"]})
    made_up.write(tmp_path, {"engine": made_up.PARTS["engine"]}, device="Made Up 1")
    with pytest.raises(ValueError, match=r"Made Up 9000.*Made Up 1"):
        report.write(tmp_path)


def test_parts_of_several_commits_and_days_name_all_of_them(tmp_path: Path) -> None:
    made_up.write(tmp_path, {"search": made_up.PARTS["search"]})
    later = {"commit": "def5678", "date": "2026-02-03T00:00:00+00:00"}
    made_up.write(tmp_path, {"engine": made_up.PARTS["engine"]}, **later)
    results = read(tmp_path)
    assert results.fact("commit") == "abc1234, def5678"
    assert results.fact("date") == "2026-01-02 to 2026-02-03"


def test_without_matplotlib_there_is_a_report_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = made_up.write(tmp_path)
    files = report.write(folder)
    assert [path.name for path in files] == ["report.md", "report.html"]
    for path in files:
        text = path.read_text()
        assert "matplotlib is not installed" in text
        assert "<svg" not in text
        assert "drawn in" not in text
        assert "90" in text


def test_at_most_eight_files_lie_in_the_folder(tmp_path: Path) -> None:
    folder = made_up.write(tmp_path)
    files = report.write(folder)
    assert set(files) <= set(folder.iterdir())
    assert len(list(folder.iterdir())) == len(PARTS) + len(files) <= 8


HOSTILE = "<script>alert('x')</script> $x_1$ | `a` [b](c) \x1b[31m & \"q\""


def test_a_hostile_name_is_only_text(tmp_path: Path) -> None:
    parts: dict[str, list[made_up.Fields]] = {
        "capacity": [made_up.capacity(HOSTILE), made_up.failed("b", HOSTILE)],
        "search": [{"table": HOSTILE, "by": HOSTILE, HOSTILE: HOSTILE}],
        "engine": [{**made_up.engine("autobatch", 3.0), "model": HOSTILE}],
    }
    told, shown = written(made_up.write(tmp_path, parts, device=HOSTILE, left_out=[HOSTILE]))
    reader = Reader(shown)
    assert "script" not in reader.elements
    assert "<script>alert('x')</script> $x_1$ | `a` [b](c)" in reader.text
    assert "<script" not in told
    assert "\x1b" not in told + shown
    tables = re.findall(r"(?:^\|.*\n)+", told, re.MULTILINE)
    assert sum("alert" in table for table in tables) >= 6
    for table in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1, "columns as they were"


def test_a_file_that_is_no_result_is_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    folder = made_up.write(tmp_path, {"engine": made_up.PARTS["engine"]})
    (folder / "search.json").write_text('{"part": "search", "cases": [{"by"')
    (folder / "other.json").write_text("[1, 2]")
    told, _ = written(folder)
    assert "Not read: search.json" in told
    assert "Not read: other.json: it is no result" in told


def test_an_unknown_part_is_told_with_its_tables(tmp_path: Path) -> None:
    told, _ = written(made_up.write(tmp_path, {"new": [{"by": "us", "measured": 5}]}))
    assert "## new" in told
    assert "| us | 5 |" in told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "-"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (12345, "12,345"),
        (12345.6, "12,346"),
        (0.123456, "0.123"),
        (2e-16, "2e-16"),
        ("inf", "inf"),
        (made_up.samples(2.0), "2 [1.8, 2.2]"),
        ({"median": 1.0}, "1 [-, -]"),
    ],
)
def test_a_value_is_told_as_people_read_it(value: object, told: str) -> None:
    assert cells.text(value) == told


def test_only_a_column_without_words_is_aligned_right() -> None:
    rows = [["1.3 [1, 2]", "14 of 18", "5; doubling 7", "-"], ["not installed", "-", "6", "-"]]
    table = Table(header=["a", "b", "c", "d"], rows=rows)
    sections = [Section(title="s", blocks=[table])]
    shown = page(Document(title="t", sections=sections))
    aligned = re.findall(r"<th( class=\"number\")?>([abcd])</th>", shown)
    assert [bool(number) for number, _ in aligned] == [True, True, False, False]


def test_markdown_keeps_its_tables_whole() -> None:
    table = Table(header=["a|b"], rows=[["c\nd|e"]])
    told = markdown(Document(title="t", sections=[Section(title="s", blocks=[table])]))
    assert "| a\\|b |\n| --- |\n| c d\\|e |" in told
    assert str(escaped("1.3 [1.1, 1.6]")) == "1.3 [1.1, 1.6]"


@pytest.mark.parametrize(
    ("found", "best", "verdicts"),
    [(0.99, 0.98, ["held", "held"]), (0.989, 0.979, ["NOT held", "NOT held"])],
)
def test_the_verdict_is_of_the_worst_model(found: float, best: float, verdicts: list[str]) -> None:
    worst = made_up.capacity(scan={"largest": 100, "found_over_largest": found})
    plans = worst["desired"]
    assert isinstance(plans, list)
    worst["desired"] = [{**plan, "of_best": best} for plan in plans]
    table = capacity.verdicts([made_up.capacity(), worst])
    assert [row[-1] for row in table.rows] == verdicts
    assert capacity.verdicts([made_up.failed("net", "no")]).rows == []


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_up.write(tmp_path)
    assert command.main(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out


def test_a_folder_without_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["report", str(tmp_path)]) == 2
    assert "no results in" in capsys.readouterr().err


@needs_matplotlib
@pytest.mark.parametrize(
    "folder", [p.parent for p in (ROOT / "benchmarks" / "results").glob("*/report.md")], ids=str
)
def test_a_committed_report_is_that_of_its_files(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    told, _ = written(tmp_path)
    assert (folder / "report.md").read_text() == told, "run python -m benchmarks report"


@pytest.mark.usefixtures("undrawn")
def test_a_result_s_figures_reach_the_page(tmp_path: Path) -> None:
    """The control of the test above: a changed figure changes the report."""
    before, _ = written(made_up.write(tmp_path))
    path = tmp_path / "exactness.json"
    result = json.loads(path.read_text())
    result["cases"][0]["tokens"] = 0.875
    path.write_text(json.dumps(result))
    assert written(tmp_path)[0] != before


@needs_matplotlib
def test_a_drawing_keeps_a_readable_width_on_a_narrow_page() -> None:
    drawing = pictures.svg(pictures.memory([made_up.capacity()]), "")
    width = float(re.findall(r' width="([\d.]+)pt"', drawing)[0])
    least = float(re.findall(r'<svg style="min-width: (\d+)pt"', drawing)[0])
    assert least == pytest.approx(0.75 * width, abs=0.5)


@needs_matplotlib
def test_the_speeds_of_a_slow_model_have_different_labels() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    slow = [{"size": n, "examples_per_second": made_up.samples(n / 2)} for n in (1, 2, 4)]
    pictures.speed([made_up.capacity(sizes=slow)])["resnet50"](axes)
    axes.set_ylim(0, 3)
    axes.set_yticks([0, 0.5, 1, 1.5])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["0", "0.5", "1", "1.5"]
