"""Rotary positions and attention to a static cache in torch's own operations."""

import torch
from torch import Tensor
from torch.nn import functional

from mbq_kernels.decoder_weights import DecoderShape


def rotations(
    shape: DecoderShape, slots: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(slots, 1, D) cosines, and sines with the sign that `rotated` needs (RoFormer, section 3.2.2)."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float64, device=device)
    angles = torch.arange(slots, dtype=torch.float64, device=device)[:, None] * (
        shape.rope_theta ** (-half / shape.head_dim)
    )
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat([cos, cos], dim=-1).to(dtype)[:, None],
        torch.cat([-sin, sin], dim=-1).to(dtype)[:, None],
    )


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (T, heads, D) in the pairs (i, i + D / 2)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def later_masked(slots: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, slots): 0 where the slot is not after the position, else minus infinity."""
    after = slots[None] > positions[:, None]
    return torch.zeros(after.shape, device=slots.device, dtype=dtype).masked_fill_(
        after, float("-inf")
    )


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attend to the cache.

    The query heads that share a key head become rows of it, so that no key is read twice.

    Args:
        q: (T, H, D).
        keys: (kv heads, slots, D).
        values: Likewise.
        mask: (T, slots), added to the scores.

    Returns:
        (T, H * D).
    """
    count, heads, width = q.shape
    shared = heads // len(keys)
    rows = q.view(count, len(keys), shared, width).permute(1, 2, 0, 3)
    rows = rows.reshape(1, len(keys), shared * count, width)
    # One row is seen alike by all its copies; several have to be written out.
    mask = mask.expand(shared, -1) if count == 1 else mask.repeat(shared, 1)
    seen = functional.scaled_dot_product_attention(rows, keys[None], values[None], attn_mask=mask)
    seen = seen.view(len(keys), shared, count, width).permute(2, 0, 1, 3)
    return seen.reshape(count, heads * width)
