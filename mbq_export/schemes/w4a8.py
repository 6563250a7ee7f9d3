"""4-bit symmetric weights per channel or group of 128, 8-bit activations per token.

    a = max(max |x|, 1e-5)    sx = a / 127    xq = rint(x / sx)              one token: one row of x
    acc = sum over k of xq * q                                               exact integers
    y = (float32(acc) * s) * sx                                              float32, in this order

In groups, the sums of the groups are scaled and added first. Division by sx, not multiplication by 127 / a, is part
of the format: kernels are compared bit for bit.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.schemes.base import CHANNEL, PackedWeight, QuantScheme
from mbq_export.schemes.layouts import dense

LARGEST_ACTIVATION: Final = 127
SMALLEST_ABSMAX: Final = 1e-5
"""Keeps the scale of a row of zeros above 0."""
LARGEST_K: Final = 132_104
"""Kernels sum 16 * q * xq, at most 128 * 127 per product; beyond this K the sum may pass 2**31."""


def quantize_activations(
    x: NDArray[np.floating],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round each row to int8 with a scale of its own, in float32.

    A row with a NaN or an infinity has a scale that is not finite, and codes 0 where the quotient is no number, so that
    exactly its own outputs are no numbers.

    Args:
        x: (M, K), any floating dtype that float32 holds.

    Returns:
        (M, K) int8 in -127 .. 127 and (M,) float32 scales.
    """
    wide = x.astype(np.float32)
    largest = np.maximum(np.abs(wide).max(axis=1, initial=0), np.float32(SMALLEST_ABSMAX))
    scales = (largest / np.float32(LARGEST_ACTIVATION)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        codes = np.rint(wide / scales[:, None])
    return np.where(np.isfinite(codes), codes, 0).astype(np.int8), scales


def signed_codes(weight: PackedWeight) -> NDArray[np.int8]:
    """(N, K) integer weights q = u - 8."""
    codes = dense.unpack(weight.words, bits=weight.bits, columns=weight.k)
    signed: NDArray[np.int8] = codes.astype(np.int8) - np.int8(2 ** (weight.bits - 1))
    return signed


def integer_sums(xq: NDArray[np.int8], weight: PackedWeight) -> NDArray[np.int64]:
    """Sums of products of integers per group; one group per row if per channel.

    Args:
        xq: (M, K).
        weight: N by K.

    Returns:
        (M, N, G), exact.
    """
    rows, groups = len(xq), weight.groups
    # float64 holds every sum exactly (below 2**53) and multiplies much faster than int64.
    x = xq.astype(np.float64).reshape(rows, groups, -1)
    q = signed_codes(weight).astype(np.float64).reshape(weight.n, groups, -1)
    per_group = np.matmul(x.transpose(1, 0, 2), q.transpose(1, 2, 0))  # (G, M, N)
    sums: NDArray[np.int64] = per_group.transpose(1, 2, 0).astype(np.int64)
    return sums


def int8_linear(x: NDArray[np.floating], weight: PackedWeight) -> NDArray[np.float32]:
    """Multiply as kernels do, up to the one rounding to the model's dtype.

    Per channel this is exact to the bit. In groups, whose sums a kernel adds in an order of its own, it is the float64
    sum rounded once.

    Args:
        x: (M, K), any floating dtype.
        weight: N by K, symmetric.

    Returns:
        (M, N) float32, bias included.
    """
    xq, sx = quantize_activations(x)
    sums = integer_sums(xq, weight)
    with np.errstate(invalid="ignore"):  # 0 * inf in a row that held an infinity
        if weight.group_size == CHANNEL:
            y = sums[..., 0].astype(np.float32) * weight.scales[:, 0] * sx[:, None]
        else:
            total = (sums * weight.scales.astype(np.float64)).sum(axis=-1)
            y = (total * sx[:, None]).astype(np.float32)
    return y if weight.bias is None else y + weight.bias.astype(np.float32)


def _linear(x: NDArray[np.floating], weight: PackedWeight) -> NDArray[np.float64]:
    return int8_linear(x, weight).astype(np.float64)


SCHEME: Final = QuantScheme(
    name="w4a8",
    number=3,
    weight_bits=4,
    symmetric=True,
    group_size=CHANNEL,
    group_sizes=(CHANNEL, 128),
    act_bits=8,
    checkpoint_layout=dense.LAYOUT.name,
    kernel_layout="w4t",
    linear_reference=_linear,
    largest_k=LARGEST_K,
)
