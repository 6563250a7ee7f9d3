"""Which form of the decoder fits a number format and a target best."""

from contextlib import suppress
from typing import Final

from mbq_export.checkpoint import KEPT
from mbq_export.errors import UsageError
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.schemes import schemes_named

PREFERRED: Final = {"ort": ("qdq", "reference"), "trt": ("plugin", "qdq")}
"""Lowerings by target, best first."""
UNQUANTIZED: Final = "qdq"
"""Lowering of a model without quantized linears, whose graph has standard operators only."""


def fitting_lowering(names: tuple[str, ...], *, scheme: str, group_size: int, target: str) -> str:
    """The first of some lowerings that holds a number format for a target.

    Args:
        names: Best first, `PREFERRED` of the target or what a backend reads; not empty.
        scheme: Name of the number format, or of several that are mixed; the unquantized baseline fits standard
            operators only.
        group_size: Columns that share a scale.
        target: ``ort`` or ``trt``.

    Returns:
        The last name if none fits: `check_forms` says why.
    """
    for name in names:
        lowering = LOWERINGS[name]
        if scheme == KEPT:
            if name == UNQUANTIZED:
                return name
        elif all(lowering.supports(each, target) is None for each in schemes_named(scheme)):
            with suppress(UsageError):
                for each in schemes_named(scheme):
                    lowering.check_group(each, group_size)
                return name
    return names[-1]
