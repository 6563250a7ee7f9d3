"""What plain rounding costs each unit, before any search: where a coarse grid will do (METHODS 6.3).

    error(u) = sum over linears j of u:  g_j  mean over tokens of  c_j |(W - Q(W)) x|**2

g_j is the mean squared gradient of answer tokens at the linear's output, c_j its class weights (METHODS 11, without a
scale and without clipping). A unit below the 25th percentile of all has little to win, and a fine grid would fit noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn

from mbq_export.blocks.loss import class_totals, token_errors
from mbq_export.blocks.ratios import weights_of_linear
from mbq_export.calibrate.units import run_and_watch
from mbq_export.families.base import ANSWER, PAD, PROMPT, TOKEN_CLASSES, VISION
from mbq_export.schemes.affine import dequantize, quantize, rounded_per_token

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from mbq_export.blocks.stream import Batch
    from mbq_export.calibrate.smooth import Job

PERCENTILE: Final = 25.0


@dataclass(frozen=True, kw_only=True)
class FirstErrors:
    """Weighed errors of plain rounding.

    Attributes:
        of_unit: By layer and unit.
    """

    of_unit: Mapping[tuple[int, str], float]

    def is_small(self, layer: int, unit: str) -> bool:
        """Whether a unit's error is below the 25th percentile of all units."""
        least = float(np.percentile([*self.of_unit.values()], PERCENTILE))
        return self.of_unit[layer, unit] < least


@torch.no_grad()
def first_errors(
    job: Job, block: nn.Module, index: int, batches: Sequence[tuple[Batch, Tensor]]
) -> tuple[dict[str, float], list[Tensor]]:
    """Measure the units of one block.

    Args:
        job: Scheme and ratios; places that are not scaled are measured like the others.
        block: In full precision.
        index: Its position.
        batches: All samples with the block's input rows.

    Returns:
        Error by unit, and the block's outputs per batch.
    """
    moved = {
        linear: _moved(block.get_parameter(f"{linear}.weight"), job)
        for place in job.places
        for linear in place.into
    }
    weigh = {linear: _weights(job.sensitivity, index, linear) for linear in moved}
    found, outputs, tokens = dict.fromkeys((place.unit for place in job.places), 0.0), [], 0
    for output, calls in run_and_watch(job.stream, block, index, batches, job.places):
        outputs.append(output)
        for place in job.places:
            call = calls[place.unit]
            rows = call.rows.flatten(0, -2).float()
            read = rows
            if job.scheme.rounds_activations:
                read = rounded_per_token(rows, bits=job.scheme.act_bits)
            for linear in place.into:
                exact, rounded = moved[linear]
                errors = token_errors(rows @ exact.T - read @ rounded.T, loss="mse")
                found[place.unit] += float(class_totals(errors, call.classes) @ weigh[linear])
        tokens += int((calls[job.places[0].unit].classes != PAD).sum())
    return {unit: error / max(tokens, 1) for unit, error in found.items()}, outputs


def _moved(weight: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    codes = quantize(weight.float(), scheme=job.scheme, group_size=job.group_size)
    return weight.float(), dequantize(codes)


def _weights(report: Mapping[str, Any], layer: int, linear: str) -> Tensor:
    """Class weights times the gradient at answers: (classes,) float64."""
    found = torch.zeros(len(TOKEN_CLASSES), dtype=torch.float64)
    weights = weights_of_linear(report, layer, linear)
    found[ANSWER], found[VISION], found[PROMPT] = 1.0, weights.vision, weights.prompt
    return found * float(report["layers"][layer]["linears"][linear]["mean_sq"]["answer"] or 0.0)
