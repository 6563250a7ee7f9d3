"""Which items to take: the largest sum of gains whose costs fit, exactly, by dynamic programming.

    best[i][c] = max( best[i+1][c],  gain_i + best[i+1][c - cost_i] )        items i.. with c cells left

Items are decided first to last, and where both answers are equally good the item is taken: ties go to earlier ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_CELLS: Final = 1 << 17
"""Cells of a table: a second and 15 MB for the 112 units of a 7B model.

Costs are counted in their greatest common divisor, which loses nothing: widths of models are multiples of large powers
of two, so a few thousand cells hold even a 7B model exactly. Only where that takes more cells - times in nanoseconds,
odd widths - a cell grows and costs are rounded up to it. A fixed cell of 64 KiB would be coarser everywhere, and larger
than most units of a small model.
"""


def cell_of(costs: Sequence[int], budget: int, *, most_cells: int = MOST_CELLS) -> int:
    """What costs are counted in: as small as loses nothing, unless that takes too many cells.

    Args:
        costs: Positive.
        budget: What may be spent, 0 or more.
        most_cells: Of a table.
    """
    return max(math.gcd(*costs), -(-budget // most_cells), 1)


def best_items(
    gains: Sequence[float], costs: Sequence[int], budget: int, *, most_cells: int = MOST_CELLS
) -> list[bool]:
    """Choose items with the largest sum of gains.

    Args:
        gains: One per item; items without a positive one are never taken.
        costs: Positive, one per item.
        budget: Most that they may cost together.
        most_cells: Beyond these, costs are rounded up; what is chosen still fits the budget.

    Returns:
        One answer per item.
    """
    if not costs or budget < 0:
        return [False] * len(costs)
    cell = cell_of(costs, budget, most_cells=most_cells)
    weights = [-(-cost // cell) for cost in costs]
    room = min(budget // cell, sum(weights))
    best = np.zeros(room + 1)
    taken = np.zeros((len(costs), room + 1), bool)
    for place in reversed(range(len(costs))):
        weight, gain = weights[place], gains[place]
        if gain <= 0 or weight > room:
            continue
        found = gain + best[: room + 1 - weight]
        taken[place, weight:] = found >= best[weight:]
        best[weight:] = np.maximum(best[weight:], found)
    chosen, left = [], room
    for place, weight in enumerate(weights):
        take = bool(taken[place, left])
        left -= weight if take else 0
        chosen.append(take)
    return chosen
