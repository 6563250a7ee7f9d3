"""A request with channel scales that somebody else searched."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mbq_export.calibrate.methods.base import OF_SEARCH
from mbq_export.calibrate.published import Published, fold_difference
from mbq_export.channel_scales import ChannelScales
from mbq_export.errors import UsageError
from mbq_export.pipeline.request import UNQUANTIZED_BITS
from mbq_export.pipeline.take_over import SWITCHES
from mbq_export.reading import regular_size, sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbq_export.channel_scales import Switches
    from mbq_export.families.base import LoadedModel
    from mbq_export.pipeline.plan import Plan
    from mbq_export.pipeline.request import BuildRequest
    from mbq_export.schemes.base import QuantScheme

logger = logging.getLogger(__name__)


def needs_data(request: BuildRequest, scheme: QuantScheme | None, switches: Switches) -> bool:
    """Whether anything looks at calibration data: a search, error feedback, clipping, or what is outside the decoder.

    A tower in 8 bits needs pictures; what a head of codes costs is measured where there is data.

    Raises:
        UsageError: E2002 for data or switches that nothing would look at, and for scales where nothing is rounded.
    """
    published = request.import_scales is not None
    if published and scheme is None:
        raise UsageError(
            "E2002",
            "--import-scales contradicts --wbits 16.",
            why="the unquantized baseline has no scales",
            fix=("--wbits 3", "--wbits 4"),
        )
    if published:
        _refuse_search(request, switches)
    if scheme is None or switches == SWITCHES:
        return False
    tower, head = (bits != UNQUANTIZED_BITS for bits in (request.vision_bits, request.lm_head_bits))
    outside = tower or (head and request.data is not None)
    if not published or switches.looks_at_data or outside:
        return True
    if request.data is not None:
        raise UsageError(
            "E2002",
            "--import-scales contradicts --data.",
            why="the scales were searched by others, and rounding to nearest looks at no data",
            fix=("leave out --data", "leave out --import-scales"),
        )
    return False


def _refuse_search(request: BuildRequest, switches: Switches) -> None:
    """Refuse choices about the search that imported scales replace; a joint search has a loss and tokens of its own.

    Raises:
        UsageError: E2002.
    """
    searched = {*OF_SEARCH, "search_prompt_weight", "r_floor", "modality_weight"}
    if switches.search_scope == "block":
        searched -= {"loss", "tokens"}
    for name in sorted(searched):
        if name in request.replaced:
            raise UsageError(
                "E2002",
                f"--{name.replace('_', '-')} decides nothing here.",
                why="--import-scales replaces the search",
                fix=(f"leave out --{name.replace('_', '-')}", "leave out --import-scales"),
            )


def published_facts(request: BuildRequest) -> dict[str, str]:
    """Identity of the published scales for a fingerprint; nothing without any.

    Raises:
        FormatError: E4314 if there is no such file.
    """
    path = request.import_scales
    if path is None:
        return {}
    for each in (path, path.with_suffix(".json")):
        regular_size(each, code="E4314")
    return {"import_scales": f"{sha256_of(path)} {sha256_of(path.with_suffix('.json'))}"}


def published_scales(plan: Plan, model: LoadedModel, note: Callable[[str], None]) -> ChannelScales:
    """Read the published scales of a plan, and make sure that folding them changes nothing.

    Args:
        plan: Names the file.
        model: In float32.
        note: Hears how many there are.

    Raises:
        FormatError: E4314 or E4101.
    """
    path = plan.request.import_scales
    assert path is not None and plan.scheme is not None  # noqa: PT018 - `needs_data` refused others
    published = Published.read(path, family=plan.family, text=plan.text)
    calib: dict[str, Any] = {
        "model": {"id": plan.source.name},
        "imported": {"sha256": published.sha256, "clips_not_applied": published.clips},
        "scheme": plan.scheme.name,
        "group_size": plan.group_size,
        "seed": plan.request.seed,
        "switches": plan.switches.resolved(),
        "ratios": "none",
        "units": [_unit(name) for name in published.scales],
    }
    scales = ChannelScales(scales=published.scales, sensitivity={}, calib=calib)
    change = fold_difference(model, scales)
    note(
        f"      scales      {path.name}, {len(published.scales)} units, folding moves {change:.1e}"
    )
    if published.clips:
        logger.warning(
            "MBQ-W4313: %d clips of %s are not applied: weights are rounded over their whole range",
            published.clips,
            path.name,
        )
    return scales


def _unit(name: str) -> dict[str, Any]:
    _, layer, unit, _ = name.split(".")
    return {"layer": int(layer), "unit": unit, "alpha": None}
