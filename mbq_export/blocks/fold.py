"""Move a channel scale across two operations without changing what the block computes.

    y = W x  =  (W diag(e)) (x / e)

The linears that read x are multiplied by e along their input channels; whatever made x is divided by e
along its output channels: the weight and bias of a norm, or rows and bias of a linear. Between `v_proj`
and `o_proj` the attention only mixes rows, so the scale passes through; under grouped-query attention one
row of `v_proj` feeds several channels of `o_proj`, which therefore must share their scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from mbq_export.errors import FormatError, located

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from mbq_export.families.base import Smooth, TextShape

FP16_LARGEST: Final = 65504.0
FP16_SMALLEST_STEP: Final = 2.0**-24


def fold(
    block: nn.Module,
    scales: Mapping[str, NDArray[np.float32]],
    *,
    smooth: tuple[Smooth, ...],
    text: TextShape,
) -> None:
    """Fold the scales of one block into its weights, in place. Computes in float32.

    Args:
        block: A decoder block that the caller owns.
        scales: Unit name to (K,) e, as `ChannelScales.of_block` gives them; missing units stay as they are.
        smooth: The family's places.
        text: Decoder sizes.

    Raises:
        FormatError: E4314 for an unknown unit, a wrong length, a value that is not positive and finite, or
            copies of a key-value channel that differ.
    """
    places = {place.unit: place for place in smooth}
    for unit, values in scales.items():
        with located(unit):
            if unit not in places:
                raise FormatError(
                    "E4314",
                    f"Unknown unit {unit!r}.",
                    why=f"known: {', '.join(places)}",
                    fix="calibrate this model again",
                )
            fold_unit(block, torch.from_numpy(values.copy()), place=places[unit], text=text)


@torch.no_grad()
def fold_unit(block: nn.Module, e: Tensor, *, place: Smooth, text: TextShape) -> None:
    """Fold one scale.

    Args:
        block: A decoder block that the caller owns.
        e: (K,) float32.
        place: Where it belongs.
        text: Decoder sizes.

    Raises:
        FormatError: E4314.
    """
    weights = [block.get_parameter(f"{name}.weight") for name in place.into]
    _check(e, columns=int(weights[0].shape[1]))
    divisor = divisor_of(e, place=place, text=text)
    source = block.get_submodule(place.source)
    for name in ("weight", "bias"):
        parameter = getattr(source, name, None)
        if parameter is not None:
            parameter.copy_(_divided(parameter, divisor))
    for weight in weights:
        weight.copy_(weight.float() * e)


def divisor_of(e: Tensor, *, place: Smooth, text: TextShape) -> Tensor:
    """What the source of a place is divided by, one value per output channel of the source.

    Args:
        e: (K,) scale of the unit.
        place: Where it belongs.
        text: Decoder sizes.

    Returns:
        (K,), or (kv_heads * D,) for the attention output.

    Raises:
        FormatError: E4314 if query heads that share a key-value head have different scales.
    """
    if place.unit != "o":
        return e
    per_head = e.reshape(text.kv_heads, text.heads // text.kv_heads, text.head_dim)
    first = per_head[:, :1]
    if not torch.equal(per_head, first.expand_as(per_head)):
        raise FormatError(
            "E4314",
            "Heads that share a value row have different scales.",
            why=f"{text.heads} query heads read {text.kv_heads} value heads",
            fix="calibrate this model again",
        )
    return first.reshape(-1)


@torch.no_grad()
def folds_safely(block: nn.Module, e: Tensor, *, place: Smooth, text: TextShape) -> bool:
    """Whether the divided source still fits 16-bit floats (METHODS 18).

    True if no value exceeds the largest fp16 number and no output channel falls below 2**-24 of the largest,
    where fp16 would lose it beside the others. A channel is as large as its largest weight; channels that
    small before the division do not count.
    """
    weight = block.get_parameter(f"{place.source}.weight").float()
    before = weight.abs().reshape(len(weight), -1).amax(1)
    after = before / divisor_of(e, place=place, text=text)
    seen = before >= before.max() * FP16_SMALLEST_STEP
    smallest_allowed = after.max() * FP16_SMALLEST_STEP
    return bool(after.max() <= FP16_LARGEST and (after[seen] >= smallest_allowed).all())


def _divided(parameter: Tensor, divisor: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (parameter.dim() - 1)
    return parameter.float() / divisor.reshape(shape)


def _check(e: Tensor, *, columns: int) -> None:
    if e.shape != (columns,):
        raise FormatError(
            "E4314",
            f"A scale has shape {tuple(e.shape)}.",
            why=f"the unit has {columns} input channels",
            fix="calibrate this model again",
        )
    if not bool((torch.isfinite(e) & (e > 0)).all()):
        raise FormatError(
            "E4314",
            f"{int((~(torch.isfinite(e) & (e > 0))).sum())} scales are not positive and finite.",
            why="a channel scale divides the operation before it",
            fix="calibrate this model again",
        )
