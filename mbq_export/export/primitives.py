"""What single operators compute at higher op levels, spelled out for parsers that lack them (op level 0).

    norm        w * T(x / sqrt(mean(x^2) + eps))                            x in FLOAT
    rotation    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)              halves of a head
    attention   softmax(mask(q / sqrt(D) . k^T)) . v                        softmax in FLOAT

Grouped queries share keys by broadcasting: q (B, Hkv, R, T, D) against k (B, Hkv, 1, D, keys), R = H / Hkv query heads per
key head. Nothing is copied R times.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from mbq_export.export import ops
from mbq_export.export.graph import FLOAT, Dims, Emitter, dims_of
from mbq_export.families.base import TextShape

HIDDEN_SCORE: Final = float(np.finfo(np.float32).min) / 2
"""Score of a key that a query does not see: exp gives 0, and adding to it does not overflow."""


def spelled_norm(
    g: Emitter, x: ir.Value, weight: ir.Value, out: ir.Value, *, name: str, epsilon: float
) -> ir.Value:
    """RMSNormalization over the last axis, statistics in FLOAT.

    Args:
        g: The graph.
        x: (.., K) in T.
        weight: (K,) in T.
        out: The result, which the last node computes.
        name: Of the last node; the others' names begin with it.
        epsilon: Added to the mean square.
    """
    dims = dims_of(x)
    one: Dims = [*dims[:-1], 1]
    wide = _cast(g, x, f"{name}.fp32", FLOAT)
    squares = g.op("Mul", [wide, wide], g.value(f"{name}.squares", dims, dtype=FLOAT))
    mean = g.op(
        "ReduceMean",
        [squares, g.numbers("norm.axes", [-1])],
        g.value(f"{name}.mean", one, dtype=FLOAT),
        keepdims=1,
    )
    small = g.numbers("norm.epsilon", np.array(epsilon, np.float32))
    raised = g.op("Add", [mean, small], g.value(f"{name}.raised", one, dtype=FLOAT))
    root = g.op("Sqrt", [raised], g.value(f"{name}.root", one, dtype=FLOAT))
    normed = g.op("Div", [wide, root], g.value(f"{name}.normed", dims, dtype=FLOAT))
    return g.op("Mul", [_cast(g, normed, f"{name}.narrow", g.dtype), weight], out, name=name)


def rows_by_position(g: Emitter, table: ir.Value, ids: ir.Value, name: str) -> ir.Value:
    """Rows of a (positions, D/2) table for (B, T) ids, as (B, 1, T, D/2): shared by all heads."""
    half = dims_of(table)[-1]
    batch, tokens = dims_of(ids)
    rows = g.op("Gather", [table, ids], g.value(f"{name}.rows", [batch, tokens, half]), axis=0)
    axes = g.numbers("rope.head_axis", [1])
    return g.op("Unsqueeze", [rows, axes], g.value(f"{name}.by_head", [batch, 1, tokens, half]))


def spelled_rotation(
    g: Emitter, x: ir.Value, out: ir.Value, *, name: str, turn: tuple[ir.Value, ir.Value]
) -> ir.Value:
    """Rotate the halves of each head.

    Args:
        g: The graph.
        x: (B, H, T, D).
        out: The result.
        name: Of the last node; the others' names begin with it.
        turn: Cosines and sines, (B, 1, T, D/2) each.
    """
    *lead, width = dims_of(x)
    assert isinstance(width, int)
    dims: Dims = [*lead, width // 2]
    first, second = (g.value(f"{name}.{part}", dims) for part in ("first", "second"))
    sizes = g.numbers("rope.halves", [width // 2, width // 2])
    axis = ir.convenience.convert_attributes({"axis": -1})
    g.append(ir.Node("", "Split", [x, sizes], axis, outputs=[first, second], name=f"{name}.split"))
    cos, sin = turn

    def product(half: ir.Value, factor: ir.Value, suffix: str) -> ir.Value:
        return g.op("Mul", [half, factor], g.value(f"{name}.{suffix}", dims))

    left = [product(first, cos, "first_cos"), product(second, sin, "second_sin")]
    right = [product(second, cos, "second_cos"), product(first, sin, "first_sin")]
    halves = [
        g.op("Sub", left, g.value(f"{name}.turned_first", dims)),
        g.op("Add", right, g.value(f"{name}.turned_second", dims)),
    ]
    return g.op("Concat", halves, out, name=name, axis=-1)


def visible_by_group(g: Emitter, visible: ir.Value) -> ir.Value:
    """The mask (B, 1, T, keys) as (B, 1, 1, T, keys), for all query heads of all groups."""
    batch, _, tokens, keys = dims_of(visible)
    out = g.value("mask.by_group", [batch, 1, 1, tokens, keys], dtype=ir.DataType.BOOL)
    return g.op("Unsqueeze", [visible, g.numbers("mask.group_axis", [1])], out)


def spelled_attention(
    g: Emitter, name: str, shape: TextShape, *, qkv: tuple[ir.Value, ...], visible: ir.Value
) -> ir.Value:
    """Grouped-query attention.

    Args:
        g: The graph.
        name: Beginning of the names of its nodes.
        shape: Sizes of the decoder.
        qkv: (B, H, T, D) queries, (B, Hkv, keys, D) keys and values.
        visible: (B, 1, 1, T, keys) BOOL, of `visible_by_group`.

    Returns:
        (B, T, Hkv, R, D).
    """
    groups, width = shape.kv_heads, shape.head_dim
    each = shape.heads // groups
    q, k, v = qkv
    keys = dims_of(k)[2]
    lead: Dims = [ops.BATCH, groups, each, ops.SEQUENCE]
    scale = g.numbers("attention.scale", np.array(width**-0.5).astype(g.dtype.numpy()))
    scaled = g.op("Mul", [q, scale], g.value(f"{name}.scaled", dims_of(q)))
    grouped = g.op(
        "Reshape",
        [scaled, g.numbers("attention.groups", [0, groups, each, -1, width])],
        g.value(f"{name}.grouped", [*lead, width]),
    )
    one: Dims = [ops.BATCH, groups, 1, keys, width]
    axis = g.numbers("attention.query_axis", [2])
    shared_k = g.op("Unsqueeze", [k, axis], g.value(f"{name}.keys", one))
    turned: Dims = [ops.BATCH, groups, 1, width, keys]
    columns = g.op(
        "Transpose", [shared_k], g.value(f"{name}.columns", turned), perm=[0, 1, 2, 4, 3]
    )
    shared_v = g.op("Unsqueeze", [v, axis], g.value(f"{name}.values", one))
    scores = g.op("MatMul", [grouped, columns], g.value(f"{name}.scores", [*lead, keys]))
    weights = _softmax(g, name, scores, visible)
    mixed = g.op("MatMul", [weights, shared_v], g.value(f"{name}.out", [*lead, width]))
    rows: Dims = [ops.BATCH, ops.SEQUENCE, groups, each, width]
    return g.op("Transpose", [mixed], g.value(f"{name}.by_token.out", rows), perm=[0, 3, 1, 2, 4])


def _softmax(g: Emitter, name: str, scores: ir.Value, visible: ir.Value) -> ir.Value:
    """Weights of the visible keys, in T; scores and sums in FLOAT, which matters most for BFLOAT16."""
    dims = dims_of(scores)
    wide = _cast(g, scores, f"{name}.scores_fp32", FLOAT)
    hidden = g.numbers("attention.hidden", np.array(HIDDEN_SCORE, np.float32))
    seen = g.op("Where", [visible, wide, hidden], g.value(f"{name}.seen", dims, dtype=FLOAT))
    weights = g.op("Softmax", [seen], g.value(f"{name}.softmax", dims, dtype=FLOAT), axis=-1)
    return _cast(g, weights, f"{name}.weights", g.dtype)


def _cast(g: Emitter, x: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
    """Cast, unless x is of that type already."""
    if x.dtype == dtype:
        return x
    return g.op("Cast", [x], g.value(name, dims_of(x), dtype=dtype), to=dtype)
