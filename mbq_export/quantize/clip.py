"""Weighted clipping: each group of a row gives up range where that lowers what its rounding costs the output.

    for f in 1, .95, ... .55:   s, z  from the group's range times f
                                d   = real(nearest codes of the whole group) - w        outliers saturate
                                err = d' H d                                            H of the group's columns
    smallest err; of equal ones the largest f

H is the part of the Gram matrix inside the group (`blocks.gram`), so err is the weighed sum of squared output errors
that the group makes by itself, computed without looking at a token (METHODS 10). Clipping as in AWQ, arXiv 2306.00978,
which compares outputs of sampled tokens; queries and keys are left alone as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from mbq_export.schemes.affine import Codes, Grid, codes_on, grid_of

if TYPE_CHECKING:
    from torch import Tensor

    from mbq_export.schemes.base import QuantScheme

SHRINKS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
SKIPPED: Final = ("self_attn.q_proj", "self_attn.k_proj")
"""Linears whose products pass through the softmax: their largest weights matter beyond the squared error."""
EXACT_COLUMNS: Final = 8192
"""Groups up to this size are compared in float64, longer rows of per-channel schemes in float32."""


class ClippedGrids:
    """Grids of the groups of one linear, and how far each was shrunk."""

    def __init__(self, blocks: Tensor, *, scheme: QuantScheme, channel: bool) -> None:
        """Take the linear's Gram matrix.

        Args:
            blocks: (G, size, size) the part of it inside each group, symmetric.
            scheme: Number format.
            channel: Whether a group is a whole row.
        """
        self._blocks, self._scheme, self._channel = blocks, scheme, channel
        self.shrinks: list[Tensor] = []

    def of(self, group: Tensor, index: int) -> Grid:
        """Choose the range of a group in every row, and note it in `shrinks`.

        Args:
            group: (N, size) float32.
            index: Which group.

        Raises:
            FormatError: E4112 for a range that fp16 cannot hold.
        """
        block = self._blocks[index]
        chosen = best_shrinks(group, block, scheme=self._scheme, channel=self._channel)
        self.shrinks.append(chosen)
        return grid_of(group * chosen[:, None], scheme=self._scheme, channel=self._channel)


def best_shrinks(
    group: Tensor,
    block: Tensor,
    *,
    scheme: QuantScheme,
    channel: bool,
    shrinks: tuple[float, ...] = SHRINKS,
) -> Tensor:
    """Find how far to shrink the range of one group in every row.

    Args:
        group: (N, size) float32.
        block: (size, size) H of its columns.
        scheme: Number format.
        channel: Whether the group is the whole row.
        shrinks: Candidates from the largest to the smallest.

    Returns:
        (N,) float32, one of the candidates each.

    Raises:
        FormatError: E4112 for a range that fp16 cannot hold.
    """
    wide = torch.float64 if len(block) <= EXACT_COLUMNS else torch.float32
    block = block.to(wide)
    found = torch.full((len(group),), shrinks[0])
    least = torch.full((len(group),), torch.inf, dtype=wide)
    for shrink in shrinks:
        grid = grid_of(group * shrink, scheme=scheme, channel=channel)
        steps = codes_on(group, grid, scheme=scheme).float() - grid.zeros[:, None].float()
        change = (steps * grid.scales[:, None].float() - group).to(wide)
        errors = ((change @ block) * change).sum(1)
        better = errors < least
        found[better], least[better] = shrink, errors[better]
    return found


def round_clipped(
    weight: Tensor, grids: ClippedGrids, *, scheme: QuantScheme, group_size: int
) -> Codes:
    """Round every weight to the nearest code of its group's clipped grid.

    Args:
        weight: (N, K), finite.
        grids: Of this linear; notes the shrinks.
        scheme: Number format.
        group_size: Columns that share a scale, or `CHANNEL`.

    Raises:
        FormatError: E4112 for a range that fp16 cannot hold.
    """
    groups = scheme.groups_of(weight.shape[1], group_size)
    parts = weight.float().chunk(groups, dim=1)
    found = [grids.of(part, index) for index, part in enumerate(parts)]
    codes = [codes_on(part, grid, scheme=scheme) for part, grid in zip(parts, found, strict=True)]
    return Codes(
        codes=torch.cat(codes, dim=1),
        scales=torch.stack([grid.scales for grid in found], dim=1),
        zeros=torch.stack([grid.zeros for grid in found], dim=1).to(torch.uint8),
        clamped=sum(grid.clamped for grid in found),
    )


def clip_facts(grids: ClippedGrids, hessian: str) -> dict[str, Any]:
    """What `mbq.json` says of a clipped linear: how token classes weighed, and groups by how far they were shrunk.

    Shrinks that no group has do not occur.
    """
    chosen = torch.stack(grids.shrinks)
    counts = {f"{shrink:g}": int((chosen == shrink).sum()) for shrink in SHRINKS}
    return {
        "hessian": hessian,
        "groups": {shrink: count for shrink, count in counts.items() if count},
    }
