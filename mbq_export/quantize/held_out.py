"""Which of two roundings of a block is better, judged on samples that neither has seen.

J[s]  = balanced mean |D| of sample s, D = block in full precision - block rounded     (METHODS 5, 9.3)
the second is taken if  mean(J2 - J1) < -(standard error of that mean over samples)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mbq_export.blocks.loss import class_totals, coefficients, token_counts, token_errors
from mbq_export.errors import GateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from mbq_export.blocks.loss import ClassWeights
    from mbq_export.blocks.stream import BlockStream
    from mbq_export.quantize.streams import Pairs


def losses(
    stream: BlockStream,
    rounded: nn.Module,
    index: int,
    *,
    after: Pairs,
    wanted: Sequence[Tensor],
    weights: ClassWeights | None,
) -> NDArray[np.float64]:
    """J of every sample.

    Args:
        stream: Runs the block.
        rounded: The block with codes in it.
        index: Its position.
        after: Batches with the rows that quantized blocks before it leave.
        wanted: Per batch, the block's output in the full-precision model.
        weights: Class weights; None for all real tokens alike.

    Returns:
        (samples,) in the order of the batches.

    Raises:
        GateError: E1103 if one is not finite.
    """
    found: list[float] = []
    for (batch, rows), target in zip(after, wanted, strict=True):
        with torch.no_grad():
            errors = token_errors(target - stream.run(rounded, index, batch, rows), loss="mae")
        for each, classes in zip(errors, batch.classes, strict=True):
            weigh = coefficients(
                token_counts(classes), width=target.shape[-1], loss="mae", weights=weights
            )
            found.append(float(class_totals(each, classes) @ weigh))
    values = np.array(found)
    if not np.isfinite(values).all():
        raise GateError(
            "E1103",
            f"The held-out error of {int((~np.isfinite(values)).sum())} samples is not finite.",
            why="activations or weights overflow",
            fix="check the weights: mbq-export inspect MODEL",
        )
    return values


def clearly_better(second: NDArray[np.float64], first: NDArray[np.float64]) -> bool:
    """Whether the second is better by more than one standard error of the paired differences.

    Args:
        second: (samples,) losses.
        first: (samples,) losses of the same samples.
    """
    difference = second - first
    if len(difference) < 2:
        return False
    error = float(difference.std(ddof=1)) / float(np.sqrt(len(difference)))
    return bool(difference.mean() < -error)
