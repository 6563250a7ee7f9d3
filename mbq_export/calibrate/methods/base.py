"""What a method is: a preset of switches, and a rule that finds the channel scale of one unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbq_export.channel_scales import Switches

if TYPE_CHECKING:
    from torch import Tensor

    from mbq_export.calibrate.search import UnitView


@dataclass(frozen=True, kw_only=True)
class Found:
    """The scale that a search chose for one unit.

    Attributes:
        alpha: Exponent on the grid.
        scales: (K,) float32 e.
        record: What `calib.json` keeps: losses over the grid, tokens used, dead channels.
    """

    alpha: float
    scales: Tensor
    record: Mapping[str, object]


ScaleRule = Callable[["UnitView", Switches], Found | None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One named preset.

    Attributes:
        name: The name users type.
        switches: The preset; options of the command line replace single fields.
        balanced: Whether the loss weighs token classes by the measured ratios r.
        scales: Looks at one unit and changes nothing; None leaves every unit as it is.
    """

    name: str
    switches: Switches
    balanced: bool
    scales: ScaleRule | None

    def needs_ratios(self, switches: Switches) -> bool:
        """Whether gradients must be measured for these switches."""
        return self.scales is not None and (self.balanced or switches.stat == "balanced")
