"""Format bytes, shares and counts for people, and parse bytes."""

import re
from fractions import Fraction
from typing import Final

Size = int | str  # Bytes, or text with a unit.

_FACTORS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")


def parse_bytes(size: Size, *, name: str = "size") -> int:
    """Return ``size`` in bytes.

    Args:
        size: A positive number of bytes, or text with a unit from B to TiB in upper or lower case:
            ``"24GiB"`` counts by 1024, ``"24GB"`` by 1000.
        name: The name of the argument, for the error.

    Raises:
        TypeError: If ``size`` is neither an integer nor text.
        ValueError: If the text cannot be parsed, or the size is below 1.

    Example:
        >>> parse_bytes("1.5KiB")
        1536
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f'{name} must be bytes as an integer or text like "24GiB", got {size!r}')
    count = size if isinstance(size, int) else _read(size, name)
    if count < 1:
        raise ValueError(f"{name} must be above zero bytes, got {size!r}")
    return count


def parse_headroom(size: Size) -> int:
    """Return the headroom in bytes; unlike ``parse_bytes``, it may be 0."""
    return 0 if size in (0, "0") and size is not False else parse_bytes(size, name="headroom")


def count(number: int, noun: str, nouns: str = "") -> str:
    """Return ``number`` with its noun in the singular or plural: ``"1 trial"``, ``"2 trials"``."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def _read(text: str, name: str) -> int:
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"{name} cannot be read from {text!r}; write a number and a unit: "
            '"24GiB" (by 1024), "24GB" (by 1000) or bytes'
        )
    return int(Fraction(match[1]) * factor)  # A float would lose a byte: "1.001KB" is 1001.


def format_bytes(count: int) -> str:
    """Return ``count`` bytes as text for people, in powers of 1024: ``"245.1 MiB"``."""
    value = float(abs(count))
    sign = "-" if count < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(value, 1) < 1024:  # As it is printed: 1023.96 KiB is 1.0 MiB.
            return f"{sign}{value:.0f} B" if unit == "B" else f"{sign}{value:.1f} {unit}"
        value /= 1024
    return f"{sign}{value:.2f} TiB"


def format_share(share: float) -> str:
    """Return a share of 1 as text for people: ``"12.5%"``; ``"<0.1%"`` if it would round to 0."""
    return f"{share:.1%}" if share >= 0.0005 or not share else "<0.1%"
