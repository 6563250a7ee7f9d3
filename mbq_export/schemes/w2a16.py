"""2-bit asymmetric weights in groups along K, 16-bit activations: for evaluation only."""

from typing import Final

from mbq_export.schemes.base import QuantScheme
from mbq_export.schemes.layouts.dense import LAYOUT
from mbq_export.schemes.oracle import weight_only_linear

SCHEME: Final = QuantScheme(
    name="w2a16",
    weight_bits=2,
    symmetric=False,
    group_size=64,
    act_bits=16,
    evaluation_only=True,
    checkpoint_layout=LAYOUT.name,
    linear_reference=weight_only_linear,
)
