"""Activations to int8, one scale per token (row), bit for bit as the format says.

    a = max(max |x|, 1e-5)    sx = a / 127    xq = rint(x / sx)

Two divisions, both IEEE. The bytes stay in column order: the dots of the Triton kernels take rows as they come, and
only the CUDA kernels permute them (c = [0, 2, 1, 3]), so the two never exchange quantized activations.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq_kernels.base import Build, interpretable

OPTIONS: Final = {"enable_fp_fusion": False, "num_warps": 4}
"""No fused multiply-add may change a quotient or a sum that is compared bit for bit."""
LARGEST_BLOCK: Final = 4096
"""Columns that a program reads at once."""
HALF_EVEN: Final = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds |v| < 2**22 half to even. The interpreter has no rint."""


@triton.jit
def quantize_rows(
    x_ptr,  # (M, K) fp16 or bf16
    xq_ptr,  # (M, K) int8
    sx_ptr,  # (M,) fp32
    K8,  # K / 8
    BLOCK: tl.constexpr,
):
    """Quantize one row per program; a NaN or infinity makes the row's scale NaN or infinite."""
    K = K8 * 8
    row = tl.program_id(0)
    largest = tl.zeros((BLOCK,), tl.float32) + 1e-5
    unordered = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, K, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * K + column, mask=column < K, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        # A maximum drops NaN, so it is counted on its own.
        unordered |= (x != x).to(tl.int32)  # noqa: PLR0124 - true of NaN alone
    sx = tl.div_rn(tl.max(largest, axis=0), 127.0)
    sx = tl.where(tl.max(unordered, axis=0) > 0, float("nan"), sx)
    for first in range(0, K, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * K + column, mask=column < K, other=0).to(tl.float32)
        rounded = tl.div_rn(x, tl.zeros_like(x) + sx) + HALF_EVEN - HALF_EVEN
        steps = tl.where(tl.abs(rounded) <= 127.0, rounded, 0.0)
        tl.store(xq_ptr + row * K + column, steps.to(tl.int8), mask=column < K)
    tl.store(sx_ptr + row, sx)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row.

    Args:
        x: (M, K) float16 or bfloat16, contiguous, K a multiple of 8.

    Returns:
        (M, K) int8 in column order, and (M,) float32 scales.
    """
    m, k = x.shape
    xq = torch.empty((m, k), dtype=torch.int8, device=x.device)
    sx = torch.empty((m,), dtype=torch.float32, device=x.device)
    if m:
        block = min(triton.next_power_of_2(k), LARGEST_BLOCK)
        quantize_rows[(m,)](interpretable(x, quantize_rows), xq, sx, k // 8, BLOCK=block, **OPTIONS)
    return xq, sx


def builds() -> tuple[Build, ...]:
    """Compile for both dtypes."""
    return tuple(
        Build(
            name=f"quantize-{dtype}",
            function=quantize_rows,
            signature={
                "x_ptr": f"*{dtype}",
                "xq_ptr": "*i8",
                "sx_ptr": "*fp32",
                "K8": "i32",
                "BLOCK": "constexpr",
            },
            constants={"BLOCK": LARGEST_BLOCK},
            options=OPTIONS,
        )
        for dtype in ("fp16", "bf16")
    )
