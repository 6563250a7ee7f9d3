"""The first place where the tested side is wrong: layer, operation, modality, and what to look at.

    stream    last good block ── ? ──► first bad block
    block     norm ─ q k v ─ attention ─ o ─ norm ─ gate up ─ activation ─ down ─ residual
                                       └─ the first of these whose result is off is named

A linear that is wrong on its own input is the cause of what follows it; where none is, the operation between
the last good and the first bad value is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mbq_export.evaluate.metrics import cosines, norm_ratios, relative_errors
from mbq_export.evaluate.taps import FINAL_NORM, role_of
from mbq_export.export.ops import (
    INPUTS_EMBEDS,
    LOGITS,
    hidden_value,
    linear_input,
    linear_output,
)
from mbq_export.families.base import TOKEN_CLASSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mbq_export.evaluate.comparison import LinearError, StreamError
    from mbq_export.evaluate.metrics import Array
    from mbq_export.evaluate.taps import Values
    from mbq_export.evaluate.tolerances import Gates

MAKERS: Final = {
    "q_proj": "input_layernorm",
    "o_proj": "attention",
    "gate_proj": "post_attention_layernorm",
    "down_proj": "activation",
}
"""What makes the input of a linear, by the linear that reads it first."""

RESIDUAL: Final = "residual"
HINT_WEIGHTS: Final = (
    "all positions, from one linear on: compare packing, scales and zero points of this linear"
)
HINT_VISION: Final = "vision positions alone: compare tile order, position ids and the mask"
HINT_TEXT: Final = "text positions alone: compare the embedding table and the tokenizer files"
HINT_EVERYWHERE: Final = (
    "all positions: compare this operation's constants and attributes with the model's"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstBad:
    """Where it begins.

    Attributes:
        layer: Block; None before the first and behind the last.
        op: Operation: a linear's path in its block, a name of `MAKERS`, ``residual``, ``embed_tokens``,
            ``vision_encoder``, ``norm`` or ``lm_head``.
        modality: Modalities that are off, comma separated; ``all`` if all are.
        cos: Mean cosine there, of the modality that is worst.
        norm_ratio: Mean norm ratio there.
        error: What broke the gate: worst column of a linear, or worst position of another operation.
        column: Output feature of a linear.
        hint: What to compare first.
        statistics: Smallest and largest value and share of non-finite ones, of reference and tested.
    """

    layer: int | None
    op: str
    modality: str
    cos: float
    norm_ratio: float
    error: float
    column: int | None = None
    hint: str = ""
    statistics: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Name the place in a few words."""
        where = self.op if self.layer is None else f"layer {self.layer} {self.op}"
        return where if self.column is None else f"{where} column {self.column}"

    def as_json(self) -> dict[str, Any]:
        """Return the entry ``first_bad`` of the result."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """What the gates say, before anybody has looked inside a block.

    Attributes:
        position: Index along the stream: 0 for the embeddings, i + 1 for block i, then norm and logits.
        value: Name of the first bad value of the stream.
        linear: The linear to blame, or None.
        stream: Entries of that value, one per modality that is off; empty if only a linear is.
    """

    position: int
    value: str
    linear: LinearError | None
    stream: tuple[StreamError, ...]


def suspect(
    linears: Sequence[LinearError], stream: Sequence[StreamError], gates: Gates
) -> Suspect | None:
    """Find the first place where a gate is broken.

    Args:
        linears: All linears, in model order within a layer.
        stream: All values, in the order of computation.
        gates: Limits.

    Returns:
        None if no gate is broken. Of a linear and a stream value of the same block, the linear is the cause.
    """
    order = {value: index for index, value in enumerate(dict.fromkeys(e.value for e in stream))}
    limit = gates.linear_error
    bad_linears = sorted(
        (error for error in linears if limit is not None and not error.error <= limit),
        key=lambda error: error.layer,
    )
    bad_values = [error.value for error in stream if error.breaks(gates)]
    first_value = min(bad_values, key=order.__getitem__, default=None)
    linear = bad_linears[0] if bad_linears else None
    if linear is not None:
        value = hidden_value(linear.layer)
        if first_value is None or order.get(value, 0) <= order[first_value]:
            return _suspect(value, linear, stream, gates)
    return None if first_value is None else _suspect(first_value, None, stream, gates)


def _suspect(
    value: str, linear: LinearError | None, stream: Sequence[StreamError], gates: Gates
) -> Suspect:
    names = list(dict.fromkeys(error.value for error in stream))
    return Suspect(
        position=names.index(value) if value in names else (linear.layer + 1 if linear else 0),
        value=value,
        linear=linear,
        stream=tuple(error for error in stream if error.value == value and error.breaks(gates)),
    )


def named(found: Suspect, *, occurring: Sequence[str]) -> FirstBad:
    """Describe a suspect that needs no look inside a block: a linear, or a place outside the blocks.

    Args:
        found: From `suspect`.
        occurring: Modalities in the data, to tell "all" from "some".
    """
    modality = modality_of([error.modality for error in found.stream], occurring)
    worst = max(found.stream, key=lambda error: _badness(error.error), default=None)
    layer, op, column, error = None, _outside(found.value, modality), None, np.nan
    if found.linear is not None:
        linear = found.linear
        layer, op, column, error = linear.layer, linear.linear, linear.column, linear.error
        modality = modality or linear.modality
    elif worst is not None:
        error = worst.error
    return FirstBad(
        layer=layer,
        op=op,
        modality=modality,
        cos=worst.cosine if worst else 1.0,
        norm_ratio=worst.norm_ratio if worst else 1.0,
        error=error,
        column=column,
        hint=HINT_WEIGHTS if found.linear else hint_for(modality),
    )


def first_bad_op(
    layer: int,
    linears: Sequence[str],
    sides: tuple[Values, Values],
    classes: NDArray[np.int8],
    gates: Gates,
) -> FirstBad:
    """Walk through one block whose linears are right and name the operation that is not.

    Args:
        layer: The first bad block.
        linears: The family's linears.
        sides: What linears read and returned, and the block's output, of reference and tested, (T, C) each.
        classes: (T,) token classes.
        gates: A value is off if a position's relative error exceeds ``gates.relative_error``.
    """
    reference, tested = sides
    limit = gates.relative_error or np.inf
    steps = operations(layer, linears)
    errors = {value: relative_errors(reference[value], tested[value]) for _, value in steps}
    # Nothing inside may be off where a look at fewer positions found something: then it is the last step.
    op, value = next((step for step in steps if not (errors[step[1]] <= limit).all()), steps[-1])
    off = ~(errors[value] <= limit)
    rows = off if off.any() else np.ones_like(off)
    occurring = [TOKEN_CLASSES[int(kind)] for kind in np.unique(classes)]
    modality = modality_of([TOKEN_CLASSES[int(k)] for k in np.unique(classes[rows])], occurring)
    return FirstBad(
        layer=layer,
        op=op,
        modality=modality,
        cos=float(cosines(reference[value][rows], tested[value][rows]).mean()),
        norm_ratio=float(norm_ratios(reference[value][rows], tested[value][rows]).mean()),
        error=float(errors[value].max()),
        hint=hint_for(modality),
        statistics={
            "reference": statistics(reference[value]),
            "tested": statistics(tested[value]),
        },
    )


def operations(layer: int, linears: Sequence[str]) -> list[tuple[str, str]]:
    """Operations of one block and the values they make, in the order of computation."""
    steps: dict[str, str] = {}
    for linear in linears:
        role = role_of(linear)
        steps.setdefault(linear_input(layer, role), MAKERS.get(role, f"input of {linear}"))
        steps[linear_output(layer, role)] = linear
    steps[hidden_value(layer)] = RESIDUAL
    return [(op, value) for value, op in steps.items()]


def statistics(values: Array) -> dict[str, float | None]:
    """Smallest and largest finite value, and the share of values that are not finite."""
    finite = values[np.isfinite(values)]
    return {
        "min": float(finite.min()) if finite.size else None,
        "max": float(finite.max()) if finite.size else None,
        "non_finite": 1 - finite.size / values.size,
    }


def modality_of(off: Sequence[str], occurring: Sequence[str]) -> str:
    """Name the modalities that are off, or ``all``."""
    return "all" if set(off) == set(occurring) else ", ".join(dict.fromkeys(off))


def hint_for(modality: str) -> str:
    """Say what to compare first, by the modalities that are off."""
    if modality == "all":
        return HINT_EVERYWHERE
    return HINT_VISION if modality == "vision" else HINT_TEXT


def _outside(value: str, modality: str) -> str:
    pictures = "vision_encoder" if modality == "vision" else "embed_tokens"
    return {INPUTS_EMBEDS: pictures, FINAL_NORM: "norm", LOGITS: "lm_head"}.get(value, value)


def _badness(error: float) -> float:
    return np.inf if np.isnan(error) else error
