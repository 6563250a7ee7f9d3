"""One block: run it in full precision, show each of its units to the method, collect the scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mbq_export.blocks.loss import ClassWeights
from mbq_export.blocks.ratios import prompt_weight_of, r_of
from mbq_export.calibrate.moved_rows import MovedRows
from mbq_export.calibrate.units import UnitView, draw_tokens, observe, run_and_watch
from mbq_export.errors import located
from mbq_export.families.base import ANSWER, PROMPT, VISION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mbq_export.blocks.stream import Batch, BlockStream
    from mbq_export.calibrate.first_errors import FirstErrors
    from mbq_export.calibrate.methods.base import Method
    from mbq_export.calibrate.units import BlockObservation, Call, Draws, Read
    from mbq_export.channel_scales import Switches
    from mbq_export.families.base import Smooth, TextShape
    from mbq_export.schemes.base import QuantScheme


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all blocks of one calibration share.

    Attributes:
        stream: Runs blocks.
        places: Units of a block.
        text: Decoder sizes.
        scheme: Number format to round to.
        group_size: Columns that share a scale.
        method: Rule for scales.
        switches: Resolved.
        sensitivity: Measured or supplied ratios; empty if the method needs none.
        seed: Seeds the choice of scored tokens.
        first: Errors of plain rounding, where the grid depends on them.
    """

    stream: BlockStream
    places: tuple[Smooth, ...]
    text: TextShape
    scheme: QuantScheme
    group_size: int
    method: Method
    switches: Switches
    sensitivity: Mapping[str, Any]
    seed: int
    first: FirstErrors | None = None

    def is_scaled(self, place: Smooth) -> bool:
        """Whether a unit is searched: attention outputs of shared value heads only if they were asked for."""
        shared = self.text.heads != self.text.kv_heads
        return place.unit != "o" or not shared or self.switches.gqa_o_scale


@dataclass(frozen=True, kw_only=True)
class SmoothedBlock:
    """Result of one block.

    Attributes:
        scales: Unit name to (K,) float32 e; units left as they are do not occur.
        units: A record per unit, as `calib.json` keeps them.
        outputs: Per batch, the full-precision input of the next block.
        moved: The same as rounded blocks leave it; None where nobody reads it.
    """

    scales: dict[str, Tensor]
    units: list[dict[str, Any]]
    outputs: list[Tensor]
    moved: list[Tensor] | None = None


@torch.no_grad()
def smooth_block(
    job: Job,
    block: nn.Module,
    index: int,
    batches: Sequence[tuple[Batch, Tensor]],
    *,
    moved: Sequence[Tensor] | None = None,
) -> SmoothedBlock:
    """Find the scales of all units of a block. The block is not changed.

    Args:
        job: Method, switches and scheme.
        block: In full precision.
        index: Its position.
        batches: All samples with the block's input rows.
        moved: Per batch, the block's input rows as rounded blocks leave them, if units are to be searched on those.

    Raises:
        GateError: E1103 naming block, unit and exponent if an objective is not finite.
    """
    places = [place for place in job.places if job.is_scaled(place)]
    draws = _draws(job, index, [batch for batch, _ in batches])
    watch = partial(observe, job.stream, block, index, batches, draws=draws)
    second = None
    if moved is not None:
        pairs = [(batch, rows) for (batch, _), rows in zip(batches, moved, strict=True)]
        second = MovedRows(job, block, index, pairs)
    seen = watch(places=[] if second else places)
    scales: dict[str, Tensor] = {}
    units: list[dict[str, Any]] = []
    for place in job.places:
        about = {"layer": index, "unit": place.unit, "absorbed_by": place.source}
        if place not in places or job.method.scales is None:
            units.append({**about, "alpha": None})
            continue
        looked = seen
        if second is not None:
            looked = watch(places=[place], read=second.read_by(place, scales))
        view = _view(job, block, index, place, looked, batches)
        with located(f"block {index}"), located(place.unit):
            found = job.method.scales(view, job.switches)
        if found is None:
            units.append({**about, "alpha": None})
            continue
        scales[place.unit] = found.scales
        r = view.r if job.sensitivity else None
        units.append({**about, "alpha": found.alpha, "r": r, **found.record})
    return SmoothedBlock(
        scales=scales,
        units=units,
        outputs=seen.outputs,
        moved=None if second is None else second.outputs(scales),
    )


def _draws(job: Job, index: int, batches: Sequence[Batch]) -> Draws | None:
    """Tokens that stand for all: of every class that the loss weighs."""
    if job.switches.tokens == "all":
        return None
    kinds = [VISION, ANSWER]
    if not job.method.balanced or job.switches.search_prompt_weight == "measured":
        kinds.append(PROMPT)
    tokens = int(job.switches.tokens)
    return draw_tokens(batches, tokens=tokens, kinds=kinds, seed=[job.seed, index])


def _view(
    job: Job,
    block: nn.Module,
    index: int,
    place: Smooth,
    seen: BlockObservation,
    batches: Sequence[tuple[Batch, Tensor]],
) -> UnitView:
    r, prompt = 0.0, 0.0
    if job.sensitivity:
        r = r_of(job.sensitivity, index, place.unit)
        if job.switches.search_prompt_weight == "measured":
            prompt = prompt_weight_of(job.sensitivity, index, place.unit)
    if job.switches.modality_weight is not None:
        r = job.switches.modality_weight
    kept = seen.kept.get(place.unit)
    return UnitView(
        layer=index,
        place=place,
        block=block,
        text=job.text,
        scheme=job.scheme,
        group_size=job.group_size,
        r=r,
        weights=ClassWeights(vision=r, prompt=prompt) if job.method.balanced else None,
        statistics=seen.statistics[place.unit],
        steps=seen.steps.get(place.unit, ()),
        calls=partial(iter, kept)
        if kept is not None
        else partial(_again, job.stream, block, index, batches, place, seen.read),
        coarse=job.first is not None and job.first.is_small(index, place.unit),
    )


def _again(
    stream: BlockStream,
    block: nn.Module,
    index: int,
    batches: Sequence[tuple[Batch, Tensor]],
    place: Smooth,
    read: Read | None,
) -> Iterator[Call]:
    """Run the block again for one unit's calls: what a large model does instead of keeping them."""
    for _, calls in run_and_watch(stream, block, index, batches, [place], read=read):
        yield calls[place.unit]
