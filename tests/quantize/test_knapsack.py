"""The best items are found, exactly, and ties go to the earlier ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq_export.quantize.knapsack import best_items, cell_of

SUM_OF_GAINS = 1e-9
"""Sums of a dozen gains in another order differ in the last bits."""


def by_trying_all(gains: list[float], costs: list[int], budget: int) -> float:
    """The largest sum of gains within the budget, over all subsets."""
    subsets = itertools.product([False, True], repeat=len(gains))
    return max(
        sum(gain for gain, taken in zip(gains, subset, strict=True) if taken)
        for subset in subsets
        if sum(cost for cost, taken in zip(costs, subset, strict=True) if taken) <= budget
    )


@pytest.mark.parametrize(
    ("budget", "taken"), [(1, [False, True]), (2, [True, False]), (3, [True, True])]
)
def test_room_for_one_two_and_three_takes_the_second_the_first_and_both(
    budget: int, taken: list[bool]
) -> None:
    """Golden M1: sizes (2, 1), gains (4, 3)."""
    assert best_items([4.0, 3.0], [2, 1], budget) == taken


@pytest.mark.parametrize("seed", range(8))
def test_twelve_random_items_reach_what_trying_all_subsets_reaches(seed: int) -> None:
    """Golden K1."""
    rng = np.random.default_rng(seed)
    gains = rng.lognormal(sigma=2, size=12).tolist()
    costs = rng.integers(1, 60, 12).tolist()
    budget = int(rng.integers(1, sum(costs)))
    taken = best_items(gains, costs, budget)
    assert sum(np.array(costs)[taken]) <= budget
    reached = float(sum(np.array(gains)[taken]))
    assert reached == pytest.approx(by_trying_all(gains, costs, budget), rel=SUM_OF_GAINS)


def test_equally_good_items_give_way_to_earlier_ones() -> None:
    assert best_items([1.0, 1.0, 1.0], [4, 4, 4], 8) == [True, True, False]
    assert best_items([2.0, 1.0, 1.0], [2, 1, 1], 2) == [True, False, False]


def test_items_without_a_gain_are_left_where_there_is_room() -> None:
    assert best_items([0.0, -1.0, 1.0], [1, 1, 1], 3) == [False, False, True]


def test_an_empty_budget_and_no_items_take_nothing() -> None:
    assert best_items([1.0], [1], 0) == [False]
    assert best_items([], [], 5) == []


def test_widths_of_models_are_counted_without_loss() -> None:
    """Units of a 7B model: each extra byte count is a multiple of 229376, far above 64 KiB in few cells."""
    extra = [n * 3584 // 8 for n in (4608, 3584, 37888)] + [3584 * 18944 // 8]
    budget = 28 * sum(extra) // 2
    assert cell_of(extra, budget) == 229376
    assert all(cost % cell_of(extra, budget) == 0 for cost in extra)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.001, 100), st.integers(1, 10**7)), min_size=1, max_size=8),
    st.integers(0, 4 * 10**7),
)
def test_coarse_cells_never_break_the_budget(items: list[tuple[float, int]], budget: int) -> None:
    gains, costs = [list(column) for column in zip(*items, strict=True)]
    taken = best_items(gains, costs, budget, most_cells=64)
    assert sum(cost for cost, each in zip(costs, taken, strict=True) if each) <= budget
