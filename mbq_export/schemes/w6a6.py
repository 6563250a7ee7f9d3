"""6-bit symmetric weights per channel, 6-bit activations per token: a format of papers, for evaluation only."""

from typing import Final

from mbq_export.schemes.base import CHANNEL, QuantScheme
from mbq_export.schemes.integers import integer_reference
from mbq_export.schemes.layouts.dense import LAYOUT

SCHEME: Final = QuantScheme(
    name="w6a6",
    weight_bits=6,
    symmetric=True,
    group_size=CHANNEL,
    group_sizes=(CHANNEL,),
    act_bits=6,
    evaluation_only=True,
    checkpoint_layout=LAYOUT.name,
    linear_reference=integer_reference(6),
)
