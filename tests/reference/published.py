"""The published MBQ method, written down from its formulas: what ``--compat mbq`` is compared with.

Nothing here is fast, batched or shared with the package. Formulas: METHODS 2.5, 4.3, 5, 6.1, 6.3, 6.4.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GRID = [step / 20 for step in range(20)]


def fake_quantized(weight: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Round to the nearest code of a range that need not hold zero, in the tensor's own dtype."""
    top = 2**bits - 1
    groups = weight.reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low).clamp(min=1e-5) / top
    zero = (-torch.round(low / step)).clamp(0, top)
    codes = (torch.round(groups / step) + zero).clamp(0, top)
    return ((codes - zero) * step).reshape(weight.shape)


def channel_scale(rows: Tensor, alpha: float) -> Tensor:
    """Mean |x| of every token, padding too, to the power alpha, centred between its extremes."""
    mean = rows.abs().reshape(-1, rows.shape[-1]).mean(0)
    scale = mean.pow(alpha).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def balanced_mae(difference: Tensor, vision: Tensor, answer: Tensor, r: float) -> float:
    """Sum of |D| over answer tokens and r times that over vision tokens, per marked element."""
    error = difference.float().abs()
    marked = (answer.sum() + vision.sum()) * difference.shape[-1]
    total = (error * answer[..., None]).sum() + r * (error * vision[..., None]).sum()
    return float(total / marked)


def balanced_mse(difference: Tensor, vision: Tensor, answer: Tensor, r: float) -> float:
    """Mean of D**2 over answer tokens plus r times the mean over vision tokens."""
    error = difference.float().square().mean(-1)
    return float(error[answer].mean() + r * error[vision].mean())


def unbalanced_mse(difference: Tensor) -> float:
    """Mean of D**2 over every token."""
    return float(difference.float().square().mean())


def search(
    rows: Tensor,
    losses: Callable[[Sequence[Tensor]], float],
    weights: Sequence[Tensor],
    *,
    bits: int,
    group_size: int,
) -> tuple[float, Tensor, list[float]]:
    """Best exponent, its scale, and all losses; the first of equal ones wins.

    Args:
        rows: Inputs that the statistic is taken from.
        losses: Loss of the module with these weights in place of the originals.
        weights: The unit's weights.
        bits: Width of a code.
        group_size: Columns per scale.
    """
    best, found, curve = float("inf"), (0.0, torch.empty(0)), []
    for alpha in GRID:
        scale = channel_scale(rows, alpha)
        tried = [
            fake_quantized(weight * scale, bits=bits, group_size=group_size) / scale
            for weight in weights
        ]
        curve.append(losses(tried))
        if curve[-1] < best:
            best, found = curve[-1], (alpha, scale)
    return found[0], found[1], curve


def ratio(vision: Sequence[float], answer: Sequence[float]) -> float:
    """Mean |g| of vision tokens over that of answer tokens, each the mean of per-sample means."""
    return (sum(vision) / len(vision)) / (sum(answer) / len(answer))


def lifted(ratios: Sequence[float]) -> list[float]:
    """Each layer's ratio, at least the median over layers."""
    ordered = sorted(ratios)
    half = len(ordered) // 2
    median = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return [max(value, median) for value in ratios]
