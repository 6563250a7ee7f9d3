"""Who sees whom: the mask against the rule it is made from, in both forms of the cache."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mbq_export.backends.ort import open_graph
from mbq_export.export import ops
from mbq_export.export.attention import declare_cache, updated, visibility
from mbq_export.export.graph import INT64, Emitter
from mbq_export.export.profile import OPSET23, OPSET24
from mbq_export.export.save import save_graph
from tests.export import decoders

SHAPE = decoders.FAMILY.text_shape(decoders.checkpoint().config)


def rule(mask: NDArray[np.int64], first: NDArray[np.int64], tokens: int) -> NDArray[np.bool_]:
    """The docstring's rule, key by key: (B, 1, T, keys)."""
    batch, keys = mask.shape
    seen = np.zeros((batch, 1, tokens, keys), bool)
    for b in range(batch):
        for i in range(tokens):
            for j in range(keys):
                slot = first[b] + i
                seen[b, 0, i, j] = (j <= slot and mask[b, j] == 1) or j == slot
    return seen


def mask_graph(path: Path, *, slots: int | None) -> Path:
    """A graph that returns the mask and one updated cache."""
    g = Emitter(profile=OPSET24 if slots else OPSET23, dtype="fp32")
    embeds = g.input(ops.INPUTS_EMBEDS, [ops.BATCH, ops.SEQUENCE, SHAPE.hidden])
    mask = g.input(ops.ATTENTION_MASK, [ops.BATCH, slots or ops.TOTAL], dtype=INT64)
    new = g.input("new", [ops.BATCH, SHAPE.kv_heads, ops.SEQUENCE, SHAPE.head_dim])
    cache = declare_cache(g, SHAPE, slots=slots)
    visible = visibility(g, embeds=embeds, mask=mask, cache=cache)
    present = updated(g, 0, "key", new=new, cache=cache)
    save_graph(g.model("mask", [visible, present]), path)
    return path


def cache_feeds(batch: int, length: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(length)
    shape = (batch, SHAPE.kv_heads, length, SHAPE.head_dim)
    names = ops.decoder_inputs(SHAPE.layers, static=False)[3:]
    return {name: rng.standard_normal(shape).astype(np.float32) for name in names}


@pytest.mark.parametrize(("tokens", "past"), [(3, 4), (1, 5), (4, 0), (1, 0)])
def test_growing_cache_sees_by_the_rule(tokens: int, past: int, tmp_path: Path) -> None:
    mask = np.ones((2, past + tokens), np.int64)
    mask[0, : (past + tokens) // 2] = 0
    new = np.ones((2, SHAPE.kv_heads, tokens, SHAPE.head_dim), np.float32)
    feeds = {
        ops.INPUTS_EMBEDS: np.zeros((2, tokens, SHAPE.hidden), np.float32),
        ops.ATTENTION_MASK: mask,
        "new": new,
        **cache_feeds(2, past),
    }
    with open_graph(mask_graph(tmp_path / "g.onnx", slots=None), threads=1) as engine:
        found = engine.run(feeds)
    np.testing.assert_array_equal(found["mask.visible"], rule(mask, np.full(2, past), tokens))
    past_keys = feeds[ops.past_key_value(0, "key")]
    np.testing.assert_array_equal(found["present.0.key"], np.concatenate([past_keys, new], 2))


def test_static_cache_sees_by_the_rule_of_each_row(tmp_path: Path) -> None:
    slots, tokens, first = 8, 3, np.array([2, 5])
    mask = np.ones((2, slots), np.int64)
    mask[1, :3] = 0
    new = np.ones((2, SHAPE.kv_heads, tokens, SHAPE.head_dim), np.float32)
    feeds = {
        ops.INPUTS_EMBEDS: np.zeros((2, tokens, SHAPE.hidden), np.float32),
        ops.ATTENTION_MASK: mask,
        "new": new,
        ops.WRITE_INDICES: first,
        **cache_feeds(2, slots),
    }
    with open_graph(mask_graph(tmp_path / "g.onnx", slots=slots), threads=1) as engine:
        found = engine.run(feeds)
    np.testing.assert_array_equal(found["mask.visible"], rule(mask, first, tokens))
    wanted = feeds[ops.past_key_value(0, "key")].copy()
    for row, slot in enumerate(first):
        wanted[row, :, slot : slot + tokens] = 1
    np.testing.assert_array_equal(found["present.0.key"], wanted)


def test_no_query_is_ever_blind() -> None:
    mask = np.zeros((1, 5), np.int64)
    assert rule(mask, np.array([2]), 3).any(-1).all()
