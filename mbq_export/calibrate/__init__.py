"""1  model + pictures -> ChannelScales: measure gradients per token class, search a scale per unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mbq_export.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mbq_export.channel_scales import ChannelScales, Switches
    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs
    from mbq_export.schemes.base import QuantScheme
    from mbq_export.state import State


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the result besides the model and the samples.

    Attributes:
        scheme: Number format that the search rounds to.
        group_size: Columns that share a scale.
        switches: Resolved: the method's preset with the user's replacements.
        seed: Seeds the choice of scored tokens and the bootstrap.
        facts: Recorded as they are: ``model`` {"id", "sha256"}, ``data`` {"sha256", ...}. No paths.
        text_only_ok: Go on without image tokens; every ratio is then absent.
    """

    scheme: QuantScheme
    group_size: int
    switches: Switches
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    text_only_ok: bool = False


def calibrate(
    model: LoadedModel,
    inputs: Sequence[ModelInputs],
    recipe: Recipe,
    *,
    state: State | None = None,
    progress: Progress = silent,
) -> ChannelScales:
    """Find the channel scales of every unit, block by block.

    Args:
        model: Decoder blocks may be on the meta device: they are streamed from the model's files.
        inputs: Encoded samples with answers.
        recipe: Scheme, switches, seed.
        state: Gradient statistics and finished blocks are kept in it and not done again. That it belongs
            to the same arguments is its opener's business.
        progress: Called after each block of each pass.

    Raises:
        UsageError: E2001 for an unknown method, E2004 naming the linear if the group size does not fit.
        FormatError: E4308 without image tokens, E4309 without answer tokens.
        GateError: E1103 if a loss, gradient or objective is not finite.
    """
    raise NotImplementedError
