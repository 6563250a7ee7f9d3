"""1  model + pictures -> ChannelScales: measure gradients per token class, search a scale per unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from mbq_export.blocks.memory import plan_memory
from mbq_export.blocks.stream import BlockStream
from mbq_export.blocks.tokens import count_classes, hash_inputs
from mbq_export.calibrate.first_errors import FirstErrors, first_errors
from mbq_export.calibrate.gradients import Gradients, measure
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.moved_rows import MovedRows
from mbq_export.calibrate.sensitivity import sensitivity
from mbq_export.calibrate.smooth import Job, smooth_block
from mbq_export.channel_scales import FOR_WIDTHS, ChannelScales
from mbq_export.errors import FormatError, UsageError, located
from mbq_export.families.base import TOKEN_CLASSES
from mbq_export.progress import Progress, silent
from mbq_export.schemes.base import CHANNEL
from mbq_export.state import fingerprint_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mbq_export.blocks.room import Room
    from mbq_export.blocks.stream import Batch
    from mbq_export.channel_scales import Switches
    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs
    from mbq_export.schemes.base import QuantScheme
    from mbq_export.state import State

ALGORITHM: Final = 2
"""Raised when the same inputs would give other scales."""

GRADIENTS: Final = "gradients"
FIRST: Final = "first-errors"
BLOCKS: Final = "calibrate"
"""Names of the kinds of finished work in a `State`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the result besides the model and the samples.

    Attributes:
        scheme: Number format that the search rounds to.
        group_size: Columns that share a scale.
        switches: Resolved: the method's preset with the user's replacements.
        seed: Seeds the choice of scored tokens and the bootstrap.
        facts: Recorded as they are: ``model`` {"id", "sha256"}, ``data`` {"sha256", ...}. No paths.
        text_only_ok: Go on without image tokens; vision then weighs nothing.
        sensitivity: An edited `sensitivity.json` to use in place of a measurement.
        for_widths: Measure gradients for a choice of widths, even if the method asks for none; it does not see them then.
    """

    scheme: QuantScheme
    group_size: int
    switches: Switches
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    text_only_ok: bool = False
    sensitivity: Mapping[str, Any] | None = None
    for_widths: bool = False


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A part of the whole progress."""

    progress: Progress
    start: int
    total: int

    def __call__(self, done: int, total: int, note: str = "") -> None:  # noqa: ARG002 - the whole's total counts
        self.progress(self.start + done, self.total, note)


def calibrate(
    model: LoadedModel,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    *,
    state: State | None = None,
    room: Room | None = None,
    progress: Progress = silent,
) -> ChannelScales:
    """Find the channel scales of every unit, block by block.

    Args:
        model: Decoder blocks may be on the meta device: they are streamed from the model's files.
        inputs: Encoded samples with answers; not looked at by a method without scales.
        recipe: Scheme, switches, seed.
        state: Gradient statistics and finished blocks are kept in it and not done again. That it belongs
            to the same arguments is its opener's business.
        room: Hears what memory will be needed, and decides where rows of all blocks wait; memory without it.
        progress: Called after each block of each pass.

    Raises:
        UsageError: E2001 for an unknown method, E2004 naming the linear if the group size does not fit, E2007.
        FormatError: E4308 without image tokens, E4309 without answer tokens.
        GateError: E1103 if a loss, gradient or objective is not finite.
    """
    method = METHODS[recipe.switches.method]
    _check_groups(model, recipe)
    needed = method.needs_ratios(recipe.switches)
    if method.scales is None and not needed and not recipe.for_widths:
        return _result(model, inputs, recipe, report={}, found=[])
    _check_tokens(inputs, recipe)
    stream = BlockStream(model, room)
    measures = (needed or recipe.for_widths) and not recipe.sensitivity
    searches = method.scales is not None
    stream.room.settle(plan_memory(model, inputs, gradients=measures, searches=searches))
    batches = stream.begin(inputs)
    depth = len(stream)
    report = kept = recipe.sensitivity or {}
    total = depth * (1 + (recipe.switches.grid == "auto")) if method.scales else 0
    if (needed or recipe.for_widths) and not report:
        total += 2 * depth
        gradients = _gradients(
            stream,
            batches,
            model.family.linears,
            state,
            _Pass(progress=progress, start=0, total=total),
        )
        measured = _report(model, inputs, recipe, gradients)
        report, kept = (measured, measured) if needed else ({}, {FOR_WIDTHS: measured})
    if method.scales is None:
        return _result(model, inputs, recipe, report=kept, found=[])
    job = Job(
        stream=stream,
        places=model.family.smooth,
        text=model.text,
        scheme=recipe.scheme,
        group_size=recipe.group_size,
        method=method,
        switches=recipe.switches,
        sensitivity=report,
        seed=recipe.seed,
    )
    if recipe.switches.grid == "auto":
        pass_ = _Pass(progress=progress, start=total - 2 * depth, total=total)
        job = replace(job, first=_first(job, batches, state, pass_))
    search = _Pass(progress=progress, start=total - depth, total=total)
    found = _blocks(job, batches, state, search)
    return _result(model, inputs, recipe, report=kept, found=found)


_Block = tuple[Mapping[str, "NDArray[np.float32]"], Mapping[str, Any]]
"""Scales by unit name, and the record {"units": [...]}."""


def _blocks(
    job: Job, batches: Sequence[Batch], state: State | None, progress: Progress
) -> list[_Block]:
    """Search block after block; finished ones are only run, and only while a later one is missing."""
    depth = len(job.stream)
    kept = [state.load_block(BLOCKS, index) if state else None for index in range(depth)]
    found: list[_Block] = [({}, {}) if k is None else (k.tensors, k.record) for k in kept]
    missing = [index for index in range(depth) if kept[index] is None]
    rows = [batch.hidden for batch in batches]
    moved = list(rows) if job.switches.prefix == "quantized" else None
    for index in range(max(missing, default=-1) + 1):
        with job.stream.block(index) as block:
            pairs = list(zip(batches, rows, strict=True))
            if kept[index] is not None:
                rows = job.stream.run_all(block, index, pairs)
                if moved is not None:
                    e = {unit: torch.tensor(scale) for unit, scale in found[index][0].items()}
                    second = list(zip(batches, moved, strict=True))
                    moved = MovedRows(job, block, index, second).outputs(e)
                continue
            smoothed = smooth_block(job, block, index, pairs, moved=moved)
        rows, moved = smoothed.outputs, smoothed.moved
        scales = {unit: e.numpy() for unit, e in smoothed.scales.items()}
        record = {"units": smoothed.units}
        if state:
            state.save_block(BLOCKS, index, scales, record)
        found[index] = (scales, record)
        progress(index + 1, depth, f"block {index + 1}/{depth} {_gain(smoothed.units)}")
    return found


def _first(
    job: Job, batches: Sequence[Batch], state: State | None, progress: Progress
) -> FirstErrors:
    """Errors of plain rounding of every unit that is searched, in one pass."""
    depth = len(job.stream)
    units: list[str] = [place.unit for place in job.places if job.is_scaled(place)]
    rows = [batch.hidden for batch in batches]
    kept = [state.load_block(FIRST, index) if state else None for index in range(depth)]
    errors = [{unit: float(k.tensors[unit][0]) for unit in units} for k in kept if k]
    for index in range(0 if len(errors) < depth else depth, depth):
        with job.stream.block(index) as block:
            pairs = list(zip(batches, rows, strict=True))
            of_block, rows = first_errors(job, block, index, pairs)
        errors[index:] = [of_block]
        if state:
            tensors = {unit: np.array([error]) for unit, error in of_block.items()}
            state.save_block(FIRST, index, tensors, {})
        progress(index + 1, depth, f"first errors {index + 1}/{depth}")
    found = {(index, unit): of[unit] for index, of in enumerate(errors) for unit in units}
    return FirstErrors(of_unit=found)


def _gain(units: Sequence[Mapping[str, Any]]) -> str:
    """How far the searches came: mean of J(best) / J(plain rounding)."""
    ratios = [u["J"]["best"] / u["J"]["rtn"] for u in units if u.get("J") and u["J"]["rtn"] > 0]
    return f"error x{np.mean(ratios):.2f} of rtn" if ratios else "left as it is"


def _gradients(
    stream: BlockStream,
    batches: Sequence[Batch],
    linears: tuple[str, ...],
    state: State | None,
    progress: Progress,
) -> Gradients:
    kept = state.load_block(GRADIENTS, 0) if state else None
    if kept is not None:
        return Gradients(linears=linears, **kept.tensors)
    found = measure(stream, batches, linears=linears, progress=progress)
    if state:
        tensors = {
            "mean_abs": found.mean_abs,
            "mean_square": found.mean_square,
            "losses": found.losses,
        }
        state.save_block(GRADIENTS, 0, tensors, {})
    return found


def _report(
    model: LoadedModel, inputs: Sequence[ModelInputs], recipe: Recipe, gradients: Gradients
) -> Mapping[str, Any]:
    facts = {
        "model": recipe.facts.get("model", {}),
        "data": {
            "manifest_sha256": recipe.facts.get("data", {}).get("sha256"),
            "n": len(inputs),
            "seed": recipe.seed,
            "tokens": count_classes(inputs),
        },
        "dtype": str(next(model.module.parameters()).dtype).removeprefix("torch."),
    }
    return sensitivity(gradients, floor=recipe.switches.r_floor, seed=recipe.seed, facts=facts)


def _result(
    model: LoadedModel,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    *,
    report: Mapping[str, Any],
    found: Sequence[_Block],
) -> ChannelScales:
    calib: dict[str, Any] = {
        "model": recipe.facts.get("model", {}),
        "data": {
            **recipe.facts.get("data", {}),
            "samples": len(inputs),
            "tokens": count_classes(inputs),
            "inputs_sha256": hash_inputs(inputs),
        },
        "scheme": recipe.scheme.name,
        "group_size": recipe.group_size,
        "seed": recipe.seed,
        "switches": recipe.switches.resolved(),
        "ratios": "none"
        if not report.get("layers")
        else "user"
        if recipe.sensitivity
        else "measured",
        "algorithm": ALGORITHM,
        "dtype": str(next(model.module.parameters()).dtype).removeprefix("torch."),
    }
    return ChannelScales(
        scales={
            f"layers.{index}.{unit}.e": np.asarray(e)
            for index, (scales, _) in enumerate(found)
            for unit, e in scales.items()
        },
        sensitivity=report,
        calib={
            **calib,
            "fingerprint": f"sha256:{fingerprint_of(calib)}",
            "units": [unit for _, record in found for unit in record["units"]],
        },
    )


def _check_groups(model: LoadedModel, recipe: Recipe) -> None:
    scheme, size = recipe.scheme, recipe.group_size
    if recipe.switches.compat == "mbq" and scheme.rounds_activations and size != CHANNEL:
        raise UsageError(
            "E2002",
            f"--compat mbq contradicts groups of {size} in {scheme.name}.",
            why="the published code has one scale per output channel where it rounds activations",
            fix=("--group-size channel", "leave --compat out"),
        )
    for linear in model.family.linears:
        path = model.family.linear_path(0, linear)
        with located(path):
            columns = int(model.module.get_parameter(f"{path}.weight").shape[1])
            recipe.scheme.check_columns(columns, recipe.group_size)


def _check_tokens(inputs: Sequence[ModelInputs], recipe: Recipe) -> None:
    counts = count_classes(inputs)
    if not counts["vision"] and not recipe.text_only_ok:
        raise FormatError(
            "E4308",
            f"None of {len(inputs)} samples has image tokens.",
            why="the ratio of gradients between image and answer tokens is undefined",
            fix=("use data with images", "--text-only-ok to weigh answers alone"),
        )
    if not counts["answer"]:
        raise FormatError(
            "E4309",
            f"None of {len(inputs)} samples has answer tokens.",
            why=f"found {', '.join(f'{counts[name]} {name}' for name in TOKEN_CLASSES.values() if name in counts)}",
            fix="give every line of the data an answer",
        )
    if recipe.switches.tokens != "all" and recipe.switches.tokens < 2:
        raise UsageError(
            "E2001",
            f"{recipe.switches.tokens} tokens per class are too few.",
            why="the spread between candidates needs two tokens of a class",
            fix="512 of each class, or all",
        )
