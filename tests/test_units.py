import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.units import format_bytes, parse_bytes

drawn = settings(deadline=None, derandomize=True)
counts = st.integers(1, 10**16)
TEXT = {
    "24GiB": 24 * 2**30,
    "24GB": 24 * 10**9,
    "24 gib": 24 * 2**30,
    " 1.5 KiB ": 1536,
    ".5KB": 500,
    "2.kb": 2000,
    "512": 512,
    "512b": 512,
    "512 B": 512,
    "1KiB": 1024,
    "1MB": 10**6,
    "1MiB": 2**20,
    "1TB": 10**12,
    "1TiB": 2**40,
    "1.001KB": 1001,  # Not 1000, which a float would make of it.
    "9007199254740993": 2**53 + 1,
    "1.9B": 1,
}


@pytest.mark.parametrize(("text", "count"), TEXT.items())
def test_text_is_read_exactly(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@drawn
@given(count=counts)
def test_a_count_of_bytes_is_itself_as_number_and_as_text(count: int) -> None:
    assert parse_bytes(count) == parse_bytes(str(count)) == parse_bytes(f"{count} B") == count


@drawn
@given(count=counts)
def test_what_is_printed_reads_back_as_nearly_the_same(count: int) -> None:
    number, unit = format_bytes(count).split()
    step = parse_bytes(f"1 {unit}") * {"B": 0, "TiB": 0.01}.get(unit, 0.1)
    assert abs(parse_bytes(format_bytes(count)) - count) <= step / 2 + 1
    assert float(number) < 1024 or unit == "TiB"


@drawn
@given(count=counts)
def test_what_is_printed_prints_again_as_the_same(count: int) -> None:
    text = format_bytes(count)
    assert format_bytes(parse_bytes(text)) == text


@drawn
@given(one=counts, other=counts)
def test_more_bytes_never_print_as_fewer(one: int, other: int) -> None:
    least, most = sorted((one, other))
    assert parse_bytes(format_bytes(least)) <= parse_bytes(format_bytes(most))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (256_998_441, "245.1 MiB"),
        (24 * 2**30, "24.0 GiB"),
        (3 * 2**40 // 2, "1.50 TiB"),
        (5000 * 2**40, "5000.00 TiB"),
        (-1536, "-1.5 KiB"),
        (-1, "-1 B"),
    ],
)
def test_bytes_as_people_read_them(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    "text",
    ["8GB?", "", " ", "GiB", "24 GiB 3", "24PiB", "24G", "-1GiB", "1e9", "1.2.3", "inf", "."],
)
def test_text_that_cannot_be_read_is_shown_with_the_way_out(text: str) -> None:
    with pytest.raises(ValueError, match='"24GiB"') as caught:
        parse_bytes(text, name="memory_limit")
    assert str(caught.value).startswith(f"memory_limit cannot be read from {text!r}; write")


@pytest.mark.parametrize("size", [0, -1, "0", "0 GiB", "0.5", "0.0001KB"])
def test_nothing_is_no_size(size: int | str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        parse_bytes(size, name="headroom")
    assert str(caught.value) == f"headroom must be above zero bytes, got {size!r}"


@pytest.mark.parametrize("size", [True, False, 2.5, None, b"24GiB", math.inf, np.float64(8)])
def test_what_is_neither_an_integer_nor_text_is_a_bad_type(size: int) -> None:
    with pytest.raises(TypeError) as caught:
        parse_bytes(size)
    assert str(caught.value) == (
        f'size must be bytes as an integer or text like "24GiB", got {size!r}'
    )


def test_a_number_beyond_all_bounds_is_still_read() -> None:
    assert parse_bytes("9" * 400) == int("9" * 400)
