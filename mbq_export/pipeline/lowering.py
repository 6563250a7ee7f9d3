"""Which form of the decoder engines are built from: what the user asked for, or the best that every builder reads."""

from collections.abc import Sequence
from typing import Final

from mbq_export.backends import BACKENDS
from mbq_export.checkpoint import KEPT
from mbq_export.errors import UsageError
from mbq_export.export import fitting_lowering
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.schemes.base import QuantScheme
from mbq_export.target import Target

AUTO: Final = "auto"
ENGINE_FORMS: Final = ("plugin", "qdq")
"""Lowerings that TensorRT reads in earnest; it unpacks a reference graph to floats."""
_TRT: Final = "trt"


def engine_lowering(
    asked: str, *, targets: Sequence[Target], scheme: QuantScheme | None, group_size: int
) -> str | None:
    """Decide the form of the decoder graph for engines.

    Args:
        asked: One of `ENGINE_FORMS`, or `AUTO`.
        targets: Devices to build engines for.
        scheme: Number format; None for the unquantized baseline.
        group_size: Columns that share a scale.

    Returns:
        Its name. Without targets None, unless plugins were asked for: such a graph is then there for a device that
        builds its own engine.

    Raises:
        UsageError: E2001 for an unknown form, E2002 if it cannot hold the format or a target's builder does not
            read it, E2006 for groups that it cannot hold.
    """
    if asked not in {AUTO, *ENGINE_FORMS}:
        raise UsageError(
            "E2001",
            f"Engines are built from no lowering {asked!r}.",
            why=f"known: {', '.join((AUTO, *ENGINE_FORMS))}",
            fix=f"--lowering {AUTO}",
        )
    read = _read_by_all(targets)
    if asked == AUTO:
        name = KEPT if scheme is None else scheme.name
        return (
            fitting_lowering(read, scheme=name, group_size=group_size, target=_TRT)
            if targets
            else None
        )
    if targets and asked not in read:
        raise UsageError(
            "E2002",
            f"No engine for {', '.join(map(str, targets))} is built from the {asked} lowering here.",
            why=f"the builders of these targets read: {', '.join(read) or 'nothing in common'}",
            fix=("--lowering auto", "choose another --target"),
        )
    _check_format(asked, scheme, group_size)
    return asked if targets or asked == "plugin" else None


def _read_by_all(targets: Sequence[Target]) -> tuple[str, ...]:
    """Lowerings that the builders of all targets read, in the order of the first."""
    lists = [BACKENDS[target.flavour].lowerings for target in targets]
    return tuple(
        name
        for name in (lists[0] if lists else ())
        if name in ENGINE_FORMS and all(name in names for names in lists)
    )


def _check_format(asked: str, scheme: QuantScheme | None, group_size: int) -> None:
    lowering = LOWERINGS[asked]
    if scheme is not None:
        reason = lowering.supports(scheme, _TRT)
        lowering.check_group(scheme, group_size)
    else:
        reason = "nothing is quantized" if asked == "plugin" else None
    if reason is not None:
        raise UsageError(
            "E2002",
            f"--lowering {asked} does not fit: {reason}.",
            why="a lowering has a form for some number formats only",
            fix=f"--lowering {AUTO}",
        )
