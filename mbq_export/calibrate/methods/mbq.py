"""Modality-balanced scales: absolute error, vision tokens weighed by r (MBQ, arXiv 2412.19509).

As published, attention outputs are left alone under grouped-query attention (the switch ``gqa_o_scale`` scales them).
"""

from typing import Final

from mbq_export.calibrate.methods.base import Method
from mbq_export.calibrate.search import search
from mbq_export.channel_scales import Switches

METHOD: Final = Method(
    name="mbq",
    switches=Switches(method="mbq", loss="mae", grid="21", stat="mixed", gqa_o_scale=False),
    balanced=True,
    scales=search,
)
