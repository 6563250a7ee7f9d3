"""Plain rounding to the nearest code: no scales, no data. The floor that every method is compared with."""

from typing import Final

from mbq_export.calibrate.methods.base import Method
from mbq_export.channel_scales import Switches

METHOD: Final = Method(
    name="rtn",
    switches=Switches(method="rtn", stat="mixed", gqa_o_scale=False),
    balanced=False,
    scales=None,
)
