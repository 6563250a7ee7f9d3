"""4-bit symmetric weights per channel or group of 128, 8-bit activations per token."""

from typing import Final

from mbq_export.schemes.base import CHANNEL, QuantScheme
from mbq_export.schemes.integers import integer_reference
from mbq_export.schemes.layouts.dense import LAYOUT

LARGEST_K: Final = 132_104
"""Kernels sum 16 * q * xq, at most 128 * 127 per product; beyond this K the sum may pass 2**31."""

SCHEME: Final = QuantScheme(
    name="w4a8",
    number=3,
    weight_bits=4,
    symmetric=True,
    group_size=CHANNEL,
    group_sizes=(CHANNEL, 128),
    act_bits=8,
    checkpoint_layout=LAYOUT.name,
    kernel_layout="w4t",
    linear_reference=integer_reference(8),
    largest_k=LARGEST_K,
)
