"""The parts of a report know what they are."""

import pytest

from mbq_export.evaluate.document import GOOD, Cell, Missing, table, text_of


def test_a_table_refuses_a_row_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"1 cells under 2 columns"):
        table(("a", "b"), [("x",)])


def test_columns_of_numbers_are_told_from_text() -> None:
    found = table(
        ("name", "time", "size", "left", "mixed"),
        [
            ("a", "1.2e-6", "12 MB", "", "1"),
            ("b", "45,600", "3.1 %", "nan", "one"),
            ("c", "1.02x", "5 ms", Cell(text="7", tone=GOOD), "2"),
        ],
    )
    assert found.numeric == {1, 2, 3}


def test_what_is_missing_says_why() -> None:
    assert Missing(what="Energy", why="no counter").text == "Energy: not measured: no counter"


def test_a_cell_has_its_text() -> None:
    assert text_of(Cell(text="pass", tone=GOOD)) == text_of("pass") == "pass"
