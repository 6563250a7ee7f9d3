"""Weight-only linears in Triton: 3-bit or 4-bit codes with zero points, 16-bit activations.

    gemv   (M <= 8)   y = sum over groups of s * (sum over the group of (u - z) * x)      fp32, no weight is rounded
    gemm   (any M)    y = sum over k of round16((u - z) * s) * x                          fp32 sums

A program of ``gemv`` owns NT n-tiles and walks K by KB tiles; one tensor row is one lane. A program of ``gemm`` owns
NT n-tiles and BM rows of x; each 32-column block is one dot per half, so no code is moved between rows.
The references of the CUDA kernels, and a peer in the benchmark; not the product path.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq_export.schemes.layouts.tiles import TiledWeight, untile
from mbq_export.schemes.oracle import dequantized
from mbq_kernels.base import Build, checked_output, compute_capability, interpretable
from mbq_kernels.configs import Gemm, Gemv, main_configs, select_config
from mbq_kernels.tile_reading import (
    group_scale,
    group_zeros,
    integers,
    w3_columns,
    w3_words,
    w4_columns,
    w4_words,
)
from mbq_kernels.weights import DeviceWeight

OPTIONS: Final = {"enable_fp_fusion": True}
"""Said explicitly, because Triton's default for it is about to change."""


@triton.jit
def tile_words(codes_ptr, tile, lane, mask, BITS: tl.constexpr):
    """All words of each lane (R,): six of 3-bit tiles, eight of 4-bit tiles."""
    if BITS == 3:
        words = w3_words(codes_ptr, tile, lane, mask)
    else:
        words = w4_words(codes_ptr, tile, lane, mask)
    return words


@triton.jit
def block_codes(words, B: tl.constexpr, BITS: tl.constexpr):
    """Two (R, 8) tensors of codes of block B: rows g and rows g + 8."""
    if BITS == 3:
        first: tl.constexpr = 3 * (B // 2)
        codes0 = w3_columns(words[first], words[first + 1], words[first + 2], B, 0)
        codes1 = w3_columns(words[first], words[first + 1], words[first + 2], B, 1)
    else:
        codes0, codes1 = w4_columns(words[2 * B]), w4_columns(words[2 * B + 1])
    return codes0, codes1


@triton.jit
def gemv(
    x_ptr,  # (M, K) fp16 or bf16
    codes_ptr,  # (tiles, words of a tile) int32
    scales_ptr,  # (groups, 8, 2) fp16
    zeros_ptr,  # (groups, 8) uint8
    bias_ptr,  # (N,) or unused
    y_ptr,  # (M, N)
    M,
    N,
    K8,  # K / 8: so the compiler knows that 8 columns of x are one aligned load
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NT: tl.constexpr,
    KB: tl.constexpr,
    MR: tl.constexpr,
):
    """Compute y = x W^T + bias for M <= MR rows; MR, NT, KB powers of two."""
    ROWS: tl.constexpr = NT * KB * 32
    K = K8 * 8
    row = tl.arange(0, ROWS)
    lane = row % 32
    g = lane // 4
    nt = tl.program_id(0) * NT + row // (32 * KB)
    m = tl.arange(0, MR)
    k_tiles = tl.cdiv(K, 128)
    total0 = tl.zeros((ROWS, MR), tl.float32)
    total1 = tl.zeros((ROWS, MR), tl.float32)
    for first in range(0, k_tiles, KB):
        kt = first + row // 32 % KB
        there = (kt < k_tiles) & (nt * 16 < N)
        tile = nt * k_tiles + kt
        sum0 = tl.zeros((ROWS, MR), tl.float32)
        sum1 = tl.zeros((ROWS, MR), tl.float32)
        words = tile_words(codes_ptr, tile, lane, there, BITS)
        for B in tl.static_range(4):
            group = tile * (128 // GROUP) + 32 * B // GROUP
            zero0, zero1 = group_zeros(zeros_ptr, group, g, there)
            codes0, codes1 = block_codes(words, B, BITS)
            weights0 = integers(codes0, zero0)
            weights1 = integers(codes1, zero1)
            x = lane_columns(x_ptr, m, kt * 128 + 32 * B + 8 * (lane % 4), M, K)
            sum0 += tl.sum(weights0[:, None, :] * x, axis=2)
            sum1 += tl.sum(weights1[:, None, :] * x, axis=2)
            if 32 * (B + 1) % GROUP == 0:
                total0 += group_scale(scales_ptr, group, g, there, 0)[:, None] * sum0
                total1 += group_scale(scales_ptr, group, g, there, 1)[:, None] * sum1
                sum0 = tl.zeros((ROWS, MR), tl.float32)
                sum1 = tl.zeros((ROWS, MR), tl.float32)
    store_lanes(y_ptr, bias_ptr, total0, 0, M, N, HAS_BIAS, NT, KB, MR)
    store_lanes(y_ptr, bias_ptr, total1, 1, M, N, HAS_BIAS, NT, KB, MR)


@triton.jit
def lane_columns(x_ptr, m, k, M, K):
    """(R, MR, 8) fp32: eight columns from ``k`` (R,) on of each row of x; 0 past M and past K."""
    columns = k[:, None, None] + tl.arange(0, 8)[None, None, :]
    mask = (m[None, :, None] < M) & (columns < K)
    return tl.load(x_ptr + m[None, :, None] * K + columns, mask=mask, other=0).to(tl.float32)


@triton.jit
def store_lanes(
    y_ptr,
    bias_ptr,
    total,
    HALF: tl.constexpr,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    NT: tl.constexpr,
    KB: tl.constexpr,
    MR: tl.constexpr,
):
    """Add the k-tiles and the four lanes of a row, add the bias, round once and store."""
    lanes = tl.reshape(total, (NT, KB, 8, 4, MR))
    y = tl.reshape(tl.sum(tl.sum(lanes, axis=3), axis=1), (NT * 8, MR))
    at = tl.arange(0, NT * 8)
    n = (tl.program_id(0) * NT + at // 8) * 16 + 8 * HALF + at % 8
    m = tl.arange(0, MR)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    mask = (n[:, None] < N) & (m[None, :] < M)
    tl.store(y_ptr + m[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gemm(
    x_ptr,  # (M, K) fp16 or bf16
    codes_ptr,  # (tiles, words of a tile) int32
    scales_ptr,  # (groups, 8, 2) fp16
    zeros_ptr,  # (groups, 8) uint8
    bias_ptr,  # (N,) or unused
    y_ptr,  # (M, N)
    M,
    N,
    K8,  # K / 8: so the compiler knows that 8 columns of x are one aligned load
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NT: tl.constexpr,
    BM: tl.constexpr,
):
    """Compute y = x W^T + bias in blocks of BM rows of x by 16 NT rows of W."""
    K = K8 * 8
    row = tl.arange(0, NT * 32)
    lane = row % 32
    g = lane // 4
    nt = tl.program_id(0) * NT + row // 32
    there = nt * 16 < N
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k_tiles = tl.cdiv(K, 128)
    total0 = tl.zeros((BM, NT * 8), tl.float32)
    total1 = tl.zeros((BM, NT * 8), tl.float32)
    for kt in range(k_tiles):
        tile = nt * k_tiles + kt
        words = tile_words(codes_ptr, tile, lane, there, BITS)
        for B in tl.static_range(4):
            column = kt * 128 + 32 * B + tl.arange(0, 32)
            mask = (m[:, None] < M) & (column[None, :] < K)
            x = tl.load(x_ptr + m[:, None] * K + column[None, :], mask=mask, other=0)
            group = tile * (128 // GROUP) + 32 * B // GROUP
            zero0, zero1 = group_zeros(zeros_ptr, group, g, there)
            scale0 = group_scale(scales_ptr, group, g, there, 0)[:, None]
            scale1 = group_scale(scales_ptr, group, g, there, 1)[:, None]
            codes0, codes1 = block_codes(words, B, BITS)
            weights0 = integers(codes0, zero0)
            weights1 = integers(codes1, zero1)
            # (u - z) * s has at most 16 significant bits: exact in fp32, so the cast rounds once.
            weights0 = (weights0 * scale0).to(x.dtype)
            weights1 = (weights1 * scale1).to(x.dtype)
            block0 = tl.trans(tl.reshape(weights0, (NT * 8, 32)))
            block1 = tl.trans(tl.reshape(weights1, (NT * 8, 32)))
            total0 = tl.dot(x, block0, total0, input_precision="ieee")
            total1 = tl.dot(x, block1, total1, input_precision="ieee")
    store_block(y_ptr, bias_ptr, total0, 0, M, N, HAS_BIAS, NT, BM)
    store_block(y_ptr, bias_ptr, total1, 1, M, N, HAS_BIAS, NT, BM)


@triton.jit
def store_block(
    y_ptr,
    bias_ptr,
    y,
    HALF: tl.constexpr,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    NT: tl.constexpr,
    BM: tl.constexpr,
):
    """Add the bias to (BM, 8 NT) sums of rows g + 8 HALF, round once and store."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at = tl.arange(0, NT * 8)
    n = (tl.program_id(0) * NT + at // 8) * 16 + 8 * HALF + at % 8
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def oracle(x: Tensor, tiled: TiledWeight) -> Tensor:
    """Slow truth: x W^T + bias with W = (u - z) * s.

    Args:
        x: (M, K).
        tiled: N by K.

    Returns:
        (M, N) float64, not rounded.
    """
    packed = untile(tiled)
    y = x.double() @ torch.from_numpy(dequantized(packed)).T
    return y if packed.bias is None else y + torch.from_numpy(packed.bias.astype("float64"))


def linear(x: Tensor, weight: DeviceWeight, *, bits: int, out: Tensor | None = None) -> Tensor:
    """Multiply, with the kernel that fits the number of rows.

    Args:
        x: (M, K) float16 or bfloat16, contiguous.
        weight: N by K, on the same device.
        bits: Width of a code, 3 or 4.
        out: (M, N) to write to, or None for a new tensor.

    Returns:
        (M, N) in the dtype of x.

    Raises:
        FormatError: E4102 if x or out does not fit the weight.
    """
    y = checked_output(x, weight, out)
    m, n, k = len(x), weight.n, weight.k
    if not m or weight.zeros is None:
        return y
    config = select_config("weight_only", sm=compute_capability(x), n=n, k=k, m=m)
    function = gemv if isinstance(config, Gemv) else gemm
    x, target = interpretable(x, function), interpretable(y, function)
    bias = x if weight.bias is None else interpretable(weight.bias, function)
    zeros = weight.zeros.view(torch.uint8)
    function[config.grid(n=n, m=m)](
        x,
        weight.codes,
        weight.scales,
        zeros,
        bias,
        target,
        m,
        n,
        k // 8,
        BITS=bits,
        GROUP=weight.group_size,
        HAS_BIAS=weight.bias is not None,
        num_warps=config.num_warps,
        **config.constants,
        **OPTIONS,
    )
    if target is not y:
        y.copy_(target)
    return y


def builds(*, bits: int, sm: int) -> tuple[Build, ...]:
    """Compile every main configuration in fp16 with groups of 128, the first of each kind in all variants."""
    found = []
    for config in main_configs("weight_only", sm=sm):
        variants = [("fp16", 128)]
        if config.rows in {1, 16}:
            variants += [("fp16", 32), ("bf16", 128)]
        found += [_build(config, bits=bits, group=g, dtype=dtype) for dtype, g in variants]
    return tuple(found)


def _build(config: Gemv | Gemm, *, bits: int, group: int, dtype: str) -> Build:
    constants: dict[str, int | bool] = {"BITS": bits, "GROUP": group, "HAS_BIAS": True}
    constants |= config.constants
    pointers = {
        "x_ptr": f"*{dtype}",
        "codes_ptr": "*i32",
        "scales_ptr": "*fp16",
        "zeros_ptr": "*u8",
        "bias_ptr": f"*{dtype}",
        "y_ptr": f"*{dtype}",
    }
    sizes = dict.fromkeys(("M", "N", "K8"), "i32")
    function = gemv if isinstance(config, Gemv) else gemm
    return Build(
        name=f"{config.name}-g{group}-{dtype}",
        function=function,
        signature={**pointers, **sizes, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        options={**OPTIONS, "num_warps": config.num_warps},
    )
