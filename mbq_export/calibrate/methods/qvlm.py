"""Modality-balanced scales, then ranges of weights that several halves of blocks choose together.

The search of MBQ (arXiv 2412.19509) per unit; Q-VLM's idea (arXiv 2410.08119) of searching what depends on each other in
one go, with MBQ's balanced error. What of that paper is left out, and why: docs/decisions/0017.
"""

from typing import Final

from mbq_export.calibrate.methods.base import Method
from mbq_export.calibrate.search import search
from mbq_export.channel_scales import Switches

METHOD: Final = Method(
    name="qvlm",
    switches=Switches(
        method="qvlm",
        loss="mae",
        grid="21",
        stat="mixed",
        gqa_o_scale=False,
        search_scope="block",
    ),
    balanced=True,
    scales=search,
)
