"""The page about predicted errors says what its data says, and the prediction ranks units as it must."""

import json
from typing import Any

import numpy as np
import pytest

from docs.benchmarks.widths import HERE, page, spearman

LEAST_CORRELATION = 0.7
"""Below it the order in which units get bits would be a guess (METHODS 11)."""
DIGITS = 1e-4

FOUND = json.loads((HERE / "widths.json").read_text())


def test_page_is_made_from_the_data_beside_it() -> None:
    assert (HERE / "widths.md").read_text() == page(FOUND)


@pytest.mark.parametrize("result", FOUND["results"], ids=lambda result: result["method"])
def test_predicted_errors_rank_units_as_measured_divergences_do(result: dict[str, Any]) -> None:
    errors, divergences = (
        np.array([unit[key] for unit in result["units"]]) for key in ("error", "kl")
    )
    assert spearman(errors, divergences) == pytest.approx(result["spearman"], abs=DIGITS)
    assert result["spearman"] >= LEAST_CORRELATION


@pytest.mark.parametrize("result", FOUND["results"], ids=lambda result: result["method"])
def test_chosen_widths_lose_less_than_the_opposite_choice(result: dict[str, Any]) -> None:
    compared = [row for row in result["mixtures"] if "opposite" in row]
    assert compared
    assert all(row["kl"] < row["opposite"]["kl"] for row in compared)


def test_rank_correlation_of_an_order_and_of_its_reverse() -> None:
    values = np.array([3.0, 1.0, 2.0])
    assert spearman(values, np.exp(values)) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
