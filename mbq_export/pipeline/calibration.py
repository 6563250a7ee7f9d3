"""From a plan to channel scales: read the data, encode it with the model's processor, search."""

from collections.abc import Callable

from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.data import encode, token_shares
from mbq_export.channel_scales import ChannelScales
from mbq_export.families.base import LoadedModel
from mbq_export.pipeline.plan import Plan
from mbq_export.pipeline.published import published_scales
from mbq_export.progress import Progress
from mbq_export.state import State


def channel_scales(
    plan: Plan,
    model: LoadedModel,
    note: Callable[[str], None],
    *,
    state: State | None,
    progress: Progress,
) -> ChannelScales:
    """Calibrate a model as planned.

    Args:
        plan: Data, scheme, switches, seed.
        model: Decoder blocks may be on the meta device.
        note: Hears the token shares.
        state: Keeps finished blocks, or None.
        progress: Called after each block of each pass.

    Returns:
        Scales of every unit; none for the unquantized baseline, which needs no data.
    """
    if plan.request.import_scales is not None:
        return published_scales(plan, model, note)
    if plan.scheme is None or plan.data is None:
        return ChannelScales(
            scales={}, sensitivity={}, calib={"switches": plan.switches.resolved()}
        )
    inputs = encode(plan.data.samples, model.processor, max_tokens=plan.text.max_positions)
    shares = token_shares(inputs)
    note(f"      data        {plan.data.name}, {len(inputs)} samples · {shares}")
    facts = {
        "model": {"id": plan.source.name},
        "data": {"sha256": plan.data.sha256, "samples": len(inputs), "skipped": plan.data.skipped},
    }
    recipe = Recipe(
        scheme=plan.scheme,
        group_size=plan.group_size,
        switches=plan.switches,
        seed=plan.request.seed,
        facts=facts,
        text_only_ok=plan.request.text_only_ok,
    )
    return calibrate(model, inputs, recipe, state=state, progress=progress)
