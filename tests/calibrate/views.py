"""Unit views of a block, as the stage hands them to a method."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mbq_export.blocks.stream import Batch, BlockStream
from mbq_export.calibrate.methods.base import Found, Method
from mbq_export.calibrate.smooth import Job, SmoothedBlock, smooth_block
from mbq_export.calibrate.units import UnitView
from mbq_export.channel_scales import Switches
from mbq_export.families.base import LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.schemes import SCHEMES

RATIOS = {"attn": 0.3, "mlp": 0.6}


def report(model: LoadedModel) -> dict[str, Any]:
    """A sensitivity report with one ratio per half of every block."""
    linears = {name: {"clipped": {"prompt": 0.5}} for name in model.family.linears}
    return {"layers": [{"r": RATIOS, "linears": linears} for _ in range(model.text.layers)]}


def job(
    model: LoadedModel,
    switches: Switches,
    method: Method,
    *,
    scheme: str = "w3a16",
    group_size: int = 32,
) -> Job:
    """What all blocks of one calibration share."""
    return Job(
        stream=BlockStream(model),
        places=model.family.smooth,
        text=model.text,
        scheme=SCHEMES[scheme],
        group_size=group_size,
        method=method,
        switches=switches,
        sensitivity=report(model),
        seed=0,
    )


def first_block(
    task: Job, inputs: Sequence[ModelInputs], *, index: int = 0
) -> tuple[nn.Module, list[tuple[Batch, Tensor]], SmoothedBlock]:
    """Run a job on one block whose input rows are the embeddings."""
    pairs = [(batch, batch.hidden) for batch in task.stream.begin(inputs)]
    with task.stream.block(index) as block:
        return block, pairs, smooth_block(task, block, index, pairs)


def views(
    model: LoadedModel,
    inputs: Sequence[ModelInputs],
    switches: Switches,
    *,
    balanced: bool = True,
    **options: Any,
) -> dict[str, UnitView]:
    """The views of the first block by unit name."""
    seen: dict[str, UnitView] = {}

    def look(unit: UnitView, _switches: Switches) -> Found | None:
        seen[unit.place.unit] = unit
        return None

    spy = Method(name="spy", switches=switches, balanced=balanced, scales=look)
    first_block(job(model, switches, spy, **options), inputs)
    return seen


def moved_on(unit: UnitView, kind: int, *, by: float) -> UnitView:
    """The unit with its noted full-precision outputs moved on the tokens of one class."""
    calls = [
        replace(
            call,
            output=call.output + by * (call.classes == kind).reshape(*call.output.shape[:-1], 1),
        )
        for call in unit.calls()
    ]
    return replace(unit, calls=lambda: iter(calls))
