"""Amounts are short and true."""

import math
from typing import Any

import pytest

from mbq_export.evaluate.wording import figure, percent, percents, plain, short_hash, size, visible


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (12.345, "12.3"),
        (0.99999, "0.99999"),
        (1.004, "1.004"),
        (130.0, "130"),
        (45_600.0, "45,600"),
        (-1234.0, "-1,230"),
        (1.23456e-6, "1.23e-6"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert plain(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3.2e15, "3,200 TB")]
)
def test_bytes_are_shown_in_the_unit_that_keeps_them_short(value: float, shown: str) -> None:
    assert size(value) == shown


@pytest.mark.parametrize("value", [None, "3", [], math.nan, True], ids=str)
def test_what_is_no_number_is_not_shown(value: Any) -> None:
    assert (size(value), figure(value), percent(value)) == ("", "", "")


def test_a_range_of_shares_names_its_unit_once() -> None:
    assert percents(0.9, 0.925) == "90.0 to 92.5 %"
    assert not percents(0.9, None)


def test_hashes_are_cut() -> None:
    assert short_hash(f"sha256:{'ab' * 32}") == "abababababab…"
    assert short_hash("abc") == "abc"
    assert not short_hash(None)


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\u202eevil", "\ud800", "\x9b2J", "\u2066x"])
def test_characters_that_steer_are_blanked(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert shown.encode()
