"""The page of what a search costs is what its data say."""

import json
from pathlib import Path

from docs.benchmarks.calibration_cost_page import agreement, page

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
DOCUMENT = json.loads((FOLDER / "calibration_cost.json").read_text())


def test_page_is_made_from_the_data_beside_it() -> None:
    assert (FOLDER / "calibration_cost.md").read_text() == page(DOCUMENT)


def test_every_ratio_is_of_the_times_beside_it() -> None:
    for case in DOCUMENT["cases"].values():
        rows = [row for row in case["rows"] if "naive" in row]
        assert rows
        for row in rows:
            ratio = row["naive"]["cpu_s"] / row["package"]["cpu_s"]
            assert abs(row["ratio"] / ratio - 1) < 1e-3


def test_a_missed_target_is_called_one() -> None:
    words = [
        "reached" if case["ratio"]["median"] >= DOCUMENT["target"] else "missed"
        for case in DOCUMENT["cases"].values()
    ]
    text = page(DOCUMENT)
    assert [text.count(f"x: {word} |") for word in ("reached", "missed")] == [
        words.count("reached"),
        words.count("missed"),
    ]


def test_units_that_differ_are_counted() -> None:
    for case in DOCUMENT["cases"].values():
        alike, units, worst = agreement(case)
        assert 0 < alike <= units
        assert 0 <= worst < 0.01
