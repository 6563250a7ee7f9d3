"""The numeric tier: run the same samples through both sides, tapped, and gate what the comparison finds.

Blocks are tapped a few at a time, so that memory holds what a few linears read and returned; every linear of
every block is seen. The residual stream is compared on the way.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.evaluate.bisect import FirstBad, Suspect, first_bad_op, named, suspect
from mbq_export.evaluate.comparison import (
    LinearError,
    StreamComparison,
    StreamError,
    linear_check,
    linear_errors,
    stream_checks,
)
from mbq_export.evaluate.sides import open_tested
from mbq_export.evaluate.taps import linear_values, stream_values
from mbq_export.export.ops import INPUTS_EMBEDS, hidden_value
from mbq_export.families.base import TOKEN_CLASSES
from mbq_export.progress import Progress, silent
from mbq_export.tensor_file import write_tensors
from mbq_export.writing import explained

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mbq_export.evaluate.sides import Oracle, Setup
    from mbq_export.evaluate.taps import Values
    from mbq_export.evaluate.tolerances import Gates
    from mbq_export.families.base import TextShape
    from mbq_export.families.inputs import ModelInputs
    from mbq_export.report import Check

ROWS_PER_LINEAR: Final = 2048
"""Positions that a linear is checked on: more would find no smaller fault, since every column counts by its worst."""

TAP_BUDGET_BYTES: Final = 1 << 30
FIRST_BAD_FILE: Final = "first_bad.safetensors"


@dataclass(frozen=True, kw_only=True)
class Numeric:
    """What the tier found.

    Attributes:
        linears: Every linear.
        stream: Every value along the stream, by modality.
        checks: The gates.
        first_bad: Where it begins, or None.
    """

    linears: list[LinearError]
    stream: list[StreamError]
    checks: list[Check]
    first_bad: FirstBad | None

    def as_json(self) -> dict[str, Any]:
        """Return the maps of layers and modalities, and of layers and linears, that reports draw."""
        return {
            "stream": [
                {
                    "value": error.value,
                    "modality": error.modality,
                    "cosine": error.cosine,
                    "norm_ratio": error.norm_ratio,
                    "error": error.error,
                }
                for error in self.stream
            ],
            "linears": [
                {"layer": error.layer, "linear": error.linear, "error": error.error}
                for error in self.linears
            ],
        }


@dataclass(kw_only=True)
class _Kept:
    """Rows of tapped values, collected over samples."""

    rows_per_sample: int
    parts: dict[str, list[NDArray[Any]]] = field(default_factory=lambda: defaultdict(list))
    classes: list[NDArray[np.int8]] = field(default_factory=list)

    def add(self, values: Values, names: Sequence[str], classes: NDArray[np.int8]) -> None:
        """Keep rows of one sample, spread evenly."""
        count = min(self.rows_per_sample, len(classes))
        rows = np.linspace(0, len(classes) - 1, count).round().astype(np.int64)
        for name in names:
            self.parts[name].append(values[name][rows])
        self.classes.append(classes[rows])

    def joined(self) -> tuple[Values, NDArray[np.int8]]:
        """Return all rows and their classes."""
        return (
            {name: np.concatenate(parts) for name, parts in self.parts.items()},
            np.concatenate(self.classes),
        )


def run_numeric(
    setup: Setup,
    oracle: Oracle,
    samples: Sequence[ModelInputs],
    *,
    gates: Gates,
    tensors: Path | None = None,
    progress: Progress = silent,
) -> Numeric:
    """Compare both sides on teacher-forced samples.

    Args:
        setup: What is tested.
        oracle: Reference, with the weights of the bundle's checkpoint.
        samples: At least one.
        gates: Limits.
        tensors: Folder for what both sides computed in the first bad block; None writes nothing.
        progress: Called after each sample of each pass.
    """
    checkpoint = QuantCheckpoint.open(setup.bundle.checkpoint_folder, verify=False)
    text, family = oracle.model.text, oracle.model.family
    comparison = StreamComparison(text.layers)
    chunks = layer_chunks(text, rows=min(ROWS_PER_LINEAR, sum(len(s.input_ids) for s in samples)))
    linears: list[LinearError] = []
    for number, chunk in enumerate(chunks):
        taps = tuple(name for layer in chunk for name in linear_values(layer, family.linears))
        stream = stream_values(text.layers) if number == 0 else ()
        kept = _Kept(rows_per_sample=max(1, ROWS_PER_LINEAR // len(samples)))
        with open_tested(setup, oracle, (*taps, *stream)) as side:
            for index, sample in enumerate(samples):
                values = side.values(sample)
                if stream:
                    reference = oracle.values(sample, (INPUTS_EMBEDS, *stream))
                    comparison.add(reference, values, sample.token_classes)
                kept.add(values, taps, sample.token_classes)
                done = number * len(samples) + index + 1
                progress(done, len(chunks) * len(samples), f"layers {chunk[0]} to {chunk[-1]}")
        values, classes = kept.joined()
        for layer in chunk:
            linears += linear_errors(checkpoint, family, layer, values=values, classes=classes)
    errors = comparison.errors()
    found = suspect(linears, errors, gates)
    return Numeric(
        linears=linears,
        stream=errors,
        checks=[linear_check(linears, gates), *stream_checks(errors, gates)],
        first_bad=None
        if found is None
        else _look_closer(found, setup, oracle, samples, gates, tensors),
    )


def layer_chunks(text: TextShape, *, rows: int) -> list[range]:
    """Divide the blocks so that what is tapped of one part fits `TAP_BUDGET_BYTES`.

    Args:
        text: Widths of the linears.
        rows: Positions kept.
    """
    heads = (text.heads + 2 * text.kv_heads) * text.head_dim
    widths = 5 * text.hidden + text.heads * text.head_dim + heads + 3 * text.intermediate
    size = max(1, TAP_BUDGET_BYTES // (4 * rows * widths))
    return [range(start, min(start + size, text.layers)) for start in range(0, text.layers, size)]


def _look_closer(
    found: Suspect,
    setup: Setup,
    oracle: Oracle,
    samples: Sequence[ModelInputs],
    gates: Gates,
    tensors: Path | None,
) -> FirstBad:
    """Look inside the first bad block where its linears are right, and keep what was seen."""
    occurring = _occurring(samples)
    layers = oracle.model.text.layers
    inside = found.value in {hidden_value(layer) for layer in range(layers)}
    if not inside:
        return named(found, occurring=occurring)
    layer = found.position - 1
    sample, sides = _worst_sample(layer, setup, oracle, samples)
    if tensors is not None:
        _write(tensors, sides)
    looked = first_bad_op(layer, oracle.model.family.linears, sides, sample.token_classes, gates)
    if found.linear is None:
        return looked
    return replace(named(found, occurring=occurring), statistics=looked.statistics)


def _worst_sample(
    layer: int, setup: Setup, oracle: Oracle, samples: Sequence[ModelInputs]
) -> tuple[ModelInputs, tuple[Values, Values]]:
    """Run all samples again, one block tapped; return the one whose block output is farthest off."""
    family = oracle.model.family
    names = (*linear_values(layer, family.linears), hidden_value(layer))
    best: tuple[float, ModelInputs, tuple[Values, Values]] | None = None
    with open_tested(setup, oracle, names) as side:
        for sample in samples:
            reference, found = oracle.values(sample, names), side.values(sample)
            off = np.abs(found[hidden_value(layer)] - reference[hidden_value(layer)]).max()
            distance = np.inf if np.isnan(off) else float(off)
            if best is None or distance > best[0]:
                best = (distance, sample, (_only(reference, names), _only(found, names)))
    assert best is not None  # samples are never empty
    return best[1], best[2]


def _only(values: Values, names: Sequence[str]) -> Values:
    return {name: values[name] for name in names}


def _write(folder: Path, sides: tuple[Values, Values]) -> None:
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / FIRST_BAD_FILE,
        {
            f"{side}.{name}": np.asarray(value, np.float32)
            for side, values in zip(("reference", "tested"), sides, strict=True)
            for name, value in values.items()
        },
    )


def _occurring(samples: Sequence[ModelInputs]) -> list[str]:
    kinds = np.unique(np.concatenate([sample.token_classes for sample in samples]))
    return [TOKEN_CLASSES[int(kind)] for kind in kinds]
