"""The slow truth of weight-only linears: unpack to integers, scale and multiply in float64."""

import numpy as np
from numpy.typing import NDArray

from mbq_export.schemes.base import PackedWeight
from mbq_export.schemes.layouts.dense import unpack


def dequantized(weight: PackedWeight) -> NDArray[np.float64]:
    """(N, K) weights, ``(u - z) * s`` in float64, exact for fp16 scales."""
    codes = unpack(weight.words, bits=weight.bits, columns=weight.k).astype(np.float64)
    grouped = codes.reshape(weight.n, weight.groups, -1)
    middle = 2.0 ** (weight.bits - 1)
    zeros = (
        np.full((weight.n, weight.groups), middle)
        if weight.zeros is None
        else weight.zeros.astype(np.float64)
    )
    return ((grouped - zeros[..., None]) * weight.scales.astype(np.float64)[..., None]).reshape(
        weight.n, weight.k
    )


def weight_only_linear(x: NDArray[np.floating], weight: PackedWeight) -> NDArray[np.float64]:
    """Multiply activations by a packed weight.

    Args:
        x: (M, K), any floating dtype.
        weight: N by K.

    Returns:
        (M, N) float64, bias included.
    """
    y: NDArray[np.float64] = x.astype(np.float64) @ dequantized(weight).T
    return y if weight.bias is None else y + weight.bias.astype(np.float64)
