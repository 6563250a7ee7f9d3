"""A request whose model is codes already: what the folder decides, and what nobody may choose any more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from mbq_export.channel_scales import Switches
from mbq_export.errors import UsageError, located
from mbq_export.pipeline.request import BuildRequest
from mbq_export.quantize.foreign import ForeignCheckpoint, settings_of
from mbq_export.quantize.importing import METHOD

if TYPE_CHECKING:
    from mbq_export.families.base import Config, ModelFamily
    from mbq_export.families.locate import ModelSource

SWITCHES = Switches(method=METHOD)
"""What a checkpoint says of a method that somebody else chose."""

CODES_KEPT: Final = "its codes are taken as they are"
KEPT_AS_THEY_ARE: Final = {
    "method": CODES_KEPT,
    "lm_head_bits": "its head is taken as it is",
    "vision_bits": "its tower is taken as it is",
    "data": CODES_KEPT,
    "import_scales": CODES_KEPT,
    "sensitivity": CODES_KEPT,
}
"""Fields of a request that must have their defaults, and why."""


def foreign_of(
    request: BuildRequest, source: ModelSource, *, config: Config, family: ModelFamily
) -> ForeignCheckpoint | None:
    """Open the model as codes of another project, if it is one and the request takes those.

    Raises:
        FormatError: E4011 or E41xx for what the folder holds.
        UsageError: E2004 if its groups do not fit our kernels.
    """
    if not request.takes_codes or settings_of(config) is None:
        return None
    with located(source.folder.name):
        return ForeignCheckpoint.open(source.folder, config=config, family=family)


def decided_by(request: BuildRequest, foreign: ForeignCheckpoint) -> BuildRequest:
    """The request with scheme and group size of the folder.

    Raises:
        UsageError: E2002 if something else was asked for, or data and a method for a search that is not made.
    """
    bits = foreign.scheme.weight_bits
    if request.weight_bits not in {None, bits}:
        _contradiction(foreign, f"--wbits {request.weight_bits}", f"its codes have {bits} bits")
    if request.scheme not in {None, foreign.scheme.name}:
        _contradiction(foreign, f"--scheme {request.scheme}", f"it is {foreign.scheme.name}")
    if request.group_size not in {None, foreign.group_size}:
        _contradiction(
            foreign,
            f"--group-size {request.group_size or 'channel'}",
            f"its groups have {foreign.group_size or 'all'} columns",
        )
    for name, kept in KEPT_AS_THEY_ARE.items():
        value = getattr(request, name)
        if value != getattr(BuildRequest, name):
            told = "" if isinstance(value, Path) else f" {value}"
            _contradiction(foreign, f"--{name.replace('_', '-')}{told}", kept)
    if request.replaced:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in request.replaced)
        _contradiction(foreign, names, CODES_KEPT)
    return replace(
        request, weight_bits=bits, scheme=foreign.scheme.name, group_size=foreign.group_size
    )


def _contradiction(foreign: ForeignCheckpoint, option: str, why: str) -> NoReturn:
    raise UsageError(
        "E2002",
        f"{option} contradicts {foreign.folder.name}, which is quantized already ({foreign.format.name}).",
        why=why,
        fix=("leave out the option", "give the 16-bit model it was made from"),
    )
