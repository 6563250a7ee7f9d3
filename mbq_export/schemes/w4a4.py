"""4-bit symmetric weights per channel, 4-bit activations per token: a format of papers, for evaluation only."""

from typing import Final

from mbq_export.schemes.base import CHANNEL, QuantScheme
from mbq_export.schemes.integers import integer_reference
from mbq_export.schemes.layouts.dense import LAYOUT

SCHEME: Final = QuantScheme(
    name="w4a4",
    weight_bits=4,
    symmetric=True,
    group_size=CHANNEL,
    group_sizes=(CHANNEL,),
    act_bits=4,
    evaluation_only=True,
    checkpoint_layout=LAYOUT.name,
    linear_reference=integer_reference(4),
)
