"""The page on compiled kernels says what the checked-in budget says."""

import json

from docs.benchmarks.kernel_code import BUDGET, PAGE, page


def test_page_is_made_from_the_budget() -> None:
    again = "python -m docs.benchmarks.kernel_code"
    assert PAGE.read_text() == page(json.loads(BUDGET.read_text())), f"run {again}"


def test_a_kernel_over_the_limit_is_named() -> None:
    budget = json.loads(BUDGET.read_text())
    budget["kernels"]["skinny<WeightOnly<W3, F16, 1>, 1, 2>"]["90"]["loop"] *= 2
    assert "W3 F16, group 128 as 1, 2 on sm_90 (3." in page(budget)
