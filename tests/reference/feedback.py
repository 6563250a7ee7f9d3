"""Error-feedback rounding, one column at a time, with the inverse of what is left written out anew each time.

Nothing here is fast or shared with the package. METHODS 2.1, 2.2, 9.2 and 9.5; arXiv 2210.17323, equations 2 and 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format: width, zero points or none, columns that share a scale (0: a whole row)."""

    bits: int
    symmetric: bool
    group_size: int


def grid(group: Tensor, kind: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row of a group of columns, (N,) each, in float32 as the format says."""
    group = group.float()
    if kind.symmetric:
        top = 2 ** (kind.bits - 1) - 1
        if not kind.group_size:
            return group.abs().amax(1).clamp(min=1e-5) / top, torch.zeros(len(group))
        step = (group.abs().amax(1) / top).clamp(min=2.0**-14)
        return step.half().float(), torch.zeros(len(group))
    top = 2**kind.bits - 1
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    step = ((high - low) / top).clamp(min=2.0**-14).half().float()
    return step, torch.round(-low / step).clamp(0, top)


def rounded(column: Tensor, step: Tensor, zero: Tensor, kind: Format) -> Tensor:
    """The real number that each weight of a column becomes, (N,)."""
    least, most = (
        (-(2 ** (kind.bits - 1)), 2 ** (kind.bits - 1) - 1)
        if kind.symmetric
        else (0, 2**kind.bits - 1)
    )
    code = (torch.round(column.float() / step) + zero).clamp(least, most)
    return (code - zero) * step


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H with a share of its mean live diagonal added; dead columns stand alone."""
    found = hessian.double().clone()
    live = found.diagonal() > 0
    mean = found.diagonal()[live].mean() if live.any() else torch.tensor(1.0)
    found[~live, ~live] = mean.double()
    return found + damp * mean * torch.eye(len(found), dtype=torch.float64)


def feed_back(weight: Tensor, hessian: Tensor, kind: Format, *, damp: float = 0.01) -> Tensor:
    """Round (N, K) column by column; return the (N, K) real numbers of the codes."""
    columns = weight.shape[1]
    left = weight.double().clone()
    left[:, hessian.diagonal() == 0] = 0.0
    matrix = damped(hessian, damp)
    size = kind.group_size or columns
    found = torch.zeros(weight.shape)
    for column in range(columns):
        if column % size == 0:
            step, zero = grid(left[:, column : column + size], kind)
        found[:, column] = rounded(left[:, column], step, zero, kind)
        inverse = torch.linalg.inv(matrix[column:, column:])
        missed = (left[:, column] - found[:, column].double()) / inverse[0, 0]
        left[:, column:] -= missed[:, None] * inverse[0]
    return found


def retargeted(weight: Tensor, rows: Tensor, wanted: Tensor, rho: float, *, damp: float) -> Tensor:
    """Move a weight so that it makes of `rows` (T, K) what it made of `wanted` (T, K)."""
    x, target, wide = rows.double(), wanted.double(), weight.double()
    matrix = damped(x.T @ x, damp)
    return wide + rho * wide @ (target - x).T @ x @ torch.linalg.inv(matrix)
