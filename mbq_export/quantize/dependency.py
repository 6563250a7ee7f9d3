"""How much the rows behind one half of a decoder block leave open about the next, and which halves belong together.

    site k     residual rows behind the k-th half: attention, MLP, attention, ...
    p_k(m)     soft level of a number x:  softmax over m of -(x - level_m)**2 / step
    p(m, n)    mean over the same tokens and channels of p_k(m) p_k+1(n)
    H          -sum p(m, n) ln p(n | m)            conditional entropy of site k+1 given site k, nats
    I          entropy of site k+1 - H             mutual information

    a block grows from the left while it has fewer than 3 sites and the mean of its links is at least the median of all

Q-VLM, arXiv 2410.08119, takes entropy for the dependency of neighbouring layers; as a conditional entropy it is small
where one site decides the next, so what "depends" more is the open question that the two measures stand for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from mbq_export.families.base import ANSWER, VISION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mbq_export.blocks.stream import Batch

CONDITIONAL_ENTROPY: Final = "conditional-entropy"
MUTUAL_INFORMATION: Final = "mutual-info"
DEEPEST: Final = 3
"""Sites of a block at most: five ratios each make 125 combinations."""
TOKENS: Final = 2048
CHANNELS: Final = 256
"""Numbers of a site that its levels are counted over."""
_CHUNK: Final = 1 << 22
"""Soft levels held at a time."""


def draw_numbers(
    batches: Sequence[Batch], width: int, *, seed: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Draw the tokens and channels that stand for a site: answers first, then vision.

    Args:
        batches: All samples.
        width: Channels of the residual stream.
        seed: The same seed draws the same ones.

    Returns:
        Per batch, ascending flat positions; and ascending channels.
    """
    rng = np.random.default_rng(list(seed))
    classes = np.concatenate([batch.classes.flatten().numpy() for batch in batches])
    drawn = [rng.permutation(np.flatnonzero(classes == kind)) for kind in (ANSWER, VISION)]
    flat = np.sort(np.concatenate(drawn)[:TOKENS])
    channels = np.sort(rng.permutation(width)[:CHANNELS])
    ends = np.cumsum([batch.classes.numel() for batch in batches])
    parts = np.split(flat, np.searchsorted(flat, ends[:-1]))
    starts = [0, *ends[:-1].tolist()]
    places = [torch.from_numpy(part - start) for part, start in zip(parts, starts, strict=True)]
    return places, torch.from_numpy(channels)


def soft_levels(x: Tensor, levels: Tensor) -> Tensor:
    """Share of each level in each number (Q-VLM's soft assignment, METHODS 12.2).

    Args:
        x: (n,) numbers.
        levels: (L,) evenly spaced, ascending; equal ones stand for a site that never changes.

    Returns:
        (n, L), rows add up to 1.
    """
    step = levels[1] - levels[0]
    if step == 0:
        return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), len(levels)).to(x)
    return torch.softmax(-(x[:, None] - levels).square() / step, dim=1)


def joint_distribution(first: Tensor, second: Tensor, *, bits: int) -> Tensor:
    """How often levels of two sites meet.

    Args:
        first: (n,) numbers of a site.
        second: (n,) numbers of the next one, at the same tokens and channels.
        bits: 2**bits levels over the range of each site, in units of its standard deviation.

    Returns:
        (L, L) float64, adds up to 1; row m, column n.
    """
    scaled = [_in_deviations(x) for x in (first, second)]
    levels = [torch.linspace(float(x.min()), float(x.max()), 2**bits) for x in scaled]
    found = torch.zeros(2**bits, 2**bits, dtype=torch.float64)
    chunk = max(1, _CHUNK >> bits)
    for x, y in zip(*(torch.split(x, chunk) for x in scaled), strict=True):
        found += (soft_levels(x, levels[0]).T @ soft_levels(y, levels[1])).double()
    return found / found.sum()


def conditional_entropy(joint: Tensor) -> float:
    """H(second | first) in nats of (L, L) probabilities; 0 ln 0 = 0."""
    given = joint / joint.sum(1, keepdim=True).clamp(min=torch.finfo(joint.dtype).tiny)
    return float(-torch.special.xlogy(joint, given).sum())


def mutual_information(joint: Tensor) -> float:
    """H(second) - H(second | first) in nats of (L, L) probabilities."""
    second = joint.sum(0)
    return float(-torch.special.xlogy(second, second).sum()) - conditional_entropy(joint)


def partition(links: Sequence[float] | NDArray[np.float64]) -> tuple[tuple[int, ...], ...]:
    """Group neighbouring sites, greedily from the left.

    Args:
        links: One less than sites: dependency of each site and the next.

    Returns:
        Ascending numbers of sites, at most `DEEPEST` per block.
    """
    least = float(np.median(links)) if len(links) else 0.0
    blocks = [[0]]
    for site in range(1, len(links) + 1):
        block = blocks[-1]
        if len(block) < DEEPEST and float(np.mean(links[block[0] : site])) >= least:
            block.append(site)
        else:
            blocks.append([site])
    return tuple(map(tuple, blocks))


def _in_deviations(x: Tensor) -> Tensor:
    x = x.float()
    deviation = float(x.double().std(correction=0))
    return x / deviation if deviation else x
