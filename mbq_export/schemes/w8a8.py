"""8-bit symmetric weights per channel, 8-bit activations per token; multiplied by standard operators, no kernel."""

from typing import Final

from mbq_export.schemes.base import CHANNEL, QuantScheme
from mbq_export.schemes.integers import integer_reference
from mbq_export.schemes.layouts.dense import LAYOUT

LARGEST_K: Final = 132_104
"""Largest product 128 * 127, because checkpoints of others may hold q = -128; beyond this K a sum may pass 2**31."""

SCHEME: Final = QuantScheme(
    name="w8a8",
    number=4,
    weight_bits=8,
    symmetric=True,
    group_size=CHANNEL,
    group_sizes=(CHANNEL,),
    act_bits=8,
    smallest_code=1,
    checkpoint_layout=LAYOUT.name,
    linear_reference=integer_reference(8),
    largest_k=LARGEST_K,
)
