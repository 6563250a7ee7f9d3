"""Decoder graphs on ONNX Runtime beside the torch decoder of the same checkpoint."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicCache

from mbq_export.backends.ort import open_graph
from mbq_export.backends.torch import fake_quant_model
from mbq_export.checkpoint import KEPT, QuantCheckpoint
from mbq_export.export import GraphForm, decoder, ops
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.export.passes import PASSES
from mbq_export.export.profile import profile_for
from mbq_export.export.save import save_graph
from mbq_export.families import FAMILIES
from mbq_export.families.base import LoadedModel
from tests.questions import tiny_model
from tests.tiny import tiny_checkpoint

FAMILY = FAMILIES["llava_onevision"]
Arrays = dict[str, NDArray[np.generic]]


@cache
def checkpoint(scheme: str | None = "w3a16", group_size: int = 64) -> QuantCheckpoint:
    """Quantize the tiny model. Shared: tests must not change it."""
    folder = TemporaryDirectory(prefix="checkpoint-")
    _KEPT.append(folder)
    return tiny_checkpoint(
        Path(folder.name) / "checkpoint", tiny_model(), scheme=scheme, group_size=group_size
    )


@cache
def oracle(scheme: str | None = "w3a16", group_size: int = 64) -> LoadedModel:
    """The torch model that `checkpoint` stands for."""
    return fake_quant_model(checkpoint(scheme, group_size))


def write_decoder(
    source: QuantCheckpoint, form: GraphForm, path: Path, *, fuse: bool = True
) -> Path:
    """Write one decoder graph, without the rest of an export."""
    profile = profile_for(form, packed=source.scheme_name != KEPT)
    model = decoder.decoder_graph(source, family=FAMILY, form=form, profile=profile)
    if fuse:
        PASSES["fuse_projections"].run(model)
    LOWERINGS[form.lowering].lower(model, form.target)
    save_graph(model, path)
    return path


@dataclass(frozen=True)
class Call:
    """One call of a decoder: batch, new tokens, past tokens, and pads at the left of the first row."""

    batch: int
    tokens: int
    past: int
    pads: int = 0

    def __str__(self) -> str:
        return f"B{self.batch} S{self.tokens} P{self.past} pads{self.pads}"

    def feeds(self, model: LoadedModel) -> dict[str, torch.Tensor]:
        """Random embeddings and cache under the names of the graph with a growing cache."""
        text, total = model.text, self.past + self.tokens
        random = torch.Generator().manual_seed(self.batch * 100 + self.tokens * 10 + self.past)
        mask = torch.ones(self.batch, total, dtype=torch.int64)
        mask[0, : self.pads] = 0
        feeds = {
            ops.INPUTS_EMBEDS: torch.randn(self.batch, self.tokens, text.hidden, generator=random),
            ops.ATTENTION_MASK: mask,
            ops.POSITION_IDS: (mask.cumsum(1) - 1).clamp(min=0)[:, self.past :],
        }
        shape = (self.batch, text.kv_heads, self.past, text.head_dim)
        for name in ops.decoder_inputs(text.layers, static=False)[3:]:
            feeds[name] = torch.randn(shape, generator=random)
        return feeds


def compared(name: str, value: NDArray[np.generic], mask: NDArray[np.int64]) -> NDArray[np.generic]:
    """The part of an output that belongs to no pad: what a pad computes is nobody's business.

    Args:
        name: Output of a decoder.
        value: (B, T, V) logits of the new tokens, or (B, H, total, D) keys or values.
        mask: (B, total).
    """
    if name == ops.LOGITS:
        return value[mask[:, mask.shape[1] - value.shape[1] :] == 1]
    return value.transpose(0, 2, 1, 3)[mask == 1]


CALLS = (
    Call(batch=2, tokens=5, past=7, pads=3),
    Call(batch=3, tokens=9, past=4, pads=2),
    Call(batch=2, tokens=6, past=0, pads=2),
    Call(batch=1, tokens=1, past=6),
    Call(batch=1, tokens=6, past=0),
    Call(batch=1, tokens=1, past=0),
)


def torch_run(model: LoadedModel, feeds: dict[str, torch.Tensor]) -> Arrays:
    """Run the transformers decoder with a growing cache."""
    language, layers = model.module.get_submodule("model.language_model"), model.text.layers
    cache = DynamicCache(config=language.config)
    for layer in range(layers):
        key, value = (feeds[ops.past_key_value(layer, part)] for part in ops.PARTS)
        cache.update(key, value, layer)
    with torch.no_grad():
        output = language(
            inputs_embeds=feeds[ops.INPUTS_EMBEDS],
            attention_mask=feeds[ops.ATTENTION_MASK],
            position_ids=feeds[ops.POSITION_IDS],
            past_key_values=cache,
            use_cache=True,
        )
        logits = model.module.get_submodule("lm_head")(output.last_hidden_state)
    found = {ops.LOGITS: logits.numpy()}
    for layer in range(layers):
        found[ops.present_key_value(layer, "key")] = cache.layers[layer].keys.numpy()
        found[ops.present_key_value(layer, "value")] = cache.layers[layer].values.numpy()
    return found


def graph_run(
    path: Path, feeds: dict[str, torch.Tensor], form: GraphForm, *, slots: int = 32
) -> Arrays:
    """Run a graph; a static cache is filled up with noise that nothing may see, and cut back afterwards."""
    dtype = np.float16 if form.dtype == "fp16" else np.float32
    arrays: Arrays = {
        name: value.numpy().astype(dtype if value.is_floating_point() else np.int64)
        for name, value in feeds.items()
    }
    total = arrays[ops.ATTENTION_MASK].shape[1]
    past = total - arrays[ops.INPUTS_EMBEDS].shape[1]
    if form.kv == "static":
        arrays = _with_slots(arrays, past, slots)
    with open_graph(path, threads=1) as engine:
        outputs = engine.run(arrays)
    return {
        name: value[:, :, :total] if name.startswith("present") else value
        for name, value in outputs.items()
    }


def _with_slots(arrays: Arrays, past: int, slots: int) -> Arrays:
    mask = arrays[ops.ATTENTION_MASK]
    wide = np.ones((len(mask), slots), np.int64)
    wide[:, : mask.shape[1]] = mask
    rng = np.random.default_rng(0)
    filled = {}
    for name, value in arrays.items():
        filled[name] = value
        if name.startswith("past_key_values"):
            noise = rng.standard_normal((*value.shape[:2], slots, value.shape[3]))
            filled[name] = noise.astype(value.dtype)
            filled[name][:, :, :past] = value
    return {
        **filled,
        ops.ATTENTION_MASK: wide,
        ops.WRITE_INDICES: np.full(len(mask), past, np.int64),
    }


_KEPT: list[TemporaryDirectory[str]] = []
