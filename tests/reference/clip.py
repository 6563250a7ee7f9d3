"""Clipping of one group in one row, judged by what each token's output loses. Nothing here is fast or shared.

METHODS 10, in token form: the output error of a token is the product of its inputs and the weights' errors.
"""

import torch
from torch import Tensor

from tests.reference.feedback import Format, grid, rounded

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)


def real(group: Tensor, shrink: float, kind: Format) -> Tensor:
    """What the weights (N, size) of a group become on the grid of their shrunk range."""
    step, zero = grid(group.float() * shrink, kind)
    columns = [rounded(group[:, column], step, zero, kind) for column in range(group.shape[1])]
    return torch.stack(columns, dim=1)


def loss(row: Tensor, made: Tensor, rows: Tensor, c: Tensor) -> float:
    """Weighed sum over tokens of squared output errors: weights (size,), inputs (T, size), c (T,)."""
    total = 0.0
    for token, weight in zip(rows.double(), c.tolist(), strict=True):
        total += weight * float(token @ (made.double() - row.double())) ** 2
    return total


def shrinks(
    weight: Tensor, rows: Tensor, c: Tensor, kind: Format, tried: tuple[float, ...] = SHRINKS
) -> list[list[float]]:
    """The shrink of every (row, group) of a weight (N, K), given inputs (T, K)."""
    size = kind.group_size or weight.shape[1]
    chosen = []
    for row in weight:
        of_row = []
        for start in range(0, len(row), size):
            group, read = row[start : start + size], rows[:, start : start + size]
            losses = [loss(group, real(group[None], f, kind)[0], read, c) for f in tried]
            of_row.append(tried[losses.index(min(losses))])
        chosen.append(of_row)
    return chosen


def clipped(weight: Tensor, rows: Tensor, c: Tensor, kind: Format) -> Tensor:
    """The real numbers that a clipped and rounded weight consists of, (N, K)."""
    size = kind.group_size or weight.shape[1]
    found = torch.zeros(weight.shape)
    for number, of_row in enumerate(shrinks(weight, rows, c, kind)):
        for group, shrink in enumerate(of_row):
            part = slice(group * size, (group + 1) * size)
            found[number, part] = real(weight[number : number + 1, part], shrink, kind)[0]
    return found
