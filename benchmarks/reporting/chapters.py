"""The report's chapters, each of the part that it reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from benchmarks.harness.records import Fields
from benchmarks.reporting import capacity, cells, pictures
from benchmarks.reporting.document import Block, Document, Figure, Picture, Section, Table, table
from benchmarks.reporting.pictures import Draw
from benchmarks.reporting.results import PARTS, Results
from benchmarks.reporting.side_by_side import LARGEST, ON_TOP, worst_update

_LONG: Final = 20  # Rows of a table that is folded.
_FACTS: Final = ("device", "driver", "torch", "autobatch", "commit", "date")
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
_MODELS: Final = ("real models", "all of them together")
_BOXES: Final = ("black boxes", "all of them together")
_COST: Final = "median cost in seconds"
OURS: Final = "autobatch"


def document(results: Results, *, drawn: bool) -> Document:
    """Return the report of a device; without drawings where there is nothing to draw with."""
    missing = [name for name in PARTS if name not in results.parts]
    sections = [*_capacity(results, drawn=drawn)]
    others = [name for name in results.parts if name != "capacity"]
    sections += [_chapter(results, name, drawn=drawn) for name in others]
    return Document(
        title=f"autobatch on {results.name}",
        stamp=results.stamp,
        warning=results.warning,
        facts=[(name, results.fact(name)) for name in _FACTS],
        figures=figures(results),
        sections=[*sections, _measured(results, missing, drawn=drawn)],
    )


def figures(results: Results) -> list[Figure]:
    """Return the numbers that are read first."""
    found = list(_largest(capacity.sound(results.rows("capacity"))))
    for row in results.rows("search", *_MODELS):
        if row.get("by") == OURS:
            told = f"real models in which it finds the largest batch that runs, {row.get('trials')}"
            found.append(Figure(value=str(row.get(LARGEST)), label=f"{told} trials in all"))
            cost = f"{cells.text(row.get(_COST))} steps"
            found.append(Figure(value=cost, label=f"a search costs (median); {_by_hand(results)}"))
    rows = results.rows("exactness", "relative difference")
    off = next((worst_update(row) for row in rows if row.get("by") == OURS), None)
    if off is not None:
        found.append(Figure(value=f"{off:.0e}", label="the most that an accumulated step is off"))
    return found


def _by_hand(results: Results) -> str:
    rows = results.rows("search", *_MODELS)
    costs = [cells.text(row.get(_COST)) for row in rows if row.get("by") == "doubling"]
    return f"doubling and bisecting {costs[0]}" if costs else "no one was beside it"


def _largest(cases: Sequence[Fields]) -> Iterator[Figure]:
    trained = [case for case in cases if case.get("mode") == "train"]
    names = dict.fromkeys(str(case.get("model")) for case in trained)
    chosen = next((name for name in ("resnet50", *names) if name in names), None)
    own = [case for case in trained if case.get("model") == chosen]
    firsts = {case.get("precision"): case for case in reversed(own)}
    for case in sorted(firsts.values(), key=own.index):
        label = f"{chosen}, the largest training batch, {capacity.setting(case)}"
        yield Figure(value=cells.text(case.get("tolerable")), label=label)


def _capacity(results: Results, *, drawn: bool) -> list[Section]:
    if "capacity" not in results.parts:
        return []
    cases = list(results.parts["capacity"].cases)
    memory = _picture(pictures.memory(cases), _MEMORY, results) if drawn else []
    speed = _picture(pictures.speed(cases), _SPEED, results) if drawn else []
    foreseen = _picture(_foreseen(cases), _PREDICTED, results) if drawn else []
    held = [capacity.held(cases), capacity.failures(cases), capacity.verdicts(cases)]
    chapters: dict[str, list[Block]] = {
        "What this card holds": [
            *_told(results, "capacity"),
            *_filled(held),
            *memory,
            *_filled([capacity.searched(cases)]),
        ],
        "How fast each size goes": [*speed, *_main_and_all(capacity.speeds, cases)],
        "Accumulation to the batch you want": _main_and_all(capacity.accumulations, cases),
        "Predicted before the search": [*foreseen, *_filled([capacity.predicted(cases)])],
    }
    return [Section(title=title, blocks=blocks) for title, blocks in chapters.items() if blocks]


def _main_and_all(
    make: Callable[[Sequence[Fields]], Table], cases: Sequence[Fields]
) -> list[Block]:
    """A table of what is drawn, and a folded one of everything."""
    main, everything = make(pictures.chosen(cases)), make(cases)
    if len(everything.rows) <= len(main.rows):
        return _filled([everything])
    whole = replace(everything, title=f"every setting; {everything.title}", folded=True)
    return _filled([main, whole])


def _filled(tables: Sequence[Table]) -> list[Block]:
    return [one for one in tables if one.rows]


_MEMORY: Final = (
    "Peak memory over the size of the micro-batch, and the limit; a cross is a size that failed."
)
_SPEED: Final = "Examples per second over size; a line through a point is minimum to maximum."
_PREDICTED: Final = "How far predictions are off what was measured; dotted is a tenth."


def _foreseen(cases: Sequence[Fields]) -> dict[str, Draw]:
    pairs: dict[str, list[tuple[float, float]]] = {}
    for case in capacity.sound(cases):
        for name in ("safe", "likely"):
            told = cells.number(capacity.inner(case, "predicted").get(f"tolerable_{name}"))
            found = cells.number(case.get("tolerable"))
            if told and found:
                pairs.setdefault(name, []).append((found, told))
    return {"largest batch": pictures.agreement(pairs, "examples")} if pairs else {}


def _chapter(results: Results, name: str, *, drawn: bool) -> Section:
    part = results.parts[name]
    blocks: list[Block] = [_ABOUT[name]] if name in _ABOUT else []
    blocks += _told(results, name)
    if drawn:
        blocks += _picture(panels(results, name), _CAPTIONS.get(name, ""), results)
    tables = sorted(part.tables.items(), key=lambda item: len(item[1]) > _LONG)
    blocks += [table(rows, _short(title), folded=len(rows) > _LONG) for title, rows in tables]
    return Section(title=_TITLES.get(name, name), blocks=blocks)


_TITLES: Final = {
    "search": "What a search costs",
    "engine": "What a step costs",
    "exactness": "Whether the step is the same",
    "prediction": "Predicted against measured",
}
_CAPTIONS: Final = {
    "search": "What a search costs, in steps at the size it found; and in how many cases it found "
    "the largest that runs. Cheap searches that find less, or what does not run, are cheap for it.",
    "engine": "Added to the plain loop by each micro-batch; the line is from quartile to quartile.",
    "prediction": _PREDICTED,
}


def panels(results: Results, name: str) -> dict[str, Draw]:
    """Return the drawings of a part other than ``capacity``, by title; none for what has none."""
    if name == "search":
        return {
            words[0]: pictures.bars(rows, _COST, "steps, median", beside=LARGEST, words="finds")
            for words in (_MODELS, _BOXES)
            if (rows := results.rows("search", *words))
        }
    if name == "engine":
        return _engine(results.rows("engine", "a window of micro-batches"))
    return _published(results) if name == "prediction" else {}


def _engine(rows: Sequence[Fields]) -> dict[str, Draw]:
    by_model: dict[str, list[Fields]] = {}
    for row in rows:
        if row.get("by") != "plain" and cells.number(row.get(ON_TOP)) is not None:
            by_model.setdefault(str(row.get("model")), []).append(row)
    return {m: pictures.bars(own, ON_TOP, "us, median") for m, own in by_model.items()}


def _published(results: Results) -> dict[str, Draw]:
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows("prediction", "the peak of"):
        measured, error = (cells.number(row.get(key)) for key in ("measured", "error_%"))
        xmem = cells.number(row.get("xMem"))
        if measured and error is not None:
            pairs.setdefault("autobatch", []).append((measured, measured * (1 + error / 100)))
        if measured and xmem:
            pairs.setdefault("xMem", []).append((measured, xmem))
    return {"peak of published runs": pictures.agreement(pairs, "MiB")} if pairs else {}


def _picture(panels: Mapping[str, Draw], caption: str, results: Results) -> list[Block]:
    if not panels:
        return []
    return [Picture(svg=pictures.svg(panels, results.stamp), caption=caption)]


_MANY: Final = 3


def _short(title: str) -> str:
    return title.partition(": ")[2] or title


def _told(results: Results, name: str) -> Iterator[Block]:
    """Say what a part's figures must not be read without."""
    facts = results.parts[name].facts
    if facts.get("failed"):
        yield f"This part ended with an error: {facts['failed']}. Below is what it had until then."
    left_out = results.parts[name].left_out
    if len(left_out) > _MANY:  # Before the figures they would be all that is seen.
        rows = [[one] for one in left_out]
        yield Table(title=f"left out ({len(left_out)})", header=["case"], rows=rows, folded=True)
    elif left_out:
        yield f"Left out ({len(left_out)}): {'; '.join(left_out)}."


def _measured(results: Results, missing: Sequence[str], *, drawn: bool) -> Section:
    names = ("date", "commit", "torch", "python", "threads", "load", "seed", "seconds")
    header = ["part", *names, "left out"]
    rows = [
        [name, *(cells.text(part.facts.get(fact)) for fact in names), str(len(part.left_out))]
        for name, part in results.parts.items()
    ]
    blocks: list[Block] = [Table(title="parts", header=header, rows=rows)]
    if missing:
        blocks.append(f"Not measured here: {', '.join(missing)}.")
    blocks += [f"Not read: {text}." for text in results.unreadable]
    if not drawn:
        blocks.append(
            "There are no drawings, for matplotlib is not installed: pip install matplotlib."
        )
    return Section(title="How it was measured", blocks=blocks)
