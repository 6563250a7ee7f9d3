"""Activations rounded per token, and products of integers: the slow truth of schemes that round activations too.

    a = max(max |x|, 1e-5)    sx = a / P    xq = rint(x / sx)                one token: one row of x; P = 2**(bits - 1) - 1
    acc = sum over k of xq * q                                               exact integers
    y = (float32(acc) * s) * sx                                              float32, in this order

In groups, the sums of the groups are scaled and added first. Division by sx, not multiplication by P / a, is part of
the format: kernels are compared bit for bit.
"""

from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.schemes.base import CHANNEL, LinearReference, PackedWeight
from mbq_export.schemes.layouts import dense

SMALLEST_ABSMAX: Final = 1e-5
"""Keeps the scale of a row of zeros above 0."""


def largest_activation(bits: int) -> int:
    """P, the largest code of an activation; the smallest is its negative."""
    return int(2 ** (bits - 1)) - 1


LARGEST_ACTIVATION: Final = largest_activation(8)


def quantize_activations(
    x: NDArray[np.floating], *, bits: int = 8
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round each row to integers with a scale of its own, in float32.

    A row with a NaN or an infinity has a scale that is not finite, and codes 0 where the quotient is no number, so that
    exactly its own outputs are no numbers.

    Args:
        x: (M, K), any floating dtype that float32 holds.
        bits: Width of a code, up to 8.

    Returns:
        (M, K) int8 in -P .. P and (M,) float32 scales.
    """
    wide = x.astype(np.float32)
    largest = np.maximum(np.abs(wide).max(axis=1, initial=0), np.float32(SMALLEST_ABSMAX))
    scales = (largest / np.float32(largest_activation(bits))).astype(np.float32)
    with np.errstate(invalid="ignore"):
        codes = np.rint(wide / scales[:, None])
    return np.where(np.isfinite(codes), codes, 0).astype(np.int8), scales


def signed_codes(weight: PackedWeight) -> NDArray[np.int8]:
    """(N, K) integer weights q = u - 2**(bits - 1)."""
    codes = dense.unpack(weight.words, bits=weight.bits, columns=weight.k)
    signed: NDArray[np.int8] = (codes.astype(np.int16) - 2 ** (weight.bits - 1)).astype(np.int8)
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


def integer_linear(
    x: NDArray[np.floating], weight: PackedWeight, *, act_bits: int = 8
) -> NDArray[np.float32]:
    """Multiply as kernels do, up to the one rounding to the model's dtype.

    Per channel this is exact to the bit. In groups, whose sums a kernel adds in an order of its own, it is the float64
    sum rounded once.

    Args:
        x: (M, K), any floating dtype.
        weight: N by K, symmetric.
        act_bits: Width of an activation.

    Returns:
        (M, N) float32, bias included.
    """
    xq, sx = quantize_activations(x, bits=act_bits)
    sums = integer_sums(xq, weight)
    with np.errstate(invalid="ignore"):  # 0 * inf in a row that held an infinity
        if weight.group_size == CHANNEL:
            y = sums[..., 0].astype(np.float32) * weight.scales[:, 0] * sx[:, None]
        else:
            total = (sums * weight.scales.astype(np.float64)).sum(axis=-1)
            y = (total * sx[:, None]).astype(np.float32)
    return y if weight.bias is None else y + weight.bias.astype(np.float32)


def integer_reference(act_bits: int) -> LinearReference:
    """The oracle of a scheme whose activations have this width: `integer_linear` in float64."""
    return partial(_reference, act_bits=act_bits)


def _reference(
    x: NDArray[np.floating], weight: PackedWeight, *, act_bits: int
) -> NDArray[np.float64]:
    return integer_linear(x, weight, act_bits=act_bits).astype(np.float64)
