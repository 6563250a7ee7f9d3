"""Operators that are spelled out at op level 0, against the formulas in numpy and against the operators themselves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from mbq_export.backends.ort import open_graph
from mbq_export.evaluate.tolerances import OP_FP16, OP_FP32
from mbq_export.export import ops
from mbq_export.export.graph import BOOL, Emitter
from mbq_export.export.primitives import (
    spelled_attention,
    spelled_norm,
    visible_by_group,
)
from mbq_export.export.profile import OPSET20
from mbq_export.export.save import save_graph
from tests.export import decoders
from tests.export.one_linear import relative_error

SHAPE = replace(
    decoders.FAMILY.text_shape(decoders.checkpoint().config), heads=6, kv_heads=2, head_dim=8
)
LIMITS = {"fp32": OP_FP32, "fp16": OP_FP16}


def run(g: Emitter, out: ir.Value, path: Path, **feeds: NDArray[np.generic]) -> NDArray[np.generic]:
    save_graph(g.model("one", [out]), path)
    with open_graph(path, threads=1) as engine:
        return engine.run(feeds)[str(out.name)]


def drawn(*shape: int, dtype: str, seed: int, size: float = 1.0) -> NDArray[np.floating]:
    wide = np.random.default_rng(seed).standard_normal(shape) * size
    return wide.astype(np.float16 if dtype == "fp16" else np.float32)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e3])
def test_norm_is_its_formula_and_does_not_overflow(dtype: str, size: float, tmp_path: Path) -> None:
    """Squares of 3e3 are beyond fp16, so they must not be computed in it."""
    g = Emitter(profile=OPSET20, dtype=dtype)
    x, weight = drawn(2, 5, 16, dtype=dtype, seed=0, size=size), drawn(16, dtype=dtype, seed=1)
    value = g.input("x", ["b", "t", 16])
    scale = g.input("w", [16])
    out = spelled_norm(g, value, scale, g.value("y", ["b", "t", 16]), name="norm", epsilon=1e-6)
    found = run(g, out, tmp_path / "g.onnx", x=x, w=weight)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
    assert relative_error(found, wanted) <= LIMITS[dtype]


def attention(q: NDArray, k: NDArray, v: NDArray, visible: NDArray) -> NDArray[np.float64]:
    """The formula, head by head: (B, T, Hkv, R, D)."""
    batch, heads, tokens, width = q.shape
    each = heads // k.shape[1]
    found = np.zeros((batch, tokens, k.shape[1], each, width))
    for b in range(batch):
        for h in range(heads):
            scores = q[b, h].astype(np.float64) @ k[b, h // each].T / np.sqrt(width)
            scores[~visible[b, 0]] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            found[b, :, h // each, h % each] = weights @ v[b, h // each]
    return found


@pytest.mark.parametrize("dtype", LIMITS)
def test_attention_is_its_formula_for_grouped_heads(dtype: str, tmp_path: Path) -> None:
    g = Emitter(profile=OPSET20, dtype=dtype)
    q = drawn(2, 6, 3, 8, dtype=dtype, seed=2, size=3.0)
    k, v = (drawn(2, 2, 7, 8, dtype=dtype, seed=seed) for seed in (3, 4))
    visible = np.random.default_rng(5).random((2, 1, 3, 7)) < 0.5
    visible[..., 0] = True
    mask = g.input("visible", [ops.BATCH, 1, ops.SEQUENCE, ops.TOTAL], dtype=BOOL)
    inputs = [g.input("q", [ops.BATCH, 6, ops.SEQUENCE, 8])]
    inputs += [g.input(name, [ops.BATCH, 2, ops.TOTAL, 8]) for name in "kv"]
    by_group = visible_by_group(g, mask)
    out = spelled_attention(g, "a", SHAPE, qkv=tuple(inputs), visible=by_group)
    found = run(g, out, tmp_path / "g.onnx", q=q, k=k, v=v, visible=visible)
    assert relative_error(found, attention(q, k, v, visible)) <= LIMITS[dtype]
