"""2  ChannelScales -> QuantCheckpoint: fold the scales, round, pack, write."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from mbq_export.blocks.stream import BlockStream
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, InternalError, located
from mbq_export.progress import Progress, silent
from mbq_export.quantize.allocation import allocation_of
from mbq_export.quantize.apply import (
    QuantizedBlock,
    Rounder,
    Rounding,
    check_finite,
    content_hash,
    exact,
    pass_block,
    quantize_block,
)
from mbq_export.quantize.block_search import BlockSearch
from mbq_export.quantize.clip_pass import ClipPass
from mbq_export.quantize.facts import (
    config_with_quantization,
    model_facts,
    number_facts,
    skipped_modules,
)
from mbq_export.quantize.feedback import Feedback, Samples
from mbq_export.quantize.head import HeadFormat, finished_head, warn_of
from mbq_export.quantize.tower import quantize_tower
from mbq_export.quantize.write import write_checkpoint
from mbq_export.writing import explained, partial_path, publish

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from mbq_export.channel_scales import ChannelScales
    from mbq_export.families.base import LoadedModel
    from mbq_export.quantize.widths import MixedBits
    from mbq_export.schemes.base import QuantScheme
    from mbq_export.state import State

logger = logging.getLogger(__name__)

STAGE: Final = "quantize"


def quantize(  # noqa: PLR0913 - the whole input of a stage, by keyword
    model: LoadedModel,
    scales: ChannelScales,
    *,
    scheme: QuantScheme | None,
    group_size: int,
    out: Path,
    samples: Samples | None = None,
    mixed: MixedBits | None = None,
    head: HeadFormat | None = None,
    tower: QuantScheme | None = None,
    state: State | None = None,
    progress: Progress = silent,
) -> QuantCheckpoint:
    """Turn a model and its channel scales into a checkpoint, block by block.

    Args:
        model: Decoder blocks may be on the meta device: they are streamed from the model's files.
        scales: Result of a calibration; its switches decide rounding.
        scheme: Number format; None keeps every linear as it is (the full-precision baseline).
        group_size: Columns that share a scale, or `CHANNEL`; ignored without a scheme.
        out: Folder to make; appears only when complete.
        samples: What error feedback and clipping look at, and a rounded head is judged by; not used without them.
        mixed: Widths of units in place of the scheme's; its `check` passed.
        head: Number format of the output head; None keeps it as it is. Goes with a scheme only.
        tower: Number format of the vision tower, likewise; needs samples with pictures.
        state: Finished blocks are kept in it and not done again. That it belongs to the same arguments is
            its opener's business. Without it they are kept in memory.
        progress: Called after each block.

    Raises:
        UsageError: E2004 naming the linear if the group size does not fit its inputs, E2007 if those are too many,
            E2002 or E2018 if error feedback, clipping or a choice of widths lacks what it weighs by; E2001, E2003 or
            E2006 for widths that cannot be given.
        GateError: E1103 or E1110 naming the linear whose inputs cannot be used.
        FormatError: E4110 or E4112 naming the tensor, E4314 for a scale that fits no unit.
        ResourceError: E5001 or E5008.
    """
    rounding = Rounding(
        scheme=scheme,
        group_size=group_size if scheme else 0,
        compat=scales.switches.compat == "mbq",
    )
    stream = BlockStream(model)
    _check_groups(model, rounding)
    _check_blocks(scales, len(stream))
    allocation = None
    if mixed is not None and mixed.asked:
        allocation = allocation_of(
            model, scales, rounding, mixed, samples=samples, state=state, progress=progress
        )
        rounding = replace(rounding, units=allocation.schemes())
        if mixed.chooses:
            progress = _continued(progress, len(stream))
    blocks = _blocks(
        model, stream, scales, rounding, samples=samples, head=head, state=state, progress=progress
    )
    rest = _rest(model)
    check_finite(rest)
    hashes = [*(block.sha256 for block in blocks[: len(stream)]), content_hash(rest)]
    if head is not None:
        rest.pop(f"{model.family.head}.weight", None)
        warn_of(blocks[-1].linears[0])
    vision = None if tower is None else quantize_tower(model, tower, samples)
    kept = {n: exact(t, model, n) for n, t in rest.items()}
    if vision is not None:
        kept = {n: t for n, t in kept.items() if n not in vision.replaced} | dict(vision.tensors)
    rows = [row for block in blocks[: len(stream)] for row in block.linears]
    outside = [
        *(row for block in blocks[len(stream) :] for row in block.linears),
        *(() if vision is None else vision.linears),
    ]
    coded = [row["name"] for row in outside]
    numbers = number_facts(rounding, rows)
    # A state usually lies where the output would be staged by itself.
    staged = state.stage(STAGE) if state else partial_path(out)
    write_checkpoint(
        staged,
        [*(block.tensors for block in blocks), kept],
        info={
            **model_facts(model, hashes, head),
            **numbers,
            **({} if allocation is None else {"mixed": allocation.record}),
            "method": _method_facts(scales),
            "linears": [*rows, *outside],
            "vision": None if vision is None else dict(vision.facts),
            "skipped": skipped_modules(model, rounding, coded),
        },
        config=config_with_quantization(model, rounding, coded, bits=numbers["scheme"]["bits"]),
        source=model.folder,
    )
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    publish(staged, out)
    return QuantCheckpoint.open(out, verify=False)


def _blocks(  # noqa: PLR0913 - all that decides them, and who hears of it
    model: LoadedModel,
    stream: BlockStream,
    scales: ChannelScales,
    rounding: Rounding,
    *,
    samples: Samples | None,
    head: HeadFormat | None,
    state: State | None,
    progress: Progress,
) -> list[QuantizedBlock]:
    """All blocks, and behind them the head if it becomes codes.

    Those of an earlier run are only passed, and only where a later one needs what they leave.
    """
    depth, total = len(stream), len(stream) + (head is not None)
    switches = scales.switches
    found = [_kept(state, index) for index in range(total)]
    last = max((index for index in range(total) if found[index] is None), default=-1)
    if last == depth and switches.rounding != "gptq":
        # A head that is rounded to the nearest codes reads nothing.
        last = max((index for index in range(depth) if found[index] is None), default=-1)
    rounder: Rounder | None = None
    if rounding.scheme is not None and switches.looks_at_data and last >= 0:
        if switches.search_scope == "block":
            rounder = BlockSearch(model, stream, scales, samples, rounding=rounding, state=state)
        else:
            kind = Feedback if switches.rounding == "gptq" else ClipPass
            rounder = kind(model, stream, scales, samples, rounding=rounding)
    blocks = []
    for index, kept in enumerate(found):
        if kept is not None:
            block = kept
            if rounder is not None and index < last:
                pass_block(model, stream, index, scales, kept, rounder=rounder)
        elif index == depth:
            assert head is not None  # there is one more than blocks
            feedback = rounder if isinstance(rounder, Feedback) else None
            made = finished_head(model, stream, head, feedback=feedback, samples=samples)
            block = _saved(state, index, made)
        else:
            made = quantize_block(
                model, stream, index, scales, rounding, rounder=rounder, onwards=index < last
            )
            block = _saved(state, index, made)
        blocks.append(block)
        progress(index + 1, total, f"rel. error {block.error:.3g}")
    return blocks


def _continued(progress: Progress, start: int) -> Progress:
    """Progress of a second pass over the blocks."""
    return lambda done, total, note="": progress(start + done, start + total, note)


def _saved(state: State | None, index: int, block: QuantizedBlock) -> QuantizedBlock:
    """A block as it lies in the state, mapped, so that its memory is free."""
    if state is None:
        return block
    record = {"linears": list(block.linears), "sha256": block.sha256}
    state.save_block(STAGE, index, block.tensors, record)
    mapped = _kept(state, index)
    if mapped is None:
        raise InternalError("E9001", f"Block {index} was saved and cannot be read back.")
    return mapped


def _kept(state: State | None, index: int) -> QuantizedBlock | None:
    saved = state.load_block(STAGE, index) if state else None
    if saved is None:
        return None
    return QuantizedBlock(
        tensors=saved.tensors,
        linears=tuple(saved.record["linears"]),
        sha256=saved.record["sha256"],
    )


def _rest(model: LoadedModel) -> dict[str, Tensor]:
    """Everything outside the decoder blocks; a tied head is the embedding and not among it."""
    inside, head = f"{model.family.blocks}.", f"{model.family.head}.weight"
    return {
        name: tensor
        for name, tensor in model.module.state_dict().items()
        if not name.startswith(inside) and not (model.text.tied_head and name == head)
    }


def _check_groups(model: LoadedModel, rounding: Rounding) -> None:
    if rounding.scheme is None:
        return
    first = model.module.get_submodule(f"{model.family.blocks}.0")
    for linear in model.family.linears:
        with located(model.family.linear_path(0, linear)):
            columns = first.get_parameter(f"{linear}.weight").shape[1]
            rounding.scheme.check_columns(columns, rounding.group_size)


def _check_blocks(scales: ChannelScales, count: int) -> None:
    if scales.blocks > count:
        raise FormatError(
            "E4314",
            f"There are scales for block {scales.blocks - 1}.",
            why=f"the model has {count} blocks",
            fix="calibrate this model again",
        )


def _method_facts(scales: ChannelScales) -> dict[str, Any]:
    switches = scales.switches.resolved()
    return {
        "name": switches.pop("method"),
        **switches,
        "calibration_sha256": scales.calib.get("data", {}).get("sha256"),
        "seed": scales.calib.get("seed"),
    }
