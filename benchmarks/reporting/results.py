"""Read the result files of one device."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.harness.records import Fields

PARTS: Final = ("capacity", "search", "engine", "exactness", "prediction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A result file.

    Attributes:
        name: The part, such as ``"search"``.
        facts: The device, the versions and the other facts of the file.
        cases: The rows of all tables.
    """

    name: str
    facts: Fields
    cases: Sequence[Fields]

    @property
    def left_out(self) -> list[str]:
        """The cases that were not measured, and why."""
        left_out = self.facts.get("left_out")
        return [str(text) for text in left_out] if isinstance(left_out, list) else []

    @property
    def tables(self) -> dict[str, list[Fields]]:
        """The rows by the title of their table, in the order of the file."""
        found: dict[str, list[Fields]] = {}
        for case in self.cases:
            found.setdefault(str(case.get("table", self.name)), []).append(case)
        return found

    def rows(self, *words: str) -> list[Fields]:
        """Return the rows of the first table whose title contains all the words."""
        named = (rows for title, rows in self.tables.items() if all(w in title for w in words))
        return next(named, [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The results of a device.

    Attributes:
        folder: The folder of the files.
        parts: The parts by name, in the order of a report.
        unreadable: The files that are no results, and why.
    """

    folder: Path
    parts: Mapping[str, Part]
    unreadable: Sequence[str] = ()

    @property
    def device(self) -> str:
        """The measured device."""
        return self.fact("device")

    @property
    def imitated(self) -> str | None:
        """The imitated card; None if the figures are measured."""
        card = next(iter(self.parts.values())).facts.get("imitated")
        return None if card is None else str(card)

    @property
    def name(self) -> str:
        """The device, or "imitated" and the card."""
        return self.device if self.imitated is None else f"imitated {self.imitated}"

    @property
    def stamp(self) -> str:
        """The mark at every figure: "imitated RTX 3060", "quick run", both or nothing."""
        quick = any(part.facts.get("quick") for part in self.parts.values())
        return ", ".join(([] if self.imitated is None else [self.name]) + ["quick run"] * quick)

    @property
    def warning(self) -> str:
        """The mark in a sentence."""
        quick = "It was run with --quick, only to see that it works: the figures mean nothing."
        imitated = (
            f"Every figure here is {self.name}: that card's capacity on the device below. "
            "None was measured on that card."
        )
        sentences = [] if self.imitated is None else [imitated]
        return " ".join([*sentences, quick] if "quick" in self.stamp else sentences)

    def fact(self, name: str) -> str:
        """Return a fact of all parts: each value once; for dates the first and the last day."""
        values = [_text(part.facts.get(name)) for part in self.parts.values()]
        if name == "date":
            days = sorted({date.partition("T")[0] for date in values})
            return " to ".join(dict.fromkeys((days[0], days[-1])))
        return ", ".join(dict.fromkeys(values))

    def rows(self, part: str, *words: str) -> list[Fields]:
        """Return the rows of a part's table; no rows if the part was not measured."""
        return self.parts[part].rows(*words) if part in self.parts else []


def read(folder: Path) -> Results:
    """Read the result files in a folder.

    Raises:
        ValueError: If the folder has no result, or results of several devices, or imitated and
            measured results.
    """
    parts: dict[str, Part] = {}
    unreadable = []
    for path in sorted(folder.glob("*.json"), key=_place):
        try:
            part = _part(path)
        except (OSError, ValueError) as error:
            unreadable.append(f"{path.name}: {error}")
            continue
        parts[part.name] = part
    if not parts:
        raise ValueError(f"no results in {folder}: it should hold files such as search.json")
    kinds = {name: _kind(part) for name, part in parts.items()}
    if len(set(kinds.values())) > 1:
        mixed = "; ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ValueError(
            f"{folder} mixes what must not be mixed ({mixed}); give each its own folder"
        )
    return Results(folder=folder, parts=parts, unreadable=tuple(unreadable))


def _part(path: Path) -> Part:
    written = _printable(json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(written, dict) or not isinstance(written.get("cases"), list):
        raise ValueError("it is no result: cases are missing")
    cases = [case for case in written.pop("cases") if isinstance(case, dict)]
    return Part(name=str(written.get("part", path.stem)), facts=written, cases=cases)


def _printable(value: object) -> object:
    """Return JSON without control characters, which names from anywhere might contain."""
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else " " for letter in value)
    if isinstance(value, list):
        return [_printable(one) for one in value]
    if isinstance(value, dict):
        return {str(_printable(name)): _printable(one) for name, one in value.items()}
    return value


def _place(path: Path) -> tuple[int, str]:
    known = path.stem in PARTS
    return (PARTS.index(path.stem) if known else len(PARTS), path.stem)


def _kind(part: Part) -> str:
    card = part.facts.get("imitated")
    return f"{_text(part.facts.get('device'))}" + (f", imitating {card}" if card else "")


def _text(value: object) -> str:
    return "none" if value is None else str(value)
