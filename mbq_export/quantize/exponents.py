"""Exponents of channel scales, moved by one step of the grid where that lowers the error of a joint search.

    e(a') = e(a) ** (a' / a)        the same statistic to another power; normalized scales stay normalized

Coordinate descent: unit after unit takes the best of its own exponent and the two beside it, at most twice. A unit whose
exponent is 0 stays: a scale of ones does not tell what statistic it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from mbq_export.blocks.fold import fold_unit, folds_safely

if TYPE_CHECKING:
    from mbq_export.blocks.halves import Half
    from mbq_export.channel_scales import ChannelScales
    from mbq_export.families.base import TextShape
    from mbq_export.quantize.joint import Joint, Ratios
    from mbq_export.quantize.streams import Pairs

STEPS: Final = 20
"""Of the grid between 0 and 1."""
SWEEPS: Final = 2
WIDEST: Final = 256.0
"""Scales stay in [1 / 256, 256], as the search per unit leaves them."""

Exponents = Mapping[tuple[int, str], float]
"""By layer and unit."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a descent found.

    Attributes:
        exponents: Of units that moved.
        error: J with them.
    """

    exponents: Exponents
    error: float


def searched_exponents(scales: ChannelScales) -> dict[tuple[int, str], float]:
    """Exponents that the search per unit chose, where there is a statistic to take another power of."""
    rows = scales.calib.get("units", ())
    chosen = {(row["layer"], row["unit"]): row["alpha"] for row in rows}
    return {
        (layer, unit): alpha
        for (layer, unit), alpha in chosen.items()
        if alpha and unit in scales.of_block(layer)
    }


def neighbours(alpha: float) -> list[float]:
    """Exponents one step below and above, inside [0, 1]."""
    step = round(alpha * STEPS)
    return [each / STEPS for each in (step - 1, step + 1) if 0 <= each <= STEPS]


def factor(e: Tensor, alpha: float, moved: float) -> Tensor:
    """What a folded scale is multiplied by to have another exponent: (K,) float32."""
    power = e.float().pow(moved / alpha).clamp(1 / WIDEST, WIDEST)
    return power / e.float()


def refold(half: Half, scales: ChannelScales, moved: Exponents, *, text: TextShape) -> None:
    """Give folded units of a half other exponents, in place.

    Args:
        half: With the scales of `scales` folded.
        scales: Know the exponents that they have.
        moved: Exponents to have; other units stay.
        text: Decoder sizes.
    """
    for place in half.smooth:
        key = (half.index, place.unit)
        if key in moved and place.unit in half.units.values():
            fold_unit(half.block, _factor_of(scales, key, moved[key]), place=place, text=text)


def descend(
    joint: Joint, ratios: Ratios, rows: Pairs, scales: ChannelScales, *, text: TextShape
) -> Moved:
    """Move the exponents of a joint search's units, ratios fixed. Leaves the blocks as they were.

    Args:
        joint: Its halves have the scales folded.
        ratios: One per half.
        rows: All samples with the rows before the first half.
        scales: Know the exponents to begin with.
        text: Decoder sizes.

    Raises:
        GateError: E1103 if an objective is not finite.
    """
    start = searched_exponents(scales)
    tried = _tried(joint, scales, start, text)
    found: dict[tuple[int, str], float] = {}
    error = float(joint.objectives([ratios], rows, of=rows).sum())
    kept = [{name: p.detach().clone() for name, p in _parameters(h).items()} for h in joint.halves]
    for _ in range(SWEEPS):
        before = dict(found)
        for key, exponents in tried.items():
            for alpha in exponents:
                if alpha == found.get(key, start[key]):
                    continue
                trial = {**found, key: alpha}
                _set(joint, kept, scales, trial, text)
                value = float(joint.objectives([ratios], rows, of=rows).sum())
                if value < error:
                    error, found = value, trial
        if found == before:
            break
    _set(joint, kept, scales, {}, text)
    moved = {key: alpha for key, alpha in found.items() if alpha != start[key]}
    return Moved(exponents=moved, error=error)


def _tried(
    joint: Joint, scales: ChannelScales, start: Exponents, text: TextShape
) -> dict[tuple[int, str], list[float]]:
    """Exponents of each unit, its own first; without those whose scale a 16-bit norm cannot take."""
    tried: dict[tuple[int, str], list[float]] = {}
    for half in joint.halves:
        for place in half.smooth:
            key = (half.index, place.unit)
            if key in start and place.unit in half.units.values():
                tried[key] = [
                    start[key],
                    *(
                        alpha
                        for alpha in neighbours(start[key])
                        if folds_safely(
                            half.block, _factor_of(scales, key, alpha), place=place, text=text
                        )
                    ),
                ]
    return tried


def _factor_of(scales: ChannelScales, key: tuple[int, str], moved: float) -> Tensor:
    layer, unit = key
    e = torch.from_numpy(scales.of_block(layer)[unit].copy())
    return factor(e, searched_exponents(scales)[key], moved)


@torch.no_grad()
def _set(
    joint: Joint,
    kept: list[dict[str, Tensor]],
    scales: ChannelScales,
    moved: Exponents,
    text: TextShape,
) -> None:
    """Fold from the beginning, so that nothing adds up."""
    for half, tensors in zip(joint.halves, kept, strict=True):
        for name, parameter in _parameters(half).items():
            parameter.copy_(tensors[name])
        refold(half, scales, moved, text=text)


def _parameters(half: Half) -> dict[str, torch.nn.Parameter]:
    """What folding scales of a half changes."""
    changed = {place.source for place in half.smooth if place.unit in half.units.values()}
    return {
        name: parameter
        for name, parameter in half.block.named_parameters()
        if name.rpartition(".")[0] in changed | set(half.units)
    }
