"""When two answers count as equal: one named bound per way of computing, each with its reason.

    || y - ref ||  <=  L2 * || ref ||                                     over all finite elements
    | y - ref |    <=  r * | ref | + a * slack + half a subnormal step    in every element

``slack`` is sum(|w| |x|), plus |bias| and |residual|: the size of what was added up.
"""

import enum
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

SKINNY_FP16_L2: Final = 3.0e-4
"""Integers and fp32 sums: only the output is rounded (2.0e-4 to 2.3e-4 expected of random values)."""
SKINNY_BF16_L2: Final = 2.5e-3
"""As above, with 8 bits of mantissa in place of 11."""
GEMM_FP16_L2: Final = 6e-4
"""The weight (u - z) * s is rounded once, then the output."""
GEMM_BF16_L2: Final = 4e-3
"""As above."""
HALF_SUMS_L2: Final = 3e-3
"""fp16 accumulation, an option that is off by default."""
FP32_SUMS: Final = 2e-6
"""Rounding of fp32 sums of up to some ten thousand products, per unit of slack."""
FP16_ROUNDING: Final = 2.0**-10
"""Twice the half ulp of one rounding to fp16, relative."""
BF16_ROUNDING: Final = 2.0**-7
"""Twice the half ulp of one rounding to bf16, relative."""
FP16_WEIGHT: Final = 2.0**-11
"""Half an ulp: how far a weight rounded to fp16 may be off, relative."""
BF16_WEIGHT: Final = 2.0**-8
"""Half an ulp of bf16."""
HALF_SUBNORMAL: Final = 2.0**-25
"""Half the step of subnormal fp16: the absolute error of rounding a tiny answer. Nothing in bf16's range."""

MANY: Final = 1024
"""Elements over which the norm of rounding errors settles near its mean."""
FEW_FACTOR: Final = 2
"""Below that the norm may be one element's, and one rounding is up to 2**-11 = 4.9e-4 (bf16: 2**-8 = 3.9e-3)."""


class Family(enum.Enum):
    """How a kernel computes."""

    SKINNY = "integers and fp32 sums; only the output is rounded"
    GEMM = "weights rounded once to 16 bit, fp32 sums"
    GEMM_HALF_SUMS = "weights rounded once, fp16 sums"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Bounds of one comparison; the formula is in the module's docstring.

    Attributes:
        relative_l2: Norm of the difference over norm of the reference.
        relative: ``r`` of the elementwise bound.
        per_slack: ``a`` of the elementwise bound; infinite where no elementwise bound is promised.
    """

    relative_l2: float
    relative: float
    per_slack: float


def tolerance_for(family: Family, dtype: torch.dtype) -> Tolerance:
    """The bounds of a family in a dtype."""
    half = dtype == torch.float16
    rounding = FP16_ROUNDING if half else BF16_ROUNDING
    if family is Family.GEMM_HALF_SUMS:
        return Tolerance(relative_l2=HALF_SUMS_L2, relative=rounding, per_slack=np.inf)
    if family is Family.GEMM:
        return Tolerance(
            relative_l2=GEMM_FP16_L2 if half else GEMM_BF16_L2,
            relative=rounding,
            per_slack=FP32_SUMS + (FP16_WEIGHT if half else BF16_WEIGHT),
        )
    return Tolerance(
        relative_l2=SKINNY_FP16_L2 if half else SKINNY_BF16_L2,
        relative=rounding,
        per_slack=FP32_SUMS,
    )


def difference(
    y: NDArray[np.float64],
    reference: NDArray[np.float64],
    *,
    slack: NDArray[np.float64],
    tolerance: Tolerance,
) -> str:
    """Say what exceeds the tolerance, or nothing.

    Args:
        y: (M, N) finite.
        reference: (M, N) finite.
        slack: (M, N), see the module's docstring.
        tolerance: The bounds.

    Returns:
        The empty string, or one line with the figure, its bound and the worst element.
    """
    error = np.abs(y - reference)
    if not error.size:
        return ""
    bound = tolerance.relative * np.abs(reference) + HALF_SUBNORMAL
    if np.isfinite(tolerance.per_slack):
        excess = error - bound - tolerance.per_slack * slack
        row, column = (int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
        if excess[row, column] > 0:
            return (
                f"y[{row}, {column}] = {y[row, column]:.6g} for {reference[row, column]:.6g}, off by "
                f"{error[row, column]:.3g}, allowed {error[row, column] - excess[row, column]:.3g}"
                f" ({int((excess > 0).sum())} of {y.size} elements)"
            )
    norm = float(np.linalg.norm(reference))
    promised = tolerance.relative_l2 * (1 if y.size >= MANY else FEW_FACTOR)
    # Answers so small that fp16 stores them in whole subnormal steps have no relative accuracy to promise.
    allowed = promised * norm + HALF_SUBNORMAL * float(np.sqrt(y.size))
    found = float(np.linalg.norm(error))
    if found > allowed:
        row, column = (int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
        return (
            f"relative L2 {found / max(norm, 1e-30):.3g}, allowed {promised:.3g}; "
            f"largest at y[{row}, {column}]"
        )
    return ""
