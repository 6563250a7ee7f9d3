"""Channel scales that somebody else searched: a converted cache of MBQ or AWQ becomes ours.

::

    <file>.safetensors   scale.<i> (K,) and perhaps clip.<i>, as samples/convert_mbq_scales.py writes them
    <file>.json          of each scale, the operation it divides and the linears it multiplies:
                         model.layers.3.input_layernorm -> ... q_proj, k_proj, v_proj  ──► layers.3.qkv.e

Names end as the family's do; how they begin depends on the release of the model's code, so long as all begin
alike. Published searches leave the attention output alone where `v_proj` and `o_proj` differ in shape. Every
other place must have its scale, and folding must not change what the model computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from mbq_export.blocks.fold import fold
from mbq_export.blocks.stream import BlockStream
from mbq_export.errors import FormatError, located
from mbq_export.families.base import PROMPT, linear_shapes
from mbq_export.families.inputs import ModelInputs
from mbq_export.families.weights import shortened
from mbq_export.reading import read_json, sha256_of
from mbq_export.tensor_file import BFLOAT16, TensorFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from mbq_export.channel_scales import ChannelScales
    from mbq_export.families.base import LoadedModel, ModelFamily, TextShape

SCHEMA: Final = "mbq-export/published-scales@1"
JSON_LIMIT_BYTES: Final = 64 << 20
FLOATS: Final = (np.dtype("<f2"), BFLOAT16, np.dtype("<f4"))
FOLD_RELATIVE: Final = 1e-5
"""Folding is two multiplications per weight in float32; what changes more was folded into the wrong place."""
PROBE_TOKENS: Final = 16
_LAYER: Final = re.compile(r"^(.*?)layers\.(0|[1-9]\d{0,5})\.(.+)$")


@dataclass(frozen=True, kw_only=True)
class Published:
    """Scales of a published cache under our names.

    Attributes:
        scales: ``layers.<l>.<unit>.e`` to (K,) float32.
        clips: Clipping thresholds in the file, which are not applied.
        sha256: Of the tensors' file.
    """

    scales: Mapping[str, NDArray[np.float32]]
    clips: int
    sha256: str

    @classmethod
    def read(cls, path: Path, *, family: ModelFamily, text: TextShape) -> Published:
        """Read and check both files.

        Args:
            path: The ``.safetensors``; the ``.json`` lies beside it.
            family: Whose places the names must end like.
            text: Decoder sizes.

        Raises:
            FormatError: E4314 if a file is missing or malformed, names are unknown, missing, surplus or repeated,
                or a scale has another length or is not positive and finite; E4101 for a damaged file.
        """
        record = read_json(path.with_suffix(".json"), limit=JSON_LIMIT_BYTES, code="E4314")
        if record.get("schema") != SCHEMA:
            raise _malformed(f"Its schema is {str(record.get('schema'))[:80]!r}, not {SCHEMA}.")
        file = TensorFile(path)
        entries = _entries(record)
        scales: dict[str, NDArray[np.float32]] = {}
        wanted = _wanted(family, text)
        names = _names(entries, family)
        missing, surplus = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
        if missing or surplus:
            raise _malformed(
                f"{len(missing)} scales are missing ({shortened(missing) or 'none'}), "
                f"{len(surplus)} are surplus ({shortened(surplus) or 'none'})."
            )
        for name, tensor in names.items():
            with located(name):
                scales[name] = _scale(file, tensor, columns=wanted[name])
        return cls(
            scales=scales,
            clips=sum(name.startswith("clip.") for name in file.entries),
            sha256=sha256_of(path),
        )


def fold_difference(model: LoadedModel, scales: ChannelScales) -> float:
    """How far folding moves the logits of random tokens, relative, in the model's own type.

    Args:
        model: In float32; decoder blocks may be on the meta device.
        scales: What is folded.

    Raises:
        FormatError: E4314 if a scale does not fit, or folding moves the logits by more than `FOLD_RELATIVE`.
    """
    stream = BlockStream(model)
    (batch,) = stream.begin([_probe(model)])
    plain = folded = batch.hidden
    with torch.no_grad():
        for index in range(len(stream)):
            with stream.block(index) as block:
                plain = stream.run(block, index, batch, plain)
                with located(f"layers.{index}"):
                    fold(block, scales.of_block(index), smooth=model.family.smooth, text=model.text)
                folded = stream.run(block, index, batch, folded)
        wanted = stream.logits(plain).double()
        change = float((stream.logits(folded).double() - wanted).norm() / wanted.norm())
    if not change <= FOLD_RELATIVE:
        raise FormatError(
            "E4314",
            f"Folding the scales moves the logits by {change:.3g} of their size.",
            why=f"folding changes nothing but rounding, {FOLD_RELATIVE:g} in float32",
            fix="check that the scales were searched on this model",
        )
    return change


def _entries(record: Mapping[str, Any]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Tensor, source and linears of each entry."""
    rows = record.get("entries")
    if not isinstance(rows, list):
        raise _malformed("entries is no list.")
    found = []
    for row in rows:
        into = row.get("into") if isinstance(row, dict) else None
        texts = [row.get("tensor"), row.get("source")] if isinstance(row, dict) else []
        if not isinstance(into, list) or not all(
            isinstance(text, str) for text in (*texts, *into, *([] if texts else [None]))
        ):
            raise _malformed(f"An entry is no {{tensor, source, into}}: {str(row)[:80]!r}.")
        found.append((str(texts[0]), str(texts[1]), tuple(into)))
    return found


def _wanted(family: ModelFamily, text: TextShape) -> dict[str, int]:
    """Columns of every scale that a published search makes."""
    shapes = linear_shapes(text)
    return {
        f"layers.{layer}.{place.unit}.e": shapes[place.into[0]][1]
        for layer in range(text.layers)
        for place in family.smooth
        if place.unit != "o" or shapes[place.source] == shapes[place.into[0]]
    }


def _names(entries: list[tuple[str, str, tuple[str, ...]]], family: ModelFamily) -> dict[str, str]:
    """Our name of each entry, and its tensor."""
    places = {(place.source, frozenset(place.into)): place.unit for place in family.smooth}
    found: dict[str, str] = {}
    beginnings = set()
    for tensor, source, into in entries:
        split = [_LAYER.match(name) for name in (source, *into)]
        parts = {(match[1], match[2]) for match in split if match}
        ends = [match[3] for match in split if match]
        unit = places.get((ends[0], frozenset(ends[1:]))) if ends else None
        if None in split or len(parts) != 1 or unit is None:
            raise _malformed(
                f"{source[:80]!r} and {len(into)} linears are no place for a scale in {family.name}."
            )
        ((beginning, layer),) = parts
        beginnings.add(beginning)
        name = f"layers.{layer}.{unit}.e"
        if name in found:
            raise _malformed(f"{source[:80]!r} has two scales.")
        found[name] = tensor
    if len(beginnings) > 1:
        raise _malformed(f"Names begin in {len(beginnings)} ways: {sorted(beginnings)[:3]}.")
    return found


def _scale(file: TensorFile, tensor: str, *, columns: int) -> NDArray[np.float32]:
    values = file.array(tensor)
    if values.dtype not in FLOATS or values.shape != (columns,):
        raise _malformed(f"The scale is {values.dtype} {values.shape}, of ({columns},) floats.")
    wide = values.astype(np.float32)
    bad = int((~(np.isfinite(wide) & (wide > 0))).sum())
    if bad:
        raise _malformed(f"{bad} of {columns} scales are not positive and finite.")
    return wide


def _probe(model: LoadedModel) -> ModelInputs:
    """Random words, no picture."""
    picture = {model.config.get(key) for key in ("image_token_index", "video_token_index")}
    words = [word for word in range(model.text.vocab) if word not in picture]
    ids = np.random.default_rng(0).choice(words, PROBE_TOKENS).astype(np.int64)
    size = model.vision.image_size
    return ModelInputs(
        input_ids=ids,
        pixel_values=np.empty((0, model.vision.channels, size, size), np.float32),
        image_sizes=np.empty((0, 2), np.int64),
        tiles_per_image=np.empty(0, np.int64),
        token_classes=np.full(PROBE_TOKENS, PROMPT, np.int8),
    )


def _malformed(message: str) -> FormatError:
    return FormatError(
        "E4314",
        message,
        why="published scales are two files as samples/convert_mbq_scales.py writes them, for this model",
        fix="convert the published file again, or calibrate this model",
    )
