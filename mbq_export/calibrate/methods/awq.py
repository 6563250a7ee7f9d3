"""Activation-aware scales, then clipped ranges, all real tokens alike (AWQ, arXiv 2306.00978).

Both steps of that paper: the search with squared error, and groups whose range is shrunk where that lowers the error of
what their linear computes; queries and keys keep theirs.
"""

from typing import Final

from mbq_export.calibrate.methods.base import Method
from mbq_export.calibrate.search import search
from mbq_export.channel_scales import Switches

METHOD: Final = Method(
    name="awq",
    switches=Switches(
        method="awq", loss="mse", grid="20", stat="mixed", gqa_o_scale=False, clip="group"
    ),
    balanced=False,
    scales=search,
)
