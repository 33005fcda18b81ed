"""Several devices side by side."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.harness.records import Fields
from benchmarks.reporting import capacity, cells
from benchmarks.reporting.render import Document, Section, Table
from benchmarks.reporting.results import Results
from benchmarks.reporting.side_by_side import LARGEST, gradients, on_top, search_cost

Column = Mapping[tuple[str, ...], str]
"""The cells of one device, by the names at the start of their rows."""


def compare(devices: Sequence[Results]) -> Document:
    """Return a document with a column for each device.

    Raises:
        ValueError: If some results are imitated and some are measured.
    """
    if len({device.imitated is None for device in devices}) > 1:
        mixed = "; ".join(f"{device.folder}: {device.name}" for device in devices)
        raise ValueError(f"imitated figures never stand beside measured ones ({mixed})")
    names = _names(devices)
    by_case, by = ("model", "setting"), ("by",)
    chapters: dict[str, tuple[Sequence[str], Callable[[Results], Column]]] = {
        "Tolerable batch": (
            by_case,
            lambda device: _by_case(device, lambda case: cells.text(case.get("tolerable"))),
        ),
        "Examples per second at the fastest size": (
            by_case,
            lambda device: _by_case(device, lambda case: capacity.rate_at(case, "fastest")),
        ),
        "Accumulation to 1024": (by_case, _accumulated),
        "What a search costs on real models, in steps": (
            by,
            lambda device: _by_name(search_cost(device)),
        ),
        "Real models in which the largest batch was found": (by, _found_the_largest),
        "What a step costs on top of the plain loop, us per micro-batch": (("model", "by"), on_top),
        "The most that an update is off": (by, lambda device: _by_name(gradients(device))),
    }
    sections = [Section("The devices", [_facts(names, devices)])]
    for title, (key, column) in chapters.items():
        columns = [column(device) for device in devices]
        if any(columns):
            sections.append(Section(title, [_side_by_side(key, names, columns)]))
    return Document(
        title=" beside ".join(names),
        stamp=", ".join(dict.fromkeys(device.stamp for device in devices if device.stamp)),
        warning=" ".join(dict.fromkeys(device.warning for device in devices if device.warning)),
        facts=[("devices", str(len(devices)))],
        sections=sections,
    )


def _names(devices: Sequence[Results]) -> list[str]:
    """Return the devices' names; with the folders, where one device was measured twice."""
    names = [device.name for device in devices]
    return [
        f"{name} ({device.folder})" if names.count(name) > 1 else name
        for name, device in zip(names, devices, strict=True)
    ]


def _facts(names: Sequence[str], devices: Sequence[Results]) -> Table:
    facts = ("device", "driver", "torch", "autobatch", "commit", "date")
    pairs = zip(names, devices, strict=True)
    rows = [[name, *(device.fact(fact) for fact in facts)] for name, device in pairs]
    return Table(["card", *facts], rows)


def _side_by_side(key: Sequence[str], names: Sequence[str], columns: Sequence[Column]) -> Table:
    rows = dict.fromkeys(row for column in columns for row in column)
    return Table(
        [*key, *names],
        [[*row, *(column.get(row, cells.NOTHING) for column in columns)] for row in rows],
    )


def _by_case(device: Results, show: Callable[[Fields], str]) -> Column:
    cases = capacity.measured(device.rows("capacity"))
    return {(str(case.get("model")), capacity.setting(case)): show(case) for case in cases}


def _accumulated(device: Results) -> Column:
    column = _by_case(device, lambda case: capacity.plan_for(case, 1024))
    return {row: cell for row, cell in column.items() if cell != cells.NOTHING}


def _found_the_largest(device: Results) -> Column:
    rows = device.rows("search", "real models", "together")
    return {(str(row.get("by")),): cells.text(row.get(LARGEST)) for row in rows}


def _by_name(column: Mapping[str, str]) -> Column:
    return {(by,): cell for by, cell in column.items()}
