"""A scale without a search: share the outliers of a channel evenly between activations and weights.

    e = sqrt(max |x| / max |w|)        per input channel, max |w| over the rows of all linears that read it

SmoothQuant, arXiv 2211.10438, section 4, at its migration strength of one half. Only inputs that a norm scales are
treated, as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from mbq_export.calibrate.search import choose, normalized, score, statistic

if TYPE_CHECKING:
    from mbq_export.calibrate.methods.base import Found
    from mbq_export.calibrate.units import UnitView
    from mbq_export.channel_scales import Switches

STRENGTH: Final = 0.5
UNITS: Final = ("qkv", "gate_up")
FLOOR: Final = 1e-5
"""Least of either maximum, as in the published code."""


def even_out(unit: UnitView, switches: Switches) -> Found | None:
    """Choose the scale of a unit that a norm feeds; the others are left as they are.

    It is not weighed against plain rounding, whose objective is recorded beside it, and is left out only if the norm
    cannot take it.

    Raises:
        GateError: E1103 if an objective is not finite.
    """
    if unit.place.unit not in UNITS:
        return None
    x = statistic(unit, switches).float()
    e = (x.clamp(min=FLOOR) / largest_weights(unit).clamp(min=FLOOR)).pow(STRENGTH)
    e = normalized(e, alive=x > 0)
    candidates = {0.0: torch.ones_like(e), STRENGTH: e}
    scored = score(unit, [*candidates.values()], switches)
    about = {"stat": switches.stat, "dead_channels": int((x == 0).sum())}
    return choose(unit, candidates, scored, [1, 0], about=about)


def largest_weights(unit: UnitView) -> Tensor:
    """Largest |w| of each input channel over the unit's linears: (K,) float32."""
    found = [unit.block.get_parameter(f"{linear}.weight").float() for linear in unit.place.into]
    return torch.stack([weight.abs().amax(0) for weight in found]).amax(0)
