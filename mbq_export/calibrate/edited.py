"""A sensitivity report that somebody edited, in place of a measurement.

Of the fields that `sensitivity.sensitivity` writes, a search reads ``layers[].r``, and of each linear ``clipped`` and
``mean_sq``; those are checked, the others are recorded as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NoReturn

from mbq_export.blocks.ratios import MEASURED_AT
from mbq_export.channel_scales import JSON_LIMIT_BYTES, SENSITIVITY_SCHEMA
from mbq_export.errors import FormatError
from mbq_export.reading import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

READ: Final = {"clipped": ("vision", "prompt"), "mean_sq": ("answer",)}
"""What is read of a linear."""


def edited(path: Path, *, layers: int, linears: Sequence[str]) -> dict[str, Any]:
    """Read and check an edited report.

    Args:
        path: Of a ``sensitivity.json``.
        layers: Blocks of the model.
        linears: Linears of a block.

    Returns:
        The report, its source ``user``.

    Raises:
        FormatError: E4316 if it is malformed or of another model.
    """
    report = read_json(path, limit=JSON_LIMIT_BYTES, code="E4316")
    if report.pop("schema", None) != SENSITIVITY_SCHEMA:
        _refuse(f"{path.name} is no {SENSITIVITY_SCHEMA}.", "such a file is made by calibrate")
    entries = report.get("layers")
    if not isinstance(entries, list) or len(entries) != layers:
        count = len(entries) if isinstance(entries, list) else "no"
        _refuse(f"{path.name} has {count} layers.", f"the model has {layers}")
    for index, entry in enumerate(entries):
        for half in MEASURED_AT:
            _check(entry, f"layers[{index}]", ("r", half), nullable=False)
        for linear in linears:
            for part, kinds in READ.items():
                for kind in kinds:
                    _check(entry, f"layers[{index}]", ("linears", linear, part, kind))
    return {**report, "source": "user"}


def _check(entry: Any, place: str, keys: tuple[str, ...], *, nullable: bool = True) -> None:
    """Refuse a value that is missing or no weight."""
    value = entry
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            _refuse(f"{place} has no {'.'.join(keys)}.", "a field of every report is missing")
        value = value[key]
    if value is None and nullable:
        return
    if type(value) not in {int, float} or not math.isfinite(value) or value < 0:
        _refuse(
            f"{place}.{'.'.join(keys)} is {str(value)[:40]}.",
            f"weights are numbers from 0{', or null' if nullable else ''}",
        )


def _refuse(message: str, why: str) -> NoReturn:
    raise FormatError(
        "E4316",
        message,
        why=why,
        fix="edit the sensitivity.json of: mbq-export calibrate --model MODEL -o DIR",
    )
