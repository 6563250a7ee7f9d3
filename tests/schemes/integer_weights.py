"""Symmetric weights made of the integers that a test wants."""

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_export.schemes.affine import Codes, dequantize, quantize
from mbq_export.schemes.base import CHANNEL, PackedWeight, QuantScheme, check_packed
from mbq_export.schemes.layouts.dense import pack
from mbq_export.schemes.oracle import dequantized


def weight_of(
    q: NDArray[np.integer], *, group_size: int = CHANNEL, seed: int = 0, bits: int = 4
) -> PackedWeight:
    """Pack (N, K) integers, -2**(bits - 1) and up, with random scales."""
    rows, columns = q.shape
    groups = 1 if group_size == CHANNEL else columns // group_size
    scales = 0.01 + np.random.default_rng(seed).random((rows, groups))
    return PackedWeight(
        words=pack((q + 2 ** (bits - 1)).astype(np.uint8), bits=bits),
        scales=scales.astype(np.float32 if group_size == CHANNEL else np.float16),
        zeros=None,
        k=columns,
        bits=bits,
        group_size=group_size,
    )


def random_q(seed: int, rows: int, columns: int, *, bits: int = 4) -> NDArray[np.int64]:
    """(rows, columns) integers of a width, all of them in use."""
    half = 2 ** (bits - 1)
    return np.random.default_rng(seed).integers(-half, half, (rows, columns))


def packed_of(codes: Codes, *, bits: int) -> PackedWeight:
    """Codes of a symmetric scheme as a checkpoint holds them, checked."""
    packed = PackedWeight(
        words=pack(codes.codes.numpy(), bits=bits),
        scales=codes.scales.numpy(),
        zeros=None,
        k=codes.codes.shape[1],
        bits=bits,
        group_size=CHANNEL if codes.scales.shape[1] == 1 else codes.group_size,
    )
    check_packed(packed)
    return packed


def assert_multiplies_nearly_exactly(
    scheme: QuantScheme, group_size: int, *, relative: float
) -> None:
    """Round a random weight; its oracle may differ from a product with exact activations by `relative`."""
    generator = torch.Generator().manual_seed(group_size)
    weight = torch.randn(16, 256, generator=generator)
    codes = quantize(weight, scheme=scheme, group_size=group_size)
    packed = packed_of(codes, bits=scheme.weight_bits)
    x = torch.randn(4, 256, generator=generator).numpy()
    exact = x.astype(np.float64) @ dequantize(codes).double().numpy().T
    real = dequantize(codes).numpy()  # one product of float32
    np.testing.assert_allclose(dequantized(packed), real, rtol=2.0**-24)
    found = scheme.linear_reference(x, packed)
    assert np.linalg.norm(found - exact) <= relative * np.linalg.norm(exact)
