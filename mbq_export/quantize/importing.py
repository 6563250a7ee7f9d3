"""2b  ForeignCheckpoint -> QuantCheckpoint: the same codes, scales and zero points in our files.

    linears          ──► carried over exactly ──► qweight, scales, zeros
    everything else  ──► copied as stored     ──► embedding, norms, tower, head

Nothing is dequantized, rounded again or searched.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError
from mbq_export.progress import Progress, silent
from mbq_export.quantize.apply import Rounding
from mbq_export.quantize.facts import (
    config_with_quantization,
    model_facts,
    number_facts,
    skipped_modules,
)
from mbq_export.quantize.formats.base import BIAS
from mbq_export.quantize.write import write_checkpoint
from mbq_export.tensor_file import BFLOAT16
from mbq_export.writing import explained, partial_path, publish

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mbq_export.families.base import LoadedModel
    from mbq_export.quantize.foreign import ForeignCheckpoint
    from mbq_export.schemes.base import PackedWeight

logger = logging.getLogger(__name__)

METHOD: Final = "imported"


def import_checkpoint(
    source: ForeignCheckpoint,
    model: LoadedModel,
    *,
    out: Path,
    staged: Path | None = None,
    progress: Progress = silent,
) -> QuantCheckpoint:
    """Write a checkpoint of ours with the codes, scales and zero points of another.

    Args:
        source: Opened.
        model: What `ForeignCheckpoint.load` returned for it.
        out: Folder to make; appears only when complete.
        staged: Where it grows; beside ``out`` if None.
        progress: Called after each block.

    Raises:
        FormatError: E4011, E4102, E4103, E4110, E4112 or E4411, naming the tensor; E4104 if a file changed.
        ResourceError: E5001 or E5008.
    """
    rounding = Rounding(scheme=source.scheme, group_size=source.group_size)
    names = _names(model)
    staged = staged or partial_path(out)
    write_checkpoint(
        staged,
        _pieces(source, model, names, progress),
        info={
            **model_facts(model, [source.stored.sha256()]),
            **number_facts(rounding),
            "method": _method(source),
            "linears": [
                _row(source, name, bias=f"{name}.{BIAS}" in names) for name in source.shapes
            ],
            "skipped": skipped_modules(model, rounding),
        },
        config=config_with_quantization(model, rounding),
        source=source.folder,
    )
    source.stored.check_unchanged()
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    publish(staged, out)
    return QuantCheckpoint.open(out, verify=False)


def _pieces(
    source: ForeignCheckpoint, model: LoadedModel, names: Sequence[str], progress: Progress
) -> Iterator[dict[str, NDArray[Any]]]:
    """Block after block, read when asked for, then everything outside the blocks."""
    small = rounded = 0
    blocks = source.family.blocks
    for block in range(model.text.layers):
        piece: dict[str, NDArray[Any]] = {}
        for linear in source.family.linears:
            name = source.family.linear_path(block, linear)
            weight, counts = source.linear(name)
            piece |= _packed(name, weight)
            small, rounded = small + counts.small, rounded + counts.rounded
        inside = [name for name in names if name.startswith(f"{blocks}.{block}.")]
        yield piece | {name: _as_stored(source, name) for name in inside}
        progress(block + 1, model.text.layers, f"{source.format.name}, codes as they are")
    if small:
        logger.warning(
            "MBQ-W4113: %d scales are below the normal fp16 numbers, %d of them changed by less than 2**-24",
            small,
            rounded,
        )
    outside = [name for name in names if not name.startswith(f"{blocks}.")]
    yield {name: _as_stored(source, name) for name in outside}


def _names(model: LoadedModel) -> list[str]:
    """Every tensor of the model that is no codes; a tied head is the embedding and not among them."""
    tied = f"{model.family.head}.weight" if model.text.tied_head else None
    codes = {
        f"{model.family.linear_path(block, linear)}.weight"
        for block in range(model.text.layers)
        for linear in model.family.linears
    }
    return [name for name in model.module.state_dict() if name != tied and name not in codes]


def _as_stored(source: ForeignCheckpoint, name: str) -> NDArray[Any]:
    array = source.array(name)
    values = array.astype(np.float32) if array.dtype == BFLOAT16 else array
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise FormatError(
            "E4110",
            f"{bad} of {array.size} values of {name} are not finite.",
            why="a NaN or infinite weight makes every answer one",
            fix="download the folder again",
        )
    return array


def _packed(name: str, weight: PackedWeight) -> dict[str, NDArray[Any]]:
    zeros = {} if weight.zeros is None else {f"{name}.zeros": weight.zeros}
    return {
        f"{name}.qweight": weight.words.view(np.int32),
        f"{name}.scales": weight.scales,
        **zeros,
    }


def _row(source: ForeignCheckpoint, name: str, *, bias: bool) -> dict[str, Any]:
    """What `mbq.json` says about a linear; how far it is from the weights it was made of is not known."""
    n, k = source.shapes[name]
    return {
        "name": name,
        "n": n,
        "k": k,
        "scheme": source.scheme.name,
        "group_size": source.group_size,
        "bias": bias,
        "alpha": None,
        "error": None,
        "clamped_scales": 0,
    }


def _method(source: ForeignCheckpoint) -> dict[str, Any]:
    recipe = source.recipe
    return {
        "name": METHOD,
        "format": source.format.name,
        "variant": recipe.variant,
        "group_size": recipe.group_size,
        "symmetric": recipe.symmetric,
        "calibration_sha256": None,
        "seed": None,
    }
