"""Outliers shared evenly between activations and weights, without a search (SmoothQuant, arXiv 2211.10438).

A baseline for schemes that round activations.
"""

from typing import Final

from mbq_export.calibrate.extremes import even_out
from mbq_export.calibrate.methods.base import Method
from mbq_export.channel_scales import Switches

METHOD: Final = Method(
    name="smoothquant",
    switches=Switches(
        method="smoothquant", loss="mse", stat="max", tokens="all", gqa_o_scale=False
    ),
    balanced=False,
    scales=even_out,
    computed=True,
)
