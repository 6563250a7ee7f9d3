"""Widths of a model's units from what was asked for: by name, or by a budget and predicted errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbq_export.blocks.stream import BlockStream
from mbq_export.errors import UsageError
from mbq_export.families.base import linear_shapes
from mbq_export.progress import Progress, silent
from mbq_export.quantize.allocate import Allocation, allocate, compete, named
from mbq_export.quantize.unit_errors import UnitErrors
from mbq_export.quantize.widths import SCHEME_OF
from mbq_export.schemes import SCHEMES

if TYPE_CHECKING:
    from mbq_export.channel_scales import ChannelScales
    from mbq_export.families.base import LoadedModel
    from mbq_export.quantize.apply import Rounding
    from mbq_export.quantize.feedback import Samples
    from mbq_export.quantize.widths import MixedBits
    from mbq_export.state import State


def allocation_of(  # noqa: PLR0913 - all that decides widths, and who hears of it
    model: LoadedModel,
    scales: ChannelScales,
    rounding: Rounding,
    mixed: MixedBits,
    *,
    samples: Samples | None = None,
    state: State | None = None,
    progress: Progress = silent,
) -> Allocation:
    """Decide the width of every unit.

    Args:
        model: Decoder blocks may be on the meta device.
        scales: Folded before rounding; their gradients weigh errors.
        rounding: Number format of units that nothing is said about, groups, and whose rule.
        mixed: What was asked for.
        samples: What errors are predicted on; not looked at where widths are given by name.
        state: Keeps predicted errors of finished blocks.
        progress: Called after each block.

    Raises:
        UsageError: E2001, E2003 or E2006 for widths that cannot be given, E2002 without gradients, E2018 without samples.
        FormatError: E4102 for a table of times that is none.
        GateError: E1103 for inputs that are not finite.
    """
    assert rounding.scheme is not None  # `MixedBits.check` refused the baseline
    family, text = model.family, model.text
    shapes = linear_shapes(text)
    if not mixed.chooses:
        return named(mixed, rounding.scheme, family=family, shapes=shapes, layers=text.layers)
    competition = compete(
        mixed,
        family=family,
        shapes=shapes,
        layers=text.layers,
        group_size=rounding.group_size,
    )
    if samples is None or not samples.inputs:
        raise UsageError(
            "E2018",
            "A choice of widths has no calibration data to look at.",
            why="it predicts what rounding a unit costs the answers",
            fix=("--data calib.jsonl", "--bits PATTERN=4 chooses by name"),
        )
    schemes = [SCHEMES[name] for name in SCHEME_OF.values()]
    errors = UnitErrors(model, BlockStream(model), scales, rounding, schemes)
    return allocate(
        mixed, competition, errors.of_all(samples.inputs, state=state, progress=progress)
    )
