"""The published quality table is what its data say, and claims no more than they show."""

import json
from pathlib import Path
from typing import Any

import pytest

from docs.benchmarks.quality_page import page
from docs.benchmarks.quality_result import targets
from docs.benchmarks.quality_words import findings, reached
from mbq_export.evaluate.tolerances import SAMPLE_ACCURACY_FLOOR, SAMPLE_W3_LOSS, STRESS_RTN_LOSS

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
DOCUMENT = json.loads((FOLDER / "quality.json").read_text())


def test_page_is_made_from_the_data_beside_it() -> None:
    assert (FOLDER / "quality.md").read_text() == page(DOCUMENT)


def test_table_holds_the_baselines_and_mbq_on_enough_questions() -> None:
    models = {(row["variant"], row["format"], row["method"]) for row in DOCUMENT["rows"]}
    assert models >= {
        (variant, form, method)
        for variant in ("plain", "stress")
        for form, methods in (
            ("fp", ("fp",)),
            ("w3-g128", ("rtn", "awq", "mbq")),
            ("w3-g64", ("rtn", "awq", "mbq")),
        )
        for method in methods
    }
    assert all(row["questions"] >= 5000 for row in DOCUMENT["rows"])


def test_every_cell_is_measured_or_named_as_missing() -> None:
    fields = ("model", "variant", "format", "method", "draw")
    rows = [tuple(row[field] for field in fields) for row in DOCUMENT["rows"]]
    missing = [tuple(cell[field] for field in fields) for cell in DOCUMENT["not_measured"]]
    assert len({*rows, *missing}) == len(rows) + len(missing)
    text = (FOLDER / "quality.md").read_text()
    assert ("## Not measured" in text) == bool(
        missing or not all(one["measured"] for one in DOCUMENT["setup"]["formats"].values())
    )


def accuracy(variant: str, form: str, method: str) -> list[float]:
    return [
        row["accuracy"]["value"]
        for row in DOCUMENT["rows"]
        if (row["model"], row["variant"], row["format"], row["method"])
        == ("seed0", variant, form, method)
    ]


def test_published_figures_keep_the_projects_promises() -> None:
    (full,) = accuracy("plain", "fp", "fp")
    assert full >= SAMPLE_ACCURACY_FLOOR
    assert min(accuracy("plain", "w3-g128", "mbq")) >= full - SAMPLE_W3_LOSS
    (rounded,) = accuracy("stress", "w3-g128", "rtn")
    for method in ("awq", "mbq"):
        assert min(accuracy("stress", "w3-g128", method)) >= rounded + STRESS_RTN_LOSS


def pair(low: float, high: float, kl_low: float, kl_high: float, draw: int) -> dict[str, object]:
    return {
        "model": "seed0",
        "variant": "plain",
        "format": "w3-g128",
        "against": "awq",
        "method": "mbq",
        "draw": draw,
        "accuracy": {"value": (low + high) / 2, "low": low, "high": high},
        "kl": {"value": (kl_low + kl_high) / 2, "low": kl_low, "high": kl_high},
    }


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([pair(0.1, 0.2, -0.2, -0.1, 0)], "KL better (W3); exact match better (W3)"),
        ([pair(-0.2, -0.1, 0.1, 0.2, 0)], "KL worse (W3); exact match worse (W3)"),
        (
            [pair(0.1, 0.2, -0.2, -0.1, 0), pair(-0.1, 0.2, -0.2, 0.1, 1)],
            "KL no difference established (W3); exact match no difference established (W3)",
        ),
    ],
)
def test_sentences_state_what_every_draw_and_seed_shows(
    pairs: list[dict[str, object]], sentence: str
) -> None:
    assert list(findings(pairs, {"w3-g128": "W3"}))[1] == f"- plain, mbq against awq: {sentence}."


def seeds(method: str, *values: tuple[float, float]) -> dict[str, Any]:
    """One method at W3 g128 on as many training seeds: loss of exact match and KL of each."""
    return {
        "variant": "plain",
        "format": "w3-g128",
        "method": method,
        "models": {
            f"seed{index}": {"accuracy": 0.9, "lost": lost, "kl": kl}
            for index, (lost, kl) in enumerate(values)
        },
        "kl_geometric_mean": 0.0,
    }


@pytest.mark.parametrize(
    ("kl", "lost", "met"),
    [
        # 1/2 and 1/8 make 1/4 in the geometric mean; the arithmetic one would miss.
        ((0.005, 0.00125), (0.01, 0.0), (True, False, True)),
        ((0.005, 0.0025), (0.0, 0.011), (False, False, False)),
        ((0.00124, 0.00124), (-0.01, 0.0), (True, True, True)),
    ],
)
def test_targets_are_judged_over_all_training_seeds(
    kl: tuple[float, float], lost: tuple[float, float], met: tuple[bool, bool, bool]
) -> None:
    found = targets(
        [
            seeds("mbq", (0.0, 0.01), (0.0, 0.01)),
            seeds("mbq+", *zip(lost, kl, strict=True)),
        ]
    )
    judged = [one for one in found if one["met"] is not None]
    assert tuple(one["met"] for one in judged) == met
    assert all(one["variant"] == "plain" and one["format"] == "W3 g128" for one in judged)


def test_a_target_without_its_cells_is_not_measured() -> None:
    assert {one["met"] for one in targets([])} == {None}
    assert "met:" not in reached(targets([]))
    assert "**missed**" not in reached(targets([]))
