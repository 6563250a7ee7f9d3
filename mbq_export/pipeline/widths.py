"""Widths of units in a plan: what can be asked for, checked before anything expensive starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mbq_export.errors import UsageError
from mbq_export.families.base import linear_shapes
from mbq_export.quantize.allocate import compete, named
from mbq_export.schemes.base import group_name

if TYPE_CHECKING:
    from mbq_export.families.base import ModelFamily, TextShape
    from mbq_export.pipeline.request import BuildRequest
    from mbq_export.quantize.foreign import ForeignCheckpoint
    from mbq_export.schemes.base import QuantScheme


def check_widths(
    request: BuildRequest,
    scheme: QuantScheme | None,
    *,
    group_size: int,
    family: ModelFamily,
    text: TextShape,
    foreign: ForeignCheckpoint | None = None,
) -> None:
    """Refuse widths that cannot be given.

    Args:
        request: Perhaps asks for some.
        scheme: Of units that nothing else is said about.
        group_size: Columns that share a scale.
        family: Names units and linears.
        text: Decoder sizes.
        foreign: Codes of another project, which are taken as they are.

    Raises:
        UsageError: E2001 for a pattern that matches nothing or a shape without a time, E2002 for options that contradict
            each other, E2003 for a budget out of reach, E2004, E2005, E2006 for a part of a unit.
        FormatError: E4002 or E4102 for a table of times.
    """
    mixed = request.mixed
    if not mixed.asked:
        return
    if foreign is not None:
        raise UsageError(
            "E2002",
            f"Widths of units contradict {foreign.folder.name}, which is quantized already ({foreign.format.name}).",
            why="its codes are taken as they are",
            fix=("leave out the options of bits", "give the 16-bit model it was made from"),
        )
    mixed.check(scheme, group_size)
    assert scheme is not None  # checked
    if mixed.chooses and request.import_scales is not None:
        raise UsageError(
            "E2002",
            "--import-scales does not go with a budget of bits.",
            why="gradients decide where bits go, and scales of others come without them",
            fix=("--bits PATTERN=4 chooses by name", "leave out --import-scales"),
        )
    shapes, layers = linear_shapes(text), text.layers
    if mixed.chooses:
        compete(mixed, family=family, shapes=shapes, layers=layers, group_size=group_size)
    else:
        named(mixed, scheme, family=family, shapes=shapes, layers=layers)


def width_facts(request: BuildRequest) -> dict[str, Any]:
    """What a fingerprint says of widths: nothing where all units have that of the scheme."""
    return {"mixed": request.mixed.facts()} if request.mixed.asked else {}


def width_row(request: BuildRequest, scheme: QuantScheme, group_size: int) -> tuple[str, str]:
    """Bits of a decoder linear and their format, as a plan tells them before widths are chosen."""
    bits, mixed = scheme.bits_per_weight(group_size), request.mixed
    told = f"{scheme.name} {group_name(group_size)}"
    if mixed.avg_bits is not None and mixed.latency_table is None:
        return f"{bits - scheme.weight_bits + mixed.avg_bits:.3f}", f"{told}, mixed with 4 bits"
    return f"{bits:.3f}", f"{told}, mixed with other widths" if mixed.asked else told
