"""The report of one device: Markdown, one HTML page, and a picture for the README."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from autobatch.files import atomic_file
from benchmarks.harness.records import Fields
from benchmarks.reporting import capacity, cells, pictures
from benchmarks.reporting.pictures import Draw
from benchmarks.reporting.render import (
    Block,
    Document,
    Figure,
    Picture,
    Section,
    Table,
    markdown,
    page,
    table,
)
from benchmarks.reporting.results import PARTS, Part, Results, read
from benchmarks.reporting.side_by_side import LARGEST, ON_TOP, worst_update

OURS: Final = "autobatch"
_LONG: Final = 20  # A table with more rows is folded.
_MANY: Final = 3  # More skipped cases are a folded table.
_FACTS: Final = ("device", "driver", "torch", "autobatch", "commit", "date")
_RUN_FACTS: Final = ("date", "commit", "torch", "python", "threads", "load", "seed", "seconds")
_TITLES: Final = {
    "search": "What a search costs",
    "engine": "What a step costs",
    "exactness": "Whether the step is the same",
    "prediction": "Predicted against measured",
}
_ABOUT: Final = {
    "search": "Everyone searches for the largest batch in the same cases, under the same limit.",
    "engine": "Everyone takes the same steps in turns; a bar is what it adds to the plain loop's "
    "own time. Read it against 'plain again', which is the noise of this machine.",
    "exactness": "One accumulated step of float64 against the step of the undivided batch: "
    "1e-16 is rounding, anything else is another step. Each engine is used as its "
    "documentation says.",
    "prediction": "What autobatch predicts without the card, beside what others measured on it. "
    "xMem is another predictor, with its own published figures.",
}
_MEMORY: Final = (
    "Peak memory over the size of the micro-batch, and the limit; a cross is a size that failed."
)
_SPEED: Final = "Examples per second over size; a line through a point is minimum to maximum."
_PREDICTED: Final = "How far predictions are off what was measured; dotted is a tenth."
_CAPTIONS: Final = {
    "search": "What a search costs, in steps at the size it found; and in how many cases it found "
    "the largest that runs. Cheap searches that find less, or what does not run, are cheap for it.",
    "engine": "Added to the plain loop by each micro-batch; the line is from quartile to quartile.",
    "prediction": _PREDICTED,
}
_MODELS: Final = ("real models", "all of them together")
_BOXES: Final = ("black boxes", "all of them together")
_COST: Final = "median cost in seconds"


def write(folder: Path) -> list[Path]:
    """Write report.md, report.html and, with matplotlib, overview.png; return what was written.

    Raises:
        ValueError: If there is no result in the folder, or several that must not be mixed.
    """
    results = read(folder)
    is_drawn = pictures.available()
    document = report(results, is_drawn=is_drawn)
    files = {
        folder / "report.md": markdown(document).encode(),
        folder / "report.html": page(document).encode(),
    }
    if is_drawn and (panels := _overview(results)):
        where = f"{results.stamp}, on {results.device}" if results.stamp else results.device
        caption = f"{where}; torch {results.fact('torch')}, {results.fact('date')}"
        files[folder / "overview.png"] = pictures.png(panels, caption)
    for path, content in files.items():
        with atomic_file(path) as unfinished:
            unfinished.write_bytes(content)
    return list(files)


def report(results: Results, *, is_drawn: bool) -> Document:
    """Return the report of a device; without drawings where matplotlib is not installed."""
    sections = _capacity(results, is_drawn=is_drawn)
    others = [part for name, part in results.parts.items() if name != "capacity"]
    sections += [_section(results, part, is_drawn=is_drawn) for part in others]
    return Document(
        title=f"autobatch on {results.name}",
        stamp=results.stamp,
        warning=results.warning,
        facts=[(name, results.fact(name)) for name in _FACTS],
        figures=[*_largest(capacity.measured(results.rows("capacity"))), *key_figures(results)],
        sections=[*sections, _how_it_was_measured(results, is_drawn=is_drawn)],
    )


def key_figures(results: Results) -> Iterator[Figure]:
    """Yield how often a search finds the largest batch, what it costs, and how exact a step is."""
    rows = results.rows("search", *_MODELS)
    doubling = [cells.text(row.get(_COST)) for row in rows if row.get("by") == "doubling"]
    others = f"doubling and bisecting {doubling[0]}" if doubling else "no one was beside it"
    for row in rows:
        if row.get("by") == OURS:
            label = f"real models in which it finds the largest batch that runs, {row['trials']}"
            yield Figure(str(row.get(LARGEST)), f"{label} trials in all")
            yield Figure(
                f"{cells.text(row.get(_COST))} steps", f"a search costs (median); {others}"
            )
    rows = results.rows("exactness", "relative difference")
    off = next((worst_update(row) for row in rows if row.get("by") == OURS), None)
    if off is not None:
        yield Figure(f"{off:.0e}", "the most that an accumulated step is off")


def _largest(cases: Sequence[Fields]) -> Iterator[Figure]:
    """Yield the largest training batch of ResNet-50, else of the first model, by precision."""
    trained = [case for case in cases if case.get("mode") == "train"]
    models = [case.get("model") for case in trained]
    chosen = next((name for name in ("resnet50", *models) if name in models), None)
    shown: set[object] = set()
    for case in trained:
        if case.get("model") == chosen and case.get("precision") not in shown:
            shown.add(case.get("precision"))
            label = f"{chosen}, the largest training batch, {capacity.setting(case)}"
            yield Figure(cells.text(case.get("tolerable")), label)


def _capacity(results: Results, *, is_drawn: bool) -> list[Section]:
    part = results.parts.get("capacity")
    if part is None:
        return []
    cases = part.cases

    def picture(panels: dict[str, Draw], caption: str) -> list[Block]:
        return _picture(panels, caption, results) if is_drawn else []

    sections = [
        Section(
            "What this card holds",
            [
                *_warnings(part),
                *_filled(capacity.held(cases), capacity.failures(cases), capacity.verdicts(cases)),
                *picture(pictures.memory(cases), _MEMORY),
                *_filled(capacity.searched(cases)),
            ],
        ),
        Section(
            "How fast each size goes",
            [*picture(pictures.speed(cases), _SPEED), *_drawn_and_all(capacity.speeds, cases)],
        ),
        Section(
            "Accumulation to the batch you want", _drawn_and_all(capacity.accumulations, cases)
        ),
        Section(
            "Predicted before the search",
            [
                *picture(_predicted_batches(cases), _PREDICTED),
                *_filled(capacity.predicted(cases)),
            ],
        ),
    ]
    return [section for section in sections if section.blocks]


def _drawn_and_all(
    make: Callable[[Sequence[Fields]], Table], cases: Sequence[Fields]
) -> list[Block]:
    """Return a table of the cases that are drawn, and a folded one of all cases."""
    drawn, everything = make(pictures.chosen(cases)), make(cases)
    if len(everything.rows) <= len(drawn.rows):
        return _filled(everything)
    title = f"every setting; {everything.title}"
    return _filled(drawn, everything._replace(title=title, folded=True))


def _filled(*tables: Table) -> list[Block]:
    return [one for one in tables if one.rows]


def _predicted_batches(cases: Sequence[Fields]) -> dict[str, Draw]:
    pairs: dict[str, list[tuple[float, float]]] = {}
    for case in capacity.measured(cases):
        for name in ("safe", "likely"):
            predicted = cells.number(cells.inner(case, "predicted").get(f"tolerable_{name}"))
            found = cells.number(case.get("tolerable"))
            if predicted and found:
                pairs.setdefault(name, []).append((found, predicted))
    return {"largest batch": pictures.agreement(pairs, "examples")} if pairs else {}


def _section(results: Results, part: Part, *, is_drawn: bool) -> Section:
    blocks: list[Block] = [_ABOUT[part.name]] if part.name in _ABOUT else []
    blocks += _warnings(part)
    if is_drawn:
        blocks += _picture(_panels(results, part.name), _CAPTIONS.get(part.name, ""), results)
    for title, rows in sorted(part.tables.items(), key=lambda item: len(item[1]) > _LONG):
        short = title.partition(": ")[2] or title
        blocks.append(table(rows, short, folded=len(rows) > _LONG))
    return Section(_TITLES.get(part.name, part.name), blocks)


def _panels(results: Results, name: str) -> dict[str, Draw]:
    """Return the drawings of a part other than ``capacity``, by title."""
    if name == "search":
        return {
            words[0]: pictures.bars(rows, _COST, "steps, median", beside=LARGEST, words="finds")
            for words in (_MODELS, _BOXES)
            if (rows := results.rows("search", *words))
        }
    if name == "engine":
        by_model: dict[str, list[Fields]] = {}
        for row in results.rows("engine", "a window of micro-batches"):
            if row.get("by") != "plain" and cells.number(row.get(ON_TOP)) is not None:
                by_model.setdefault(str(row.get("model")), []).append(row)
        return {m: pictures.bars(own, ON_TOP, "us, median") for m, own in by_model.items()}
    return _published_peaks(results) if name == "prediction" else {}


def _published_peaks(results: Results) -> dict[str, Draw]:
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows("prediction", "the peak of"):
        measured, error = (cells.number(row.get(key)) for key in ("measured", "error_%"))
        xmem = cells.number(row.get("xMem"))
        if measured and error is not None:
            pairs.setdefault(OURS, []).append((measured, measured * (1 + error / 100)))
        if measured and xmem:
            pairs.setdefault("xMem", []).append((measured, xmem))
    return {"peak of published runs": pictures.agreement(pairs, "MiB")} if pairs else {}


def _overview(results: Results) -> dict[str, Draw]:
    """Return at most four drawings for the README, of the parts that were measured."""
    found: dict[str, Draw] = {}
    cases = results.rows("capacity")
    for what, draw in (("memory", pictures.memory), ("speed", pictures.speed)):
        models = draw(cases)
        name = next((name for name in ("resnet50", *models) if name in models), None)
        if name is not None:
            found[f"{name}: {what} over size"] = models[name]
    for part, title in (("search", "what a search costs"), ("prediction", "predicted peaks")):
        for name, panel in list(_panels(results, part).items())[:1]:
            found[f"{title}: {name}"] = panel
    return found


def _picture(panels: dict[str, Draw], caption: str, results: Results) -> list[Block]:
    return [Picture(pictures.svg(panels, results.stamp), caption)] if panels else []


def _warnings(part: Part) -> Iterator[Block]:
    """Yield the error that ended the part, and the cases that were skipped."""
    if error := part.facts.get("failed"):
        yield f"This part ended with an error: {error}. Below is what it had until then."
    left_out = part.left_out
    if len(left_out) > _MANY:
        yield Table(["case"], [[one] for one in left_out], f"left out ({len(left_out)})", True)
    elif left_out:
        yield f"Left out ({len(left_out)}): {'; '.join(left_out)}."


def _how_it_was_measured(results: Results, *, is_drawn: bool) -> Section:
    rows = [
        [name, *(cells.text(part.facts.get(fact)) for fact in _RUN_FACTS), str(len(part.left_out))]
        for name, part in results.parts.items()
    ]
    blocks: list[Block] = [Table(["part", *_RUN_FACTS, "left out"], rows, "parts")]
    if missing := [name for name in PARTS if name not in results.parts]:
        blocks.append(f"Not measured here: {', '.join(missing)}.")
    blocks += [f"Not read: {text}." for text in results.unreadable]
    if not is_drawn:
        blocks.append(
            "There are no drawings, for matplotlib is not installed: pip install matplotlib."
        )
    return Section("How it was measured", blocks)
