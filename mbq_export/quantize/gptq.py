"""Error-feedback rounding: what rounding one column costs is taken back by the columns after it.

    H'  = H + damp * mean(diag H) * I          a column that never sees a value (diag 0) rounds to 0
    U   : upper triangular, U' U = inverse of H'
    for each column i:   q = nearest code of w_i on the grid of its group
                         d = (w_i - real(q)) / U_ii
                         w_j -= d U_ij  for all j > i

The grid of a group comes from the weights as they are when its first column is reached; per channel, from the weight
as it was; `quantize.clip` may shrink it. Columns keep their order, because groups must stay contiguous. Updates beyond a slab of 128 columns
are one product per slab. GPTQ, arXiv 2210.17323, algorithm 1.

Inputs of a quantized model differ from those of the full-precision one. `retarget` moves the weight first:

    W*  = W + rho W S inverse(H')              S as in `blocks.gram`

With rho = 1 and no damping that is the least-squares solution of X W*' = X~ W' (METHODS 9.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor

from mbq_export.errors import FormatError, GateError
from mbq_export.schemes.affine import Codes, Grid, codes_on, dequantize, grid_of, quantize
from mbq_export.schemes.base import CHANNEL

if TYPE_CHECKING:
    from mbq_export.quantize.clip import ClippedGrids
    from mbq_export.schemes.base import QuantScheme

SLAB: Final = 128
"""Columns whose errors are handed on together; every group size divides it."""
EXACT_COLUMNS: Final = 8192
"""Up to this K the factor and the columns are float64, beyond it float32, for their memory."""
MORE_DAMPING: Final = 10.0
RETRIES: Final = 3
LEAST_RETRY: Final = 1e-4
"""What the damping is raised to at least, should the user have switched it off."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A Hessian, ready for rounding.

    Attributes:
        upper: (K, K) U, float64 or float32.
        dead: (K,) bool, columns whose inputs are always 0.
        damp: Share of the mean diagonal that was added.
    """

    upper: Tensor
    dead: Tensor
    damp: float


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """One linear after rounding.

    Attributes:
        codes: What is stored.
        rounding: "gptq", or "nearest" if feedback would have been worse.
        why: Reason for "nearest".
        nearest: tr(E H E') / tr(W H W') of nearest rounding, E against the weight that was aimed at.
        kept: The same of `codes`; never larger.
        clipped: The grids of `codes`, if their groups were clipped.
    """

    codes: Codes
    rounding: Literal["gptq", "nearest"]
    why: str | None
    nearest: float
    kept: float
    clipped: ClippedGrids | None = None


def factorise(hessian: Tensor, *, damp: float) -> Factor:
    """Damp and factorise a Hessian; more damping, up to three times, if it has no factor.

    Args:
        hessian: (K, K) symmetric, floating.
        damp: Share of the mean diagonal of the columns that see values.

    Raises:
        GateError: E1103 if it is not finite, E1110 if it has no factor.
    """
    columns = len(hessian)
    exact = hessian.to(torch.float64 if columns <= EXACT_COLUMNS else torch.float32).clone()
    check_hessian(exact)
    diagonal = exact.diagonal()
    dead = diagonal == 0
    # A dead column is alone in the matrix: its value decides nothing, but must not dampen the others.
    size = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    exact[dead, dead] = size
    used = damp
    for _ in range(1 + RETRIES):
        damped = exact + used * size * torch.eye(columns, dtype=exact.dtype)
        upper = _inverse_factor(damped)
        if upper is not None:
            return Factor(upper=upper, dead=dead, damp=used)
        used = max(used * MORE_DAMPING, LEAST_RETRY)
    raise GateError(
        "E1110",
        f"A Hessian of {columns} columns has no Cholesky factor.",
        why=f"tried with up to {used / MORE_DAMPING:g} of its mean diagonal added",
        fix=(f"--damp {used:g}", "more calibration samples", "--rounding nearest"),
    )


def check_hessian(hessian: Tensor) -> None:
    """Refuse a Hessian, or parts of one, with entries that are not finite.

    Raises:
        GateError: E1103.
    """
    bad = int((~torch.isfinite(hessian)).sum())
    if bad:
        raise GateError(
            "E1103",
            f"{bad} entries of a Hessian are not finite.",
            why="activations overflow",
            fix="check the weights: mbq-export inspect MODEL",
        )


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper U with U' U = inverse of a positive definite matrix, None if it is not one.

    The Cholesky factor of the matrix in reverse order, put back in order, is upper; its inverse is U.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed):
        return None
    unit = torch.eye(len(matrix), dtype=matrix.dtype)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
    return upper if bool(torch.isfinite(upper).all()) else None


def retarget(weight: Tensor, shift: Tensor, factor: Factor, *, rho: float) -> Tensor:
    """Move a weight to where it best undoes what quantized blocks before did to its inputs.

    Args:
        weight: (N, K).
        shift: (K, K) S.
        factor: Of the same inputs.
        rho: How far to go, from 0 to 1.

    Returns:
        (N, K) float32.
    """
    wide = weight.to(factor.upper.dtype)
    moved = wide @ shift.to(wide.dtype) @ factor.upper.T @ factor.upper
    return (wide + rho * moved).float()


def feed_back(
    weight: Tensor,
    factor: Factor,
    *,
    scheme: QuantScheme,
    group_size: int,
    clipped: ClippedGrids | None = None,
) -> Codes:
    """Round column by column.

    Args:
        weight: (N, K).
        factor: Of the linear's inputs.
        scheme: Number format.
        group_size: Columns that share a scale, or `CHANNEL`.
        clipped: Gives the grids; None for those of whole ranges.

    Raises:
        FormatError: E4112 for a range that fp16 cannot hold.
    """
    rows, columns = weight.shape
    size = columns // scheme.groups_of(columns, group_size)
    left = weight.to(factor.upper.dtype)
    left = torch.where(factor.dead, 0.0, left)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    grids: list[Grid] = []
    for start in range(0, columns, SLAB):
        stop = min(start + SLAB, columns)
        errors = left.new_empty(rows, stop - start)
        for column in range(start, stop):
            if column % size == 0:
                group = left[:, column : column + size].float()
                grids.append(
                    grid_of(group, scheme=scheme, channel=group_size == CHANNEL)
                    if clipped is None
                    else clipped.of(group, len(grids))
                )
            code, error = _round_column(left[:, column], grids[-1], scheme)
            codes[:, column] = code
            handed_on = error / factor.upper[column, column]
            errors[:, column - start] = handed_on
            rest = factor.upper[column, column + 1 : stop]
            left[:, column + 1 : stop] -= torch.outer(handed_on, rest)
        left[:, stop:] -= errors @ factor.upper[start:stop, stop:]
    return Codes(
        codes=codes,
        scales=torch.stack([grid.scales for grid in grids], dim=1),
        zeros=torch.stack([grid.zeros for grid in grids], dim=1).to(torch.uint8),
        clamped=sum(grid.clamped for grid in grids),
    )


def _round_column(values: Tensor, grid: Grid, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Codes of one column on its group's grid, and what they miss: both (N,).

    The choice is made in float32 like that of nearest rounding, so that both agree where nothing is fed back.
    """
    code = codes_on(values.float()[:, None], grid, scheme=scheme)[:, 0]
    real = (code.float() - grid.zeros.float()) * grid.scales.float()
    return code, values - real


def round_linear(
    weight: Tensor,
    hessian: Tensor,
    factor: Factor,
    *,
    scheme: QuantScheme,
    group_size: int,
    clipped: ClippedGrids | None = None,
) -> Rounded:
    """Round with feedback; keep nearest rounding should that have the smaller error.

    Args:
        weight: (N, K), what the codes are to come near.
        hessian: (K, K) of the linear's inputs, undamped.
        factor: Of `hessian`.
        scheme: Number format.
        group_size: Columns that share a scale, or `CHANNEL`.
        clipped: Gives the grids of feedback; nearest rounding, which it is held against, never clips.

    Raises:
        FormatError: E4110 or E4112.
    """
    wide = weight.to(factor.upper.dtype)
    matrix = hessian.to(wide.dtype)
    size = weighted_square(wide, matrix) or 1.0

    def error(codes: Codes) -> float:
        return weighted_square(dequantize(codes).to(wide.dtype) - wide, matrix) / size

    nearest = quantize(weight, scheme=scheme, group_size=group_size)
    before = error(nearest)
    try:
        found = feed_back(weight, factor, scheme=scheme, group_size=group_size, clipped=clipped)
    except FormatError as overflow:
        if overflow.code != "E4112":
            raise
        return Rounded(
            codes=nearest, rounding="nearest", why="gptq-overflow", nearest=before, kept=before
        )
    after = error(found)
    if after <= before:
        return Rounded(
            codes=found, rounding="gptq", why=None, nearest=before, kept=after, clipped=clipped
        )
    return Rounded(codes=nearest, rounding="nearest", why="gptq-worse", nearest=before, kept=before)


def weighted_square(change: Tensor, hessian: Tensor) -> float:
    """tr(E H E'), the weighed sum of squared output errors: E (N, K), H (K, K)."""
    return float(((change @ hessian) * change).sum())
