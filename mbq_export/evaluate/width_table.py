"""What a checkpoint of mixed widths says about them, as a sentence and as rows."""

from collections.abc import Mapping
from typing import Any, Final

from mbq_export.evaluate.lookup import dig, items, words
from mbq_export.evaluate.wording import figure

WIDTHS: Final = ("3", "4")
HEADER: Final = ("layer", "unit", "bits", "fixed", *(f"error at {bits}" for bits in WIDTHS))


def width_rows(mixed: Any) -> list[tuple[str, ...]]:
    """One row per unit, as `HEADER` says; errors are those that were predicted, or empty."""
    return [
        (
            words(row.get("layer")),
            words(row.get("unit")),
            words(row.get("bits")),
            words(row.get("fixed")),
            *(figure(dig(row, "error", bits)) for bits in WIDTHS),
        )
        for row in items(dig(mixed, "units"))
    ]


def width_summary(mixed: Any) -> str:
    """Mean bits and predicted errors of a checkpoint's widths; empty where all units have that of the scheme."""
    if not isinstance(mixed, Mapping):
        return ""
    told = f"{figure(mixed.get('average_bits'))} bits on average, without scales"
    predicted = mixed.get("predicted")
    if not isinstance(predicted, Mapping):
        return f"{told}; widths were given by name"
    error = ", ".join(
        f"{name.replace('_', ' at ')} {figure(value)}" for name, value in predicted.items()
    )
    return f"{told}; predicted error: {error}"
