"""Widths of units are told as they were decided, and nothing is made up for what is missing."""

from mbq_export.evaluate.width_table import HEADER, width_rows, width_summary

MIXED = {
    "average_bits": 3.25,
    "predicted": {"all_3": 4.0, "chosen": 2.5, "all_4": 1.0},
    "units": [
        {"layer": 0, "unit": "qkv", "bits": 4, "fixed": False, "error": {"3": 2.0, "4": 0.5}},
        {"layer": 0, "unit": "o", "bits": 3, "fixed": True},
    ],
}


def test_every_unit_has_a_row_with_its_predicted_errors() -> None:
    rows = width_rows(MIXED)
    assert rows == [("0", "qkv", "4", "no", "2", "0.5"), ("0", "o", "3", "yes", "", "")]
    assert {len(row) for row in rows} == {len(HEADER)}


def test_the_summary_compares_the_choice_with_all_at_three_and_at_four() -> None:
    assert width_summary(MIXED) == (
        "3.25 bits on average, without scales; predicted error: all at 3 4, chosen 2.5, all at 4 1"
    )


def test_widths_by_name_have_no_prediction() -> None:
    told = width_summary({**MIXED, "predicted": None})
    assert told == "3.25 bits on average, without scales; widths were given by name"


def test_a_checkpoint_without_a_mixture_says_nothing() -> None:
    assert width_summary(None) == ""
    assert width_rows(None) == []
    assert width_rows({"units": "many"}) == []
