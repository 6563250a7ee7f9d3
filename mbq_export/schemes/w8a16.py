"""8-bit symmetric weights per channel, 16-bit activations: what an output head may have; no kernel."""

from typing import Final

from mbq_export.schemes.base import CHANNEL, QuantScheme
from mbq_export.schemes.layouts.dense import LAYOUT
from mbq_export.schemes.oracle import weight_only_linear

SCHEME: Final = QuantScheme(
    name="w8a16",
    number=5,
    weight_bits=8,
    symmetric=True,
    group_size=CHANNEL,
    group_sizes=(CHANNEL,),
    act_bits=16,
    smallest_code=1,
    checkpoint_layout=LAYOUT.name,
    linear_reference=weight_only_linear,
)
