"""Weights of token classes, read from a sensitivity report as `calibrate` measures it or a user edits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mbq_export.blocks.loss import ClassWeights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MEASURED_AT: Final = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
"""Half of a block to the linear whose output gives its r."""
HALF_OF: Final = {"qkv": "attn", "o": "attn", "gate_up": "mlp", "down": "mlp"}
"""Unit to half of a block."""

ALIKE: Final = ClassWeights(vision=1.0, prompt=1.0)
"""All real tokens weigh the same."""


def r_of(report: Mapping[str, Any], layer: int, unit: str) -> float:
    """Weight of vision tokens for a unit."""
    return float(report["layers"][layer]["r"][HALF_OF[unit]])


def prompt_weight_of(report: Mapping[str, Any], layer: int, unit: str) -> float:
    """Clipped weight of prompt tokens for a unit, 0 where it could not be measured."""
    linear = report["layers"][layer]["linears"][MEASURED_AT[HALF_OF[unit]]]
    return float(linear["clipped"]["prompt"] or 0.0)


def weights_of_linear(report: Mapping[str, Any], layer: int, linear: str) -> ClassWeights:
    """A linear's own clipped ratios (METHODS 4.4), which its Gram matrix is weighed with.

    Never the ratio of another linear: keys and values of early tokens are read by all later ones, so theirs
    often exceed 1 where that of the attention output is far below. A class that could not be measured weighs 1.
    """
    clipped = report["layers"][layer]["linears"][linear]["clipped"]
    return ClassWeights(
        vision=_or_one(clipped.get("vision")), prompt=_or_one(clipped.get("prompt"))
    )


def squared_weights(report: Mapping[str, Any], layer: int, linear: str) -> ClassWeights:
    """Mean squares of the gradients at a linear's output, relative to those at answers.

    They turn squared errors into what those do to the answer, class by class. Not clipped: a class whose output nothing
    reads, as vision tokens behind the last block, weighs nothing. All are 0 where answers have no gradient.
    """
    squares = report["layers"][layer]["linears"][linear]["mean_sq"]
    answer = _or_zero(squares.get("answer"))
    if not answer:
        return ClassWeights(vision=0.0, prompt=0.0)
    return ClassWeights(
        vision=_or_zero(squares.get("vision")) / answer,
        prompt=_or_zero(squares.get("prompt")) / answer,
    )


def weighings(
    report: Mapping[str, Any], layer: int, linears: Iterable[str], *, alike: bool
) -> tuple[dict[str, str], dict[str, ClassWeights]]:
    """Which Gram matrix each of some linears with one input uses, and how each of those weighs token classes.

    Args:
        report: Not looked at where classes weigh alike.
        layer: Of the linears.
        linears: Paths relative to the block.
        alike: Whether one matrix of all real tokens serves all of them.

    Returns:
        Name of the matrix by linear, and weights by name.
    """
    names = {linear: "plain" if alike else linear for linear in linears}
    if alike:
        return names, dict.fromkeys(names.values(), ALIKE)
    return names, {linear: weights_of_linear(report, layer, linear) for linear in names}


def _or_zero(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else float(value)
