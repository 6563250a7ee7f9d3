"""A request with ratios of token classes that the user edited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mbq_export.calibrate.edited import edited
from mbq_export.calibrate.methods import METHODS
from mbq_export.errors import UsageError
from mbq_export.reading import regular_size, sha256_of

if TYPE_CHECKING:
    from mbq_export.channel_scales import Switches
    from mbq_export.families.base import ModelFamily, TextShape
    from mbq_export.pipeline.request import BuildRequest


def ratios_of(
    request: BuildRequest, switches: Switches, *, family: ModelFamily, text: TextShape
) -> dict[str, Any] | None:
    """Read the edited report that a request names.

    Args:
        request: Perhaps names one.
        switches: Resolved.
        family: Its linears have entries in the report.
        text: Decoder sizes.

    Returns:
        None without one: ratios are measured where something needs them.

    Raises:
        UsageError: E2002 if nothing would read it.
        FormatError: E4316.
    """
    path = request.sensitivity
    if path is None:
        return None
    why = None
    if not METHODS[switches.method].needs_ratios(switches):
        why = f"nothing in --method {switches.method} is weighed by a ratio"
    elif request.import_scales is not None:
        why = "--import-scales replaces what would be weighed by it"
    elif "r_floor" in request.replaced or switches.modality_weight is not None:
        name = "--r-floor" if switches.modality_weight is None else "--modality-weight"
        why = f"it holds the final ratios, and {name} would change them"
    if why is not None:
        raise UsageError(
            "E2002",
            f"--sensitivity {path.name} does not go here.",
            why=why,
            fix=("leave out --sensitivity", "--method mbq"),
        )
    return edited(path, layers=text.layers, linears=family.linears)


def ratio_facts(request: BuildRequest) -> dict[str, str]:
    """Identity of an edited report for a fingerprint; nothing without one.

    Raises:
        FormatError: E4316 if there is no such file.
    """
    if request.sensitivity is None:
        return {}
    regular_size(request.sensitivity, code="E4316")
    return {"sensitivity": sha256_of(request.sensitivity)}
