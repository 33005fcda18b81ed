"""Several devices side by side."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.harness.records import Fields
from benchmarks.reporting import capacity, cells
from benchmarks.reporting.document import Document, Section, Table
from benchmarks.reporting.results import Results
from benchmarks.reporting.side_by_side import LARGEST, gradients, on_top, search_cost

Told = dict[tuple[str, ...], str]
"""By the names of a row, its cell."""


def compare(cards: Sequence[Results]) -> Document:
    """Return a document with a column for each.

    Raises:
        ValueError: If some are imitated and some measured.
    """
    kinds = {card.imitated is None for card in cards}
    if len(kinds) > 1:
        told = "; ".join(f"{card.folder}: {card.name}" for card in cards)
        raise ValueError(f"imitated figures never stand beside measured ones ({told})")
    names = _names(cards)
    cases = [capacity.sound(card.rows("capacity")) for card in cards]
    chapters: dict[str, tuple[Sequence[str], list[Told]]] = {
        "Tolerable batch": (("model", "setting"), [_held(own) for own in cases]),
        "Examples per second at the fastest size": (
            ("model", "setting"),
            [_fast(c) for c in cases],
        ),
        "Accumulation to 1024": (("model", "setting"), [_accumulated(own) for own in cases]),
        "What a search costs on real models, in steps": (
            ("by",),
            [_keyed(search_cost(card)) for card in cards],
        ),
        "Real models in which the largest batch was found": (
            ("by",),
            [_column(card.rows("search", "real models", "together"), LARGEST) for card in cards],
        ),
        "What a step costs on top of the plain loop, us per micro-batch": (
            ("model", "by"),
            [dict(on_top(card).items()) for card in cards],
        ),
        "The most that an update is off": (
            ("by",),
            [_keyed(gradients(card)) for card in cards],
        ),
    }
    made = [
        Section(title=title, blocks=[_beside(key, names, columns)])
        for title, (key, columns) in chapters.items()
        if any(columns)
    ]
    return Document(
        title=" beside ".join(names),
        stamp=", ".join(dict.fromkeys(card.stamp for card in cards if card.stamp)),
        warning=" ".join(dict.fromkeys(card.warning for card in cards if card.warning)),
        facts=[("devices", str(len(cards)))],
        sections=[Section(title="The devices", blocks=[_facts(names, cards)]), *made],
    )


def _names(cards: Sequence[Results]) -> list[str]:
    """Names that differ: of two runs on one device, the folders too."""
    names = [card.name for card in cards]
    return [
        f"{name} ({card.folder})" if names.count(name) > 1 else name
        for name, card in zip(names, cards, strict=True)
    ]


def _facts(names: Sequence[str], cards: Sequence[Results]) -> Table:
    facts = ("device", "driver", "torch", "autobatch", "commit", "date")
    rows = [[name, *(card.fact(f) for f in facts)] for name, card in zip(names, cards, strict=True)]
    return Table(title="", header=["card", *facts], rows=rows)


def _beside(key: Sequence[str], names: Sequence[str], columns: Sequence[Told]) -> Table:
    rows = dict.fromkeys(name for column in columns for name in column)
    return Table(
        header=[*key, *names],
        rows=[[*row, *(column.get(row, cells.NOTHING) for column in columns)] for row in rows],
    )


def _by_case(cases: Iterable[Fields], tell: Callable[[Fields], str]) -> Told:
    return {(str(case.get("model")), capacity.setting(case)): tell(case) for case in cases}


def _held(cases: Sequence[Fields]) -> Told:
    return _by_case(cases, lambda case: cells.text(case.get("tolerable")))


def _fast(cases: Sequence[Fields]) -> Told:
    return _by_case(cases, lambda case: f"{capacity.rate_at(case, 'fastest')}")


def _accumulated(cases: Sequence[Fields]) -> Told:
    told = _by_case(cases, lambda case: capacity.plan_for(case, 1024))
    return {name: cell for name, cell in told.items() if cell != cells.NOTHING}


def _column(rows: Sequence[Fields], name: str) -> Told:
    return {(str(row.get("by")),): cells.text(row.get(name)) for row in rows}


def _keyed(told: dict[str, str]) -> Told:
    return {(by,): cell for by, cell in told.items()}
