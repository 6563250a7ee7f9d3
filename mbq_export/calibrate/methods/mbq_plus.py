"""Modality-balanced scales, then error feedback that weighs what the answer depends on.

The search of MBQ (arXiv 2412.19509) with the balanced statistic and scaled attention outputs; rounding looks at what
the quantized blocks before leave. Held-out samples decide per block which Hessian, and whether weights move.
"""

from typing import Final

from mbq_export.calibrate.methods.base import Method
from mbq_export.calibrate.search import search
from mbq_export.channel_scales import Switches

METHOD: Final = Method(
    name="mbq+",
    switches=Switches(
        method="mbq+",
        loss="mae",
        grid="21",
        stat="balanced",
        gqa_o_scale=True,
        rounding="gptq",
        hessian="auto",
        asym="auto",
    ),
    balanced=True,
    scales=search,
)
