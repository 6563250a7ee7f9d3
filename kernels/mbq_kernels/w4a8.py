"""4-bit signed weights, int8 activations: integer sums, then two products and one rounding.

    per channel     y = (float(sum of xq * 16 q) * (s / 16)) * sx                bit for bit the format's rule
    groups of 128   y = (sum over groups of float(sum of xq * 16 q) * s) * (1 / 16) * sx

The nibble stays in the high half of its byte, hence 16 q; the factor is a power of two and changes no bit.
Compiled without fused multiply-add, so the two products and the bias are three roundings in fp32 as written.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.integers import integer_linear
from mbq_export.schemes.layouts.tiles import TiledWeight, untile
from mbq_kernels import activations
from mbq_kernels.base import Build, Kernel, checked_output, compute_capability, interpretable
from mbq_kernels.configs import Gemm, Gemv, main_configs, select_config
from mbq_kernels.tile_reading import group_scale, w4_columns, w4_words
from mbq_kernels.weights import DeviceWeight

OPTIONS: Final = {"enable_fp_fusion": False}
SIXTEENTH: Final = tl.constexpr(0.0625)


@triton.jit
def signed16(codes):
    """16 q as int32 from nibbles that hold q in two's complement."""
    return (codes << 28) >> 24


@triton.jit
def gemv(
    xq_ptr,  # (M, K) int8
    sx_ptr,  # (M,) fp32
    codes_ptr,  # (tiles, words of a tile) int32
    scales_ptr,  # (Np,) fp32, s / 16; GROUPED: (groups, 8, 2) fp16
    bias_ptr,  # (N,) or unused
    y_ptr,  # (M, N) fp16 or bf16
    M,
    N,
    K8,  # K / 8
    GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NT: tl.constexpr,
    KB: tl.constexpr,
    MR: tl.constexpr,
):
    """Compute y = x W^T + bias for M <= MR rows; a tensor row is a lane."""
    ROWS: tl.constexpr = NT * KB * 32
    K = K8 * 8
    row = tl.arange(0, ROWS)
    lane = row % 32
    nt = tl.program_id(0) * NT + row // (32 * KB)
    m = tl.arange(0, MR)
    k_tiles = tl.cdiv(K, 128)
    total0 = tl.zeros((ROWS, MR), tl.float32 if GROUPED else tl.int32)
    total1 = tl.zeros((ROWS, MR), tl.float32 if GROUPED else tl.int32)
    for first in range(0, k_tiles, KB):
        kt = first + row // 32 % KB
        there = (kt < k_tiles) & (nt * 16 < N)
        tile = nt * k_tiles + kt
        sum0 = tl.zeros((ROWS, MR), tl.int32)
        sum1 = tl.zeros((ROWS, MR), tl.int32)
        words = w4_words(codes_ptr, tile, lane, there)
        for B in tl.static_range(4):
            column = (kt * 128 + 32 * B + 8 * (lane % 4))[:, None, None]
            column += tl.arange(0, 8)[None, None, :]
            mask = (m[None, :, None] < M) & (column < K)
            x = tl.load(xq_ptr + m[None, :, None] * K + column, mask=mask, other=0).to(tl.int32)
            sum0 += tl.sum(signed16(w4_columns(words[2 * B]))[:, None, :] * x, axis=2)
            sum1 += tl.sum(signed16(w4_columns(words[2 * B + 1]))[:, None, :] * x, axis=2)
        if GROUPED:
            total0 += (
                sum0.to(tl.float32) * group_scale(scales_ptr, tile, lane // 4, there, 0)[:, None]
            )
            total1 += (
                sum1.to(tl.float32) * group_scale(scales_ptr, tile, lane // 4, there, 1)[:, None]
            )
        else:
            total0 += sum0
            total1 += sum1
    at = tl.arange(0, NT * 8)
    n = (tl.program_id(0) * NT + at // 8) * 16 + at % 8
    rows0 = add_lanes(total0, NT, KB, MR)
    rows1 = add_lanes(total1, NT, KB, MR)
    store(y_ptr, bias_ptr, scales_ptr, sx_ptr, rows0, m, n, M, N, GROUPED, HAS_BIAS)
    store(y_ptr, bias_ptr, scales_ptr, sx_ptr, rows1, m, n + 8, M, N, GROUPED, HAS_BIAS)


@triton.jit
def add_lanes(total, NT: tl.constexpr, KB: tl.constexpr, MR: tl.constexpr):
    """(MR, 8 NT) sums over the k-tiles and over the four lanes of a row."""
    lanes = tl.reshape(total, (NT, KB, 8, 4, MR))
    return tl.trans(tl.reshape(tl.sum(tl.sum(lanes, axis=3), axis=1), (NT * 8, MR)))


@triton.jit
def store(
    y_ptr, bias_ptr, scales_ptr, sx_ptr, total, m, n, M, N, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Scale sums (rows m, columns n) in the order of the format, add the bias, round once and store."""
    sx = tl.load(sx_ptr + m, mask=m < M, other=0)[:, None]
    if GROUPED:
        y = total * SIXTEENTH * sx
    else:
        sixteenths = tl.load(scales_ptr + n, mask=n < N, other=0)[None, :]
        y = total.to(tl.float32) * sixteenths * sx
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gemm(
    xq_ptr,  # (M, K) int8
    sx_ptr,  # (M,) fp32
    codes_ptr,  # (tiles, words of a tile) int32
    scales_ptr,  # (Np,) fp32, s / 16; GROUPED: (groups, 8, 2) fp16
    bias_ptr,  # (N,) or unused
    y_ptr,  # (M, N) fp16 or bf16
    M,
    N,
    K8,  # K / 8
    GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NT: tl.constexpr,
    BM: tl.constexpr,
):
    """Compute y = x W^T + bias in blocks of BM rows of x by 16 NT rows of W, one dot per block of columns and half."""
    K = K8 * 8
    row = tl.arange(0, NT * 32)
    lane = row % 32
    nt = tl.program_id(0) * NT + row // 32
    at = tl.arange(0, NT * 8)
    n = (tl.program_id(0) * NT + at // 8) * 16 + at % 8
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k_tiles = tl.cdiv(K, 128)
    total0 = tl.zeros((BM, NT * 8), tl.float32 if GROUPED else tl.int32)
    total1 = tl.zeros((BM, NT * 8), tl.float32 if GROUPED else tl.int32)
    for kt in range(k_tiles):
        sum0 = tl.zeros((BM, NT * 8), tl.int32)
        sum1 = tl.zeros((BM, NT * 8), tl.int32)
        words = w4_words(codes_ptr, nt * k_tiles + kt, lane, nt * 16 < N)
        for B in tl.static_range(4):
            column = kt * 128 + 32 * B + tl.arange(0, 32)
            mask = (m[:, None] < M) & (column[None, :] < K)
            x = tl.load(xq_ptr + m[:, None] * K + column[None, :], mask=mask, other=0)
            weights0 = signed16(w4_columns(words[2 * B])).to(tl.int8)
            weights1 = signed16(w4_columns(words[2 * B + 1])).to(tl.int8)
            block0 = tl.trans(tl.reshape(weights0, (NT * 8, 32)))
            block1 = tl.trans(tl.reshape(weights1, (NT * 8, 32)))
            sum0 = tl.dot(x, block0, sum0, out_dtype=tl.int32)
            sum1 = tl.dot(x, block1, sum1, out_dtype=tl.int32)
        if GROUPED:
            group = n // 16 * k_tiles + kt
            total0 += (
                sum0.to(tl.float32) * group_scale(scales_ptr, group, at % 8, n < N, 0)[None, :]
            )
            total1 += (
                sum1.to(tl.float32) * group_scale(scales_ptr, group, at % 8, n + 8 < N, 1)[None, :]
            )
        else:
            total0 += sum0
            total1 += sum1
    store(y_ptr, bias_ptr, scales_ptr, sx_ptr, total0, m, n, M, N, GROUPED, HAS_BIAS)
    store(y_ptr, bias_ptr, scales_ptr, sx_ptr, total1, m, n + 8, M, N, GROUPED, HAS_BIAS)


def oracle(x: Tensor, tiled: TiledWeight) -> Tensor:
    """Slow truth, exact integers: (M, N) in the dtype of x; per channel the only right bits."""
    y = integer_linear(x.float().numpy(), untile(tiled))
    return torch.from_numpy(y).to(x.dtype)


def run(x: Tensor, weight: DeviceWeight, *, out: Tensor | None = None) -> Tensor:
    """Quantize x and multiply; the contract is that of `mbq_kernels.base.Run`."""
    y = checked_output(x, weight, out)
    m, n, k = len(x), weight.n, weight.k
    if not m:
        return y
    config = select_config("int8", sm=compute_capability(x), n=n, k=k, m=m)
    function = gemv if isinstance(config, Gemv) else gemm
    xq, sx = activations.quantized(x)
    target = interpretable(y, function)
    bias = x if weight.bias is None else interpretable(weight.bias, function)
    function[config.grid(n=n, m=m)](
        xq,
        sx,
        weight.codes,
        weight.scales,
        bias,
        target,
        m,
        n,
        k // 8,
        GROUPED=weight.group_size != CHANNEL,
        HAS_BIAS=weight.bias is not None,
        num_warps=config.num_warps,
        **config.constants,
        **OPTIONS,
    )
    if target is not y:
        y.copy_(target)
    return y


def _build(config: Gemv | Gemm, *, grouped: bool, dtype: str) -> Build:
    constants: dict[str, int | bool] = {"GROUPED": grouped, "HAS_BIAS": True, **config.constants}
    pointers = {
        "xq_ptr": "*i8",
        "sx_ptr": "*fp32",
        "codes_ptr": "*i32",
        "scales_ptr": "*fp16" if grouped else "*fp32",
        "bias_ptr": f"*{dtype}",
        "y_ptr": f"*{dtype}",
    }
    sizes = dict.fromkeys(("M", "N", "K8"), "i32")
    return Build(
        name=f"{config.name}-{'g128' if grouped else 'channel'}-{dtype}",
        function=gemv if isinstance(config, Gemv) else gemm,
        signature={**pointers, **sizes, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        options={**OPTIONS, "num_warps": config.num_warps},
    )


def builds(*, sm: int) -> tuple[Build, ...]:
    """List what can be compiled ahead of time for a compute capability."""
    found = list(activations.builds())
    for config in main_configs("int8", sm=sm):
        variants = [("fp16", False)]
        if config.rows in {1, 16}:
            variants += [("fp16", True), ("bf16", False)]
        found += [_build(config, grouped=grouped, dtype=dtype) for dtype, grouped in variants]
    return tuple(found)


KERNEL: Final = Kernel(name="w4a8", run=run, builds=builds)
