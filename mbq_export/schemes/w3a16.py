"""3-bit asymmetric weights in groups along K, 16-bit activations."""

from typing import Final

from mbq_export.schemes.base import QuantScheme
from mbq_export.schemes.layouts.dense import LAYOUT
from mbq_export.schemes.oracle import weight_only_linear

SCHEME: Final = QuantScheme(
    name="w3a16",
    number=1,
    weight_bits=3,
    symmetric=False,
    group_size=128,
    act_bits=16,
    checkpoint_layout=LAYOUT.name,
    kernel_layout="w3t",
    linear_reference=weight_only_linear,
)
