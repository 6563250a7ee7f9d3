"""The published quality table is what its data say, and claims no more than they show."""

import json
from pathlib import Path

import pytest

from docs.benchmarks.quality_page import page, sentences
from mbq_export.evaluate.tolerances import SAMPLE_ACCURACY_FLOOR, SAMPLE_W3_LOSS, STRESS_RTN_LOSS

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
DOCUMENT = json.loads((FOLDER / "quality.json").read_text())


def test_page_is_made_from_the_data_beside_it() -> None:
    assert (FOLDER / "quality.md").read_text() == page(DOCUMENT)


def test_table_holds_every_model_on_enough_questions() -> None:
    models = {(row["variant"], row["group"], row["method"]) for row in DOCUMENT["rows"]}
    assert models == {
        (variant, group, method)
        for variant in ("plain", "stress")
        for group, methods in (
            (0, ("fp",)),
            (128, ("rtn", "awq", "mbq")),
            (64, ("rtn", "awq", "mbq")),
        )
        for method in methods
    }
    assert all(row["questions"] >= 5000 for row in DOCUMENT["rows"])
    assert DOCUMENT["setup"]["calibration"]["seeds"] >= 3


def accuracy(variant: str, group: int, method: str) -> list[float]:
    return [
        row["accuracy"]["value"]
        for row in DOCUMENT["rows"]
        if (row["variant"], row["group"], row["method"]) == (variant, group, method)
    ]


def test_published_figures_keep_the_projects_promises() -> None:
    (full,) = accuracy("plain", 0, "fp")
    assert full >= SAMPLE_ACCURACY_FLOOR
    assert min(accuracy("plain", 128, "mbq")) >= full - SAMPLE_W3_LOSS
    (rounded,) = accuracy("stress", 128, "rtn")
    for method in ("awq", "mbq"):
        assert min(accuracy("stress", 128, method)) >= rounded + STRESS_RTN_LOSS


def pair(low: float, high: float, kl_low: float, kl_high: float, seed: int) -> dict[str, object]:
    return {
        "variant": "plain",
        "group": 128,
        "against": "awq",
        "method": "mbq",
        "seed": seed,
        "accuracy": {"value": (low + high) / 2, "low": low, "high": high},
        "kl": {"value": (kl_low + kl_high) / 2, "low": kl_low, "high": kl_high},
    }


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([pair(0.1, 0.2, -0.2, -0.1, 0)], "accuracy better; KL better"),
        ([pair(-0.2, -0.1, 0.1, 0.2, 0)], "accuracy worse; KL worse"),
        (
            [pair(0.1, 0.2, -0.2, -0.1, 0), pair(-0.1, 0.2, -0.2, 0.1, 1)],
            "accuracy no difference established; KL no difference established",
        ),
    ],
)
def test_sentences_state_what_every_draw_shows(
    pairs: list[dict[str, object]], sentence: str
) -> None:
    assert list(sentences(pairs))[1] == f"- plain, g128, mbq against awq: {sentence}."
