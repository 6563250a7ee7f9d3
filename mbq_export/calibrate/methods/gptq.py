"""Error feedback alone: no channel scales, all real tokens weigh alike (GPTQ, arXiv 2210.17323).

The rounding itself is `quantize.gptq`; a Hessian and a target of the user's choice are options.
"""

from typing import Final

from mbq_export.calibrate.methods.base import Method
from mbq_export.channel_scales import Switches

METHOD: Final = Method(
    name="gptq",
    switches=Switches(
        method="gptq",
        stat="mixed",
        gqa_o_scale=False,
        rounding="gptq",
        hessian="plain",
        asym=0.0,
    ),
    balanced=False,
    scales=None,
)
