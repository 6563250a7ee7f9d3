"""Who sees whom, the cache in its two forms, and attention with one output.

    key j is visible to query i   <=>   (j <= P + i  and  attention_mask[j])   or   j == P + i

P is the first slot of this call: total - T for a cache that grows, ``write_indices`` for a cache of fixed slots.
The diagonal stays open, so that no row is ever fully masked: what a runtime makes of such a row differs, and one
NaN in a padded row would spread through later layers.
"""

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from mbq_export.export import ops
from mbq_export.export.graph import BOOL, INT64, Dims, Emitter, dims_of
from mbq_export.export.primitives import spelled_attention, visible_by_group
from mbq_export.families.base import TextShape

ATTENTION: Final = "Attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Keys and values between calls.

    Attributes:
        past: (B, H_kv, P or slots, D) inputs by (layer, part); keys are stored after rotation.
        length: Symbol or number of the last but one axis of what attention reads.
        write_indices: (B,) first free slot, or None if the cache grows.
    """

    past: dict[tuple[int, str], ir.Value]
    length: int | str
    write_indices: ir.Value | None


def declare_cache(g: Emitter, shape: TextShape, *, slots: int | None) -> Cache:
    """Add the cache inputs: one pair per layer, key before value, behind the other inputs.

    Args:
        g: The graph.
        shape: Sizes of the decoder.
        slots: Slots of a static cache; None for a cache that grows.
    """
    write_indices = None
    if slots is not None:
        write_indices = g.input(ops.WRITE_INDICES, [ops.BATCH], dtype=INT64)
    dims: Dims = [ops.BATCH, shape.kv_heads, slots or ops.PAST, shape.head_dim]
    past = {
        (layer, part): g.input(ops.past_key_value(layer, part), dims)
        for layer in range(shape.layers)
        for part in ("key", "value")
    }
    return Cache(past=past, length=slots or ops.TOTAL, write_indices=write_indices)


def visibility(g: Emitter, *, embeds: ir.Value, mask: ir.Value, cache: Cache) -> ir.Value:
    """Build the BOOL mask of the module's rule, shared by all layers.

    Returns:
        (B, 1, T, keys); (B, 1, 1, T, keys) where the op level has no Attention.
    """
    zero, one = g.numbers("mask.zero", 0), g.numbers("mask.one", 1)
    length = g.op("Shape", [embeds], g.value("mask.queries", [1], dtype=INT64), start=1, end=2)
    total = g.op("Shape", [mask], g.value("mask.keys", [1], dtype=INT64), start=1, end=2)
    steps = g.op(
        "Range",
        [zero, _scalar(g, length, "mask.queries.scalar"), one],
        g.value("mask.steps", [ops.SEQUENCE], dtype=INT64),
    )
    keys = g.op(
        "Range",
        [zero, _scalar(g, total, "mask.keys.scalar"), one],
        g.value("mask.positions", [cache.length], dtype=INT64),
    )
    rows = _query_slots(g, steps=steps, first=(total, length), cache=cache)
    square: Dims = [dims_of(rows)[0], 1, ops.SEQUENCE, cache.length]
    causal = g.op("LessOrEqual", [keys, rows], g.value("mask.causal", square, dtype=BOOL))
    diagonal = g.op("Equal", [keys, rows], g.value("mask.diagonal", square, dtype=BOOL))
    real = g.op(
        "Unsqueeze",
        [
            g.op(
                "Cast", [mask], g.value("mask.bool", [ops.BATCH, cache.length], dtype=BOOL), to=BOOL
            ),
            g.numbers("mask.axes", [1, 2]),
        ],
        g.value("mask.real", [ops.BATCH, 1, 1, cache.length], dtype=BOOL),
    )
    full: Dims = [ops.BATCH, 1, ops.SEQUENCE, cache.length]
    seen = g.op("And", [causal, real], g.value("mask.seen", full, dtype=BOOL))
    visible = g.op("Or", [seen, diagonal], g.value("mask.visible", full, dtype=BOOL))
    return visible if g.has(ATTENTION) else visible_by_group(g, visible)


def _scalar(g: Emitter, one_element: ir.Value, name: str) -> ir.Value:
    return g.op("Squeeze", [one_element], g.value(name, [], dtype=INT64))


def _query_slots(
    g: Emitter, *, steps: ir.Value, first: tuple[ir.Value, ir.Value], cache: Cache
) -> ir.Value:
    """Slot of every query, (B or 1, 1, T, 1)."""
    axes = g.numbers("mask.query_axes", [0, 1, 3])
    column = g.op(
        "Unsqueeze", [steps, axes], g.value("mask.column", [1, 1, ops.SEQUENCE, 1], dtype=INT64)
    )
    if cache.write_indices is None:
        total, length = first
        past = g.op("Sub", [total, length], g.value("mask.past", [1], dtype=INT64))
        dims: Dims = [1, 1, ops.SEQUENCE, 1]
    else:
        per_row = g.numbers("mask.batch_axes", [1, 2, 3])
        past = g.op(
            "Unsqueeze",
            [cache.write_indices, per_row],
            g.value("mask.past", [ops.BATCH, 1, 1, 1], dtype=INT64),
        )
        dims = [ops.BATCH, 1, ops.SEQUENCE, 1]
    return g.op("Add", [column, past], g.value("mask.slots", dims, dtype=INT64))


def updated(g: Emitter, layer: int, part: str, *, new: ir.Value, cache: Cache) -> ir.Value:
    """Append (B, H_kv, T, D) keys or values to the cache; the result is a graph output."""
    past = cache.past[layer, part]
    batch, heads, _, width = dims_of(past)
    dims = [batch, heads, cache.length, width]
    present = g.value(ops.present_key_value(layer, part), dims)
    name = ops.node_name(layer, f"{part}_cache")
    if cache.write_indices is None:
        return g.op("Concat", [past, new], present, name=name, axis=2)
    inputs = [past, new, cache.write_indices]
    return g.op("TensorScatter", inputs, present, name=name, axis=-2, mode="linear")


def attend(
    g: Emitter, layer: int, shape: TextShape, *, qkv: tuple[ir.Value, ...], visible: ir.Value
) -> ir.Value:
    """Grouped-query attention: (B, H, T, D) queries over cached keys and values, to (B, T, H * D)."""
    name = ops.node_name(layer, "attention")
    if g.has(ATTENTION):
        by_token = _fused(g, name, shape, qkv=qkv, visible=visible)
    else:
        by_token = spelled_attention(g, name, shape, qkv=qkv, visible=visible)
    return g.op(
        "Reshape",
        [by_token, g.numbers("heads.merged", [0, 0, shape.heads * shape.head_dim])],
        g.value(
            ops.linear_input(layer, "o_proj"),
            [ops.BATCH, ops.SEQUENCE, shape.heads * shape.head_dim],
        ),
        name=f"{name}.merge",
    )


def _fused(
    g: Emitter, name: str, shape: TextShape, *, qkv: tuple[ir.Value, ...], visible: ir.Value
) -> ir.Value:
    """One operator, to (B, T, H, D)."""
    heads: Dims = [ops.BATCH, shape.heads, ops.SEQUENCE, shape.head_dim]
    # One output only: TensorRT refuses the form that also returns the cache.
    mixed = g.op(
        ATTENTION,
        [*qkv, visible],
        g.value(f"{name}.out", heads),
        is_causal=0,
        scale=shape.head_dim**-0.5,
    )
    rows: Dims = [ops.BATCH, ops.SEQUENCE, shape.heads, shape.head_dim]
    return g.op("Transpose", [mixed], g.value(f"{name}.by_token.out", rows), perm=[0, 2, 1, 3])
