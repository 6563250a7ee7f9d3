"""Samples for the two stages that look at them: the search of channel scales, and rounding."""

from collections.abc import Callable

from mbq_export.blocks.tokens import hash_inputs
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.data import encode, token_shares
from mbq_export.channel_scales import ChannelScales
from mbq_export.errors import FormatError
from mbq_export.families.base import LoadedModel
from mbq_export.pipeline.plan import Plan
from mbq_export.pipeline.published import published_scales
from mbq_export.progress import Progress
from mbq_export.quantize.feedback import Samples
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
        sensitivity=plan.ratios,
        for_widths=plan.request.mixed.chooses,
    )
    return calibrate(model, inputs, recipe, state=state, progress=progress)


def samples_of_scales(plan: Plan, model: LoadedModel, scales: ChannelScales) -> Samples | None:
    """Encode the samples of a calibration again, and those held out, for rounding.

    Args:
        plan: Names the data.
        model: Its processor encodes.
        scales: Know which samples they were found on.

    Returns:
        None where rounding looks at no data.

    Raises:
        FormatError: E4315 if the plan's data is not that of the scales, E43xx for the data.
    """
    chooses = plan.request.mixed.chooses
    outside = plan.head is not None or plan.tower is not None
    looks = scales.switches.looks_at_data or chooses or outside
    if plan.scheme is None or plan.data is None or not looks:
        return None
    data, longest = plan.data, plan.text.max_positions
    inputs = encode(data.samples, model.processor, max_tokens=longest)
    known = scales.calib.get("data", {})
    found = {"inputs_sha256": hash_inputs(inputs), "sha256": data.sha256}
    if any(known.get(name, value) != value for name, value in found.items()):
        raise FormatError(
            "E4315",
            f"{data.name}, {len(inputs)} samples drawn with seed {plan.request.seed}, is not the data of the scales.",
            why=f"they were found on {known.get('samples')} samples with hash {str(known.get('sha256'))[:16]}; "
            f"these have {data.sha256[:16]}",
            fix=("--data with the file that calibrate read", "calibrate again with this data"),
        )
    held_out = encode(data.held_out, model.processor, max_tokens=longest)
    return Samples(inputs=inputs, held_out=held_out)
