"""How far a module's output moved, summed per token class and weighed into one number.

    D = y_fp - y_q                                                     (T, N)

    mae, balanced      ( sum_A |D| + r sum_V |D| + p sum_P |D| ) / ( (N_A + N_V [+ N_P if p > 0]) N )
    mse, balanced      mean_A D**2 + r mean_V D**2 + p mean_P D**2          one mean per class
    unbalanced         mean of |D| or D**2 over all real tokens

All of them are linear in the four per-class sums, so sums are kept in float64 and added over any partition
of the tokens; never a mean of means (MBQ, arXiv 2412.19509, section 3.3; METHODS 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mbq_export.blocks.tokens import class_mask
from mbq_export.families.base import ANSWER, PAD, PROMPT, TOKEN_CLASSES, VISION

Loss = Literal["mae", "mse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassWeights:
    """Weights relative to answer tokens.

    Attributes:
        vision: r, the measured ratio of gradients.
        prompt: p; 0 leaves prompt tokens out of the count too.
    """

    vision: float
    prompt: float = 0.0


def token_errors(difference: Tensor, *, loss: Loss) -> Tensor:
    """Sum over channels: (..., T, N) to (..., T) float64 of |D| or D**2. Computes in float32 at least."""
    wide = difference if difference.dtype == torch.float64 else difference.float()
    return (wide.abs() if loss == "mae" else wide.square()).sum(-1).double()


def class_totals(errors: Tensor, classes: Tensor) -> Tensor:
    """Sum over the tokens of each class.

    Args:
        errors: (..., T) float64 as `token_errors` gives them.
        classes: (T,) int8.

    Returns:
        (..., classes) float64.
    """
    return errors @ class_mask(classes).T


def token_counts(classes: Tensor) -> Tensor:
    """Tokens of each class: (T,) int8 to (classes,) float64."""
    return class_mask(classes).sum(-1)


def coefficients(
    tokens: Tensor, *, width: int, loss: Loss, weights: ClassWeights | None, pads: bool = False
) -> Tensor:
    """What each per-class sum is multiplied by; their products add up to the objective.

    Args:
        tokens: (classes,) float64, tokens behind the sums.
        width: N, channels of a token.
        loss: Which error the sums hold.
        weights: Class weights, or None for the unbalanced mean.
        pads: Whether the unbalanced mean counts padding too, as the published code does.

    Returns:
        (classes,) float64.
    """
    kinds = torch.zeros(len(TOKEN_CLASSES), dtype=torch.float64)
    if weights is None:
        kinds[[PROMPT, VISION, ANSWER, *([PAD] if pads else [])]] = 1.0
    else:
        kinds[ANSWER], kinds[VISION], kinds[PROMPT] = 1.0, weights.vision, weights.prompt
    if weights is not None and loss == "mse":
        return kinds / (tokens.clamp(min=1.0) * width)
    counted = kinds > 0
    if weights is not None:
        counted[VISION] = (
            True  # r = 0 still counts vision tokens: the scale of J must not depend on r
        )
    return kinds / (tokens[counted].sum().clamp(min=1.0) * width)
