"""Activation-aware scales: squared error over all real tokens alike (AWQ, arXiv 2306.00978).

The scale search only: the clipping step of that paper is an option, ``clip`` = "group".
"""

from typing import Final

from mbq_export.calibrate.methods.base import Method
from mbq_export.calibrate.search import search
from mbq_export.channel_scales import Switches

METHOD: Final = Method(
    name="awq",
    switches=Switches(method="awq", loss="mse", grid="20", stat="mixed", gqa_o_scale=False),
    balanced=False,
    scales=search,
)
