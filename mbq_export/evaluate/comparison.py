"""Where a tested decoder leaves the path of the reference: layer by layer, and linear by linear.

    linear    what it read, by the codes, in float64       ── column_errors ──►  what it returned
    stream    reference after block i, per modality        ── cosine, norm ratio, error ──►  tested after block i

A linear is checked on the input that the tested side itself gave it, so an error upstream does not spread into
it and every bad linear is found, not only the first. The stream is compared with the reference model's own,
which also sees norms, rotation, attention and residuals.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from mbq_export.evaluate.metrics import (
    column_errors,
    cosines,
    norm_ratios,
    relative_errors,
    worst_high,
    worst_low,
)
from mbq_export.evaluate.taps import role_of, stream_values
from mbq_export.export.ops import INPUTS_EMBEDS, LOGITS, linear_input, linear_output
from mbq_export.families.base import ANSWER, PROMPT, TOKEN_CLASSES, VISION
from mbq_export.report import Check
from mbq_export.schemes.integers import quantize_activations
from mbq_export.schemes.oracle import dequantized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.evaluate.metrics import Array, Rows
    from mbq_export.evaluate.taps import Values
    from mbq_export.evaluate.tolerances import Gates
    from mbq_export.families.base import ModelFamily

TIER: Final = "numeric"
MODALITIES: Final = (VISION, PROMPT, ANSWER)
NO_POSITIONS: Final = "not measured: no positions"
"""Reason of a check whose modality does not occur in the data (W1104); such a check has not passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearError:
    """The worst output column of one linear.

    Attributes:
        layer: Block.
        linear: Module path relative to the block, also where the graph has fused it with others.
        error: Its `column_errors` value.
        column: Which output feature.
        modality: Class of the worst position.
    """

    layer: int
    linear: str
    error: float
    column: int
    modality: str

    @property
    def place(self) -> str:
        """Layer, linear and column, for people."""
        return f"layers.{self.layer}.{self.linear} column {self.column}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamError:
    """How one value of the stream lies to the reference's, over the positions of one modality.

    Attributes:
        value: Name of the value.
        modality: Name of the token class.
        cosine: Mean cosine.
        cosine_worst: Cosine at the worst 1 % of positions.
        norm_ratio: Mean norm ratio.
        norm_off: Distance of the norm ratio from 1 at the worst 1 % of positions.
        error: Largest relative error of any position.
        positions: How many.
    """

    value: str
    modality: str
    cosine: float
    cosine_worst: float
    norm_ratio: float
    norm_off: float
    error: float
    positions: int

    def breaks(self, gates: Gates) -> bool:
        """Whether any of the gates on the stream is broken; NaN breaks all."""
        kept = (
            self.cosine >= gates.cosine_mean
            and (gates.cosine_worst is None or self.cosine_worst >= gates.cosine_worst)
            and self.norm_off_gated(gates) <= gates.norm_ratio
            and (gates.relative_error is None or self.error <= gates.relative_error)
        )
        return not kept

    def norm_off_gated(self, gates: Gates) -> float:
        """The distance that the norm gate looks at: the worst positions for parity, the mean for quality."""
        return self.norm_off if gates.cosine_worst is not None else abs(self.norm_ratio - 1)


class StreamComparison:
    """Collects the residual stream of both sides over samples."""

    def __init__(self, layers: int) -> None:
        """Start empty.

        Args:
            layers: Number of blocks.
        """
        self.values: Final = (INPUTS_EMBEDS, *stream_values(layers), LOGITS)
        self._parts: dict[tuple[str, int], list[tuple[Rows, Rows, Rows]]] = defaultdict(list)

    def add(self, reference: Values, tested: Values, classes: NDArray[np.int8]) -> None:
        """Compare one sample.

        Args:
            reference: Value -> (T, C); all of `values` that are to be compared.
            tested: The same values of the tested side.
            classes: (T,) token classes.
        """
        for value in self.values:
            if value not in reference:
                continue
            for kind in MODALITIES:
                a, b = reference[value][classes == kind], tested[value][classes == kind]
                if len(a):
                    rows = (cosines(a, b), norm_ratios(a, b), relative_errors(a, b))
                    self._parts[value, kind].append(rows)

    def errors(self) -> list[StreamError]:
        """Return one entry per value, in the order of computation, and per modality that occurred."""
        return [
            _stream_error(value, TOKEN_CLASSES[kind], self._parts[value, kind])
            for value in self.values
            for kind in MODALITIES
            if self._parts[value, kind]
        ]


def _stream_error(
    value: str, modality: str, parts: Sequence[tuple[Rows, Rows, Rows]]
) -> StreamError:
    cosine, ratio, error = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    return StreamError(
        value=value,
        modality=modality,
        cosine=float(cosine.mean()),
        cosine_worst=worst_low(cosine),
        norm_ratio=float(ratio.mean()),
        norm_off=worst_high(abs(ratio - 1)),
        error=float(error.max()),
        positions=len(cosine),
    )


def weights_of(checkpoint: QuantCheckpoint, module: str) -> tuple[Array, Array | None]:
    """Return the (N, K) weights and the (N,) bias that a linear should have, quantized or not."""
    if module in checkpoint.linears:
        packed = checkpoint.packed(module)
        return dequantized(packed), packed.bias
    bias = f"{module}.bias"
    return (
        checkpoint.tensor(f"{module}.weight"),
        checkpoint.tensor(bias) if checkpoint.has(bias) else None,
    )


def inputs_of(checkpoint: QuantCheckpoint, module: str, rows: Array) -> Array:
    """Return the (M, K) rows that a linear multiplies: as they are, or as its scheme rounds them.

    Rounding is part of the format to the last bit, so a linear that reads the same rows multiplies the same integers;
    only what comes before it may differ, and move a value over the edge between two codes.
    """
    record = checkpoint.records.get(module)
    if record is None or not record.scheme.rounds_activations:
        return rows
    codes, scales = quantize_activations(rows, bits=record.scheme.act_bits)
    return codes.astype(np.float64) * scales[:, None].astype(np.float64)


def linear_errors(
    checkpoint: QuantCheckpoint,
    family: ModelFamily,
    layer: int,
    *,
    values: Values,
    classes: NDArray[np.int8],
) -> list[LinearError]:
    """Check every linear of one block on what it was given.

    Args:
        checkpoint: The truth.
        family: Names of the linears.
        layer: Block.
        values: What the tested linears read and returned, (M, C) each.
        classes: (M,) token classes of these positions.

    Returns:
        One entry per linear, in model order.
    """
    found = []
    for linear in family.linears:
        role = role_of(linear)
        module = family.linear_path(layer, linear)
        weights, bias = weights_of(checkpoint, module)
        errors, positions = column_errors(
            inputs_of(checkpoint, module, values[linear_input(layer, role)]),
            weights,
            values[linear_output(layer, role)],
            bias=bias,
        )
        column = int(errors.argmax())
        found.append(
            LinearError(
                layer=layer,
                linear=linear,
                error=float(errors[column]),
                column=column,
                modality=TOKEN_CLASSES[int(classes[positions[column]])],
            )
        )
    return found


def linear_check(errors: Sequence[LinearError], gates: Gates) -> Check:
    """Gate the worst linear."""
    worst = max(errors, key=lambda error: error.error)
    limit = gates.linear_error
    ok = limit is None or worst.error <= limit
    bad = [error for error in errors if limit is not None and not error.error <= limit]
    return Check(
        name="parity.linear",
        tier=TIER,
        ok=ok,
        value=worst.error,
        threshold=limit,
        modality="" if ok else worst.modality,
        place=worst.place,
        why="" if ok else f"{len(bad)} of {len(errors)} linears, the first is {bad[0].place}",
    )


def stream_checks(
    errors: Sequence[StreamError], gates: Gates, *, prefix: str = "parity"
) -> list[Check]:
    """Gate the stream: one check per metric and modality, each by the value that is worst in it."""
    limits = {
        "cosine": gates.cosine_mean,
        "cosine_worst": gates.cosine_worst,
        "norm_ratio": gates.norm_ratio,
        "relative_error": gates.relative_error,
    }
    checks = []
    for kind in MODALITIES:
        modality = TOKEN_CLASSES[kind]
        own = [error for error in errors if error.modality == modality]
        for metric, limit in limits.items():
            if limit is not None:
                check = _worst_value(own, metric, limit, gates) if own else _unmeasured(limit)
                checks.append(replace(check, name=f"{prefix}.{metric}", modality=modality))
    return checks


def _unmeasured(limit: float) -> Check:
    return Check(name="", tier=TIER, ok=None, threshold=limit, why=NO_POSITIONS)


def _worst_value(errors: Sequence[StreamError], metric: str, limit: float, gates: Gates) -> Check:
    """Gate one metric of one modality along the stream."""
    # How far each value is on the bad side of its limit; NaN counts as farthest.
    found = [_gated(error, metric, gates) for error in errors]
    sign = -1 if metric.startswith("cosine") else 1
    excess = [sign * (number - limit) for number in found]
    at = max(range(len(errors)), key=lambda i: np.inf if np.isnan(excess[i]) else excess[i])
    ok = excess[at] <= 0
    return Check(
        name="",
        tier=TIER,
        ok=bool(ok),
        value=found[at],
        threshold=limit,
        worst=errors[at].cosine_worst if metric == "cosine" else None,
        place=errors[at].value,
        why="" if ok else f"worst at {errors[at].value}",
    )


def _gated(error: StreamError, metric: str, gates: Gates) -> float:
    return {
        "cosine": error.cosine,
        "cosine_worst": error.cosine_worst,
        "norm_ratio": error.norm_off_gated(gates),
        "relative_error": error.error,
    }[metric]
