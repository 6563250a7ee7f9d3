"""Samples for the two stages that look at them: the search of channel scales, and rounding."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from mbq_export.blocks.memory import resident_bytes
from mbq_export.blocks.room import Room
from mbq_export.blocks.tokens import hash_inputs
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.data import encode, token_shares
from mbq_export.channel_scales import ChannelScales
from mbq_export.errors import FormatError
from mbq_export.families.base import LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.native import available_memory
from mbq_export.pipeline.plan import Plan
from mbq_export.pipeline.published import published_scales
from mbq_export.progress import Progress
from mbq_export.quantize.feedback import Samples
from mbq_export.state import State


class Encoded:
    """The samples of a plan as its model reads them: encoded when they are first asked for, and once."""

    def __init__(self, plan: Plan, model: LoadedModel) -> None:
        """Encode nothing yet."""
        self.plan, self.model = plan, model

    @cached_property
    def inputs(self) -> list[ModelInputs]:
        """Calibration samples.

        Raises:
            FormatError: E43xx for the data.
        """
        assert self.plan.data is not None  # nobody asks without
        longest = self.plan.text.max_positions
        return list(encode(self.plan.data.samples, self.model.processor, max_tokens=longest))


def room_of(plan: Plan, folder: Path, note: Callable[[str], None]) -> Room:
    """Where a calibration keeps rows.

    Args:
        plan: Says how much memory it may take; else what the machine or its container has left.
        folder: The run's own, for what memory does not hold.
        note: Hears the plan of memory.
    """
    limit = plan.request.max_ram
    if limit is None:
        limit = available_memory() + resident_bytes()
    return Room(folder, limit=limit, tell=lambda text: note(f"      memory      {text}"))


def channel_scales(
    encoded: Encoded,
    note: Callable[[str], None],
    *,
    state: State | None,
    room: Room,
    progress: Progress,
) -> ChannelScales:
    """Calibrate a model as planned.

    Args:
        encoded: The plan with its data, scheme, switches and seed; a model whose blocks may be on the meta device.
        note: Hears the token shares.
        state: Keeps finished blocks, or None.
        room: Hears what memory is needed.
        progress: Called after each block of each pass.

    Returns:
        Scales of every unit; none for the unquantized baseline, which needs no data.
    """
    plan, model = encoded.plan, encoded.model
    if plan.request.import_scales is not None:
        return published_scales(plan, model, note)
    if plan.scheme is None or plan.data is None:
        return ChannelScales(
            scales={}, sensitivity={}, calib={"switches": plan.switches.resolved()}
        )
    inputs = encoded.inputs
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
    return calibrate(model, inputs, recipe, state=state, room=room, progress=progress)


def samples_of_scales(encoded: Encoded, scales: ChannelScales) -> Samples | None:
    """The samples of a calibration, and those held out, for rounding.

    Args:
        encoded: The plan that names the data, and the model.
        scales: Know which samples they were found on.

    Returns:
        None where rounding looks at no data.

    Raises:
        FormatError: E4315 if the plan's data is not that of the scales, E43xx for the data.
    """
    plan = encoded.plan
    chooses = plan.request.mixed.chooses
    outside = plan.head is not None or plan.tower is not None
    looks = scales.switches.looks_at_data or chooses or outside
    if plan.scheme is None or plan.data is None or not looks:
        return None
    data, inputs = plan.data, encoded.inputs
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
    longest = plan.text.max_positions
    held_out = encode(data.held_out, encoded.model.processor, max_tokens=longest)
    return Samples(inputs=inputs, held_out=held_out)
