"""Attention of one new token to the cache, as two Triton kernels.

    part     a piece of the filled slots, for all query heads      one program per key head and piece
             that share a key head: largest score, sum, average;
             the first piece also keeps the new key and value
    merge    the pieces of one query head, in order                one program per query head

q and k are rotated on the way in. Only filled slots are read, in about as many bytes per program at every length,
so cost follows the context and not the size of the cache. No atomics: the same input gives the same bits. (Pieces as
in Flash-Decoding, running maxima as in "Online normalizer calculation for softmax".)
"""

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq_kernels.base import Build

OPTIONS: Final = {"enable_fp_fusion": True, "num_warps": 4, "num_stages": 3}
PIECES: Final = 32
"""With four key heads 128 programs, about one per multiprocessor of an H100."""
BLOCK: Final = 64
SMALLEST_SIDE: Final = 16
"""Of a matrix product in Triton."""


def supports(*, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels take heads of this shape."""
    power_of_two = head_dim & (head_dim - 1) == 0
    return power_of_two and head_dim >= SMALLEST_SIDE and heads % kv_heads == 0


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    turn: tuple[Tensor, Tensor],
    position: Tensor,
) -> Tensor:
    """Write the key and value of a new token into the cache and attend to all up to it.

    Args:
        qkv: (1, (H + 2 * kv heads) * D) contiguous float16 or bfloat16.
        keys: (kv heads, slots, D) contiguous, likewise; changed at the position.
        values: Likewise.
        turn: (slots, D) cosines, and sines that are negative in the first half, likewise.
        position: (1,) int64, below slots.

    Returns:
        (1, H * D).
    """
    kv_heads, slots, width = keys.shape
    heads = qkv.shape[1] // width - 2 * kv_heads
    shared = heads // kv_heads
    averages = torch.empty((heads, PIECES, width), device=qkv.device, dtype=torch.float32)
    sums = torch.empty((2, heads, PIECES), device=qkv.device, dtype=torch.float32)
    part_kernel[(kv_heads, PIECES)](
        qkv,
        keys,
        values,
        *turn,
        position,
        averages,
        sums[0],
        sums[1],
        slots,
        math.log2(math.e) / math.sqrt(width),
        KV_HEADS=kv_heads,
        SHARED=shared,
        ROWS=max(SMALLEST_SIDE, triton.next_power_of_2(shared)),
        D=width,
        SLOTS_AT_ONCE=BLOCK,
        PARTS=PIECES,
        **OPTIONS,
    )
    y = torch.empty((1, heads * width), device=qkv.device, dtype=qkv.dtype)
    merge_kernel[(heads,)](averages, sums[0], sums[1], y, D=width, PARTS=PIECES, **OPTIONS)
    return y


def builds() -> tuple[Build, ...]:
    """What a machine without a GPU can compile: both dtypes, the heads of a 7B decoder and of a small one."""
    return tuple(
        build
        for dtype in ("fp16", "bf16")
        for heads, kv_heads, width in ((28, 4, 128), (8, 2, 32))
        for build in _builds(dtype, heads, kv_heads, width)
    )


def _builds(dtype: str, heads: int, kv_heads: int, width: int) -> tuple[Build, ...]:
    floats, sums = f"*{dtype}", "*fp32"
    shared = heads // kv_heads
    parts = {
        **dict.fromkeys(["qkv_ptr", "keys_ptr", "values_ptr", "cos_ptr", "sin_ptr"], floats),
        "position_ptr": "*i64",
        **dict.fromkeys(["averages_ptr", "tops_ptr", "sums_ptr"], sums),
        "slots": "i32",
        "scale": "fp32",
    }
    merged = {**dict.fromkeys(["averages_ptr", "tops_ptr", "sums_ptr"], sums), "y_ptr": floats}
    rows = max(SMALLEST_SIDE, triton.next_power_of_2(shared))
    kernels = (
        (
            "part",
            part_kernel,
            parts,
            {
                "KV_HEADS": kv_heads,
                "SHARED": shared,
                "ROWS": rows,
                "D": width,
                "SLOTS_AT_ONCE": BLOCK,
                "PARTS": PIECES,
            },
        ),
        ("merge", merge_kernel, merged, {"D": width, "PARTS": PIECES}),
    )
    return tuple(
        Build(
            name=f"{name}-{heads}x{width}-{dtype}",
            function=function,
            signature={**signature, **dict.fromkeys(constants, "constexpr")},
            constants=constants,
            options=OPTIONS,
        )
        for name, function, signature, constants in kernels
    )


@triton.jit
def turned(x_ptr, cos_ptr, sin_ptr, offset, mask, at, D: tl.constexpr):
    """Rows of D rotated in the pairs (i, i + D / 2), rounded to their dtype."""
    d = tl.arange(0, D)
    cos = tl.load(cos_ptr + at * D + d).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + at * D + d).to(tl.float32)[None, :]
    x = tl.load(x_ptr + offset + d[None, :], mask=mask, other=0)
    partner = tl.load(x_ptr + offset + ((d + D // 2) % D)[None, :], mask=mask, other=0)
    return (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def part_kernel(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    averages_ptr,
    tops_ptr,
    sums_ptr,
    slots,
    scale,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    SLOTS_AT_ONCE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Attend to one piece of the filled slots; ``scale`` holds the factor that makes e to a power of 2.

    The first piece begins with the new token itself and puts it into the cache, where no piece looks for it. A
    piece without slots leaves the largest score -inf and sums 0.
    """
    head, piece = tl.program_id(0), tl.program_id(1)
    at = tl.load(position_ptr)
    row, d = tl.arange(0, ROWS), tl.arange(0, D)
    known = (row < SHARED)[:, None]
    q = turned(qkv_ptr, cos_ptr, sin_ptr, (head * SHARED + row)[:, None] * D, known, at, D)
    start = head.to(tl.int64) * slots * D
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    average = tl.zeros((ROWS, D), tl.float32)
    if piece == 0:
        place = (KV_HEADS * SHARED + head + tl.zeros((1, 1), tl.int32)) * D
        key = turned(qkv_ptr, cos_ptr, sin_ptr, place, place >= 0, at, D)
        value = tl.load(qkv_ptr + place + KV_HEADS * D + d[None, :])
        tl.store(keys_ptr + start + at * D + d[None, :], key)
        tl.store(values_ptr + start + at * D + d[None, :], value)
        top = tl.sum(q.to(tl.float32) * key.to(tl.float32), axis=1) * scale
        total += 1
        average += value.to(tl.float32)
    length = at.to(tl.int32)
    blocks = tl.cdiv(length, SLOTS_AT_ONCE)
    each = tl.cdiv(blocks, PARTS)
    first = piece * each
    for block in range(first, tl.minimum(first + each, blocks)):
        slot = block * SLOTS_AT_ONCE + tl.arange(0, SLOTS_AT_ONCE)
        seen = slot < length
        k = tl.load(keys_ptr + start + slot[None, :] * D + d[:, None], mask=seen[None, :], other=0)
        score = tl.where(seen[None, :], tl.dot(q, k) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        v = tl.load(
            values_ptr + start + slot[:, None] * D + d[None, :], mask=seen[:, None], other=0
        )
        total = total * shrink + tl.sum(weight, axis=1)
        average = average * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        top = higher
    out = (head * SHARED + row) * PARTS + piece
    tl.store(tops_ptr + out, top, mask=row < SHARED)
    tl.store(sums_ptr + out, total, mask=row < SHARED)
    tl.store(averages_ptr + out[:, None] * D + d[None, :], average, mask=known)


@triton.jit
def merge_kernel(averages_ptr, tops_ptr, sums_ptr, y_ptr, D: tl.constexpr, PARTS: tl.constexpr):
    """Bring the pieces of one query head to one scale and add them."""
    head = tl.program_id(0)
    piece, d = tl.arange(0, PARTS), tl.arange(0, D)
    tops = tl.load(tops_ptr + head * PARTS + piece)
    weight = tl.exp2(tops - tl.max(tops, axis=0))
    total = tl.sum(weight * tl.load(sums_ptr + head * PARTS + piece), axis=0)
    averages = tl.load(averages_ptr + (head * PARTS + piece)[:, None] * D + d[None, :])
    y = tl.sum(averages * weight[:, None], axis=0) / total
    tl.store(y_ptr + head * D + d, y.to(y_ptr.dtype.element_ty))
