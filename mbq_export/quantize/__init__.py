"""2  ChannelScales -> QuantCheckpoint: fold the scales, round, pack, write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbq_export.progress import Progress, silent

if TYPE_CHECKING:
    from pathlib import Path

    from mbq_export.channel_scales import ChannelScales
    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.families.base import LoadedModel
    from mbq_export.schemes.base import QuantScheme
    from mbq_export.state import State


def quantize(
    model: LoadedModel,
    scales: ChannelScales,
    *,
    scheme: QuantScheme | None,
    group_size: int,
    out: Path,
    state: State | None = None,
    progress: Progress = silent,
) -> QuantCheckpoint:
    """Turn a model and its channel scales into a checkpoint, block by block.

    Args:
        model: Decoder blocks may be on the meta device: they are streamed from the model's files.
        scales: Result of a calibration; its switches decide rounding.
        scheme: Number format; None keeps every linear as it is (the full-precision baseline).
        group_size: Columns that share a scale; ignored without a scheme.
        out: Folder to make; appears only when complete.
        state: Finished blocks are kept in it and not done again.
        progress: Called after each block.

    Raises:
        UsageError: E2004 naming the linear if the group size does not divide its inputs.
        FormatError: E4110 or E4112 naming the tensor, E4314 for a scale that fits no unit.
        ResourceError: E5001 or E5008.
    """
    raise NotImplementedError
