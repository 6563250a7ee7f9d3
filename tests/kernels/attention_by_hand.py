"""One step of attention, drawn and answered in float64 by the formula."""

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Scores in float32; weights and the result are rounded to the dtype, 2.5e-4 expected in float16."""
SLOTS = 256


@dataclass(frozen=True, kw_only=True)
class Step:
    """A new token and the cache in front of it; slots from its own on hold NaN.

    Attributes:
        qkv: (1, (H + 2 * kv heads) * D).
        keys: (kv heads, SLOTS, D).
        values: Likewise.
        turn: (SLOTS, D) cosines, and signed sines.
        position: (1,) int64.
        answer: (1, H * D) float64.
        new_key: (kv heads, D) that belongs at the position.
        new_value: Likewise.
    """

    qkv: Tensor
    keys: Tensor
    values: Tensor
    turn: tuple[Tensor, Tensor]
    position: Tensor
    answer: Tensor
    new_key: Tensor
    new_value: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """As `decode_attention.attend` takes them."""
        return self.qkv, self.keys, self.values, self.turn, self.position


def drawn(
    heads: tuple[int, int, int], position: int, *, dtype: torch.dtype, device: str = "cpu"
) -> Step:
    """Draw a step of (query heads, key heads, width)."""
    count, kv_heads, width = heads
    generator = torch.Generator().manual_seed(position)
    # Quarter turns: rotations without a rounding, so that keys are known to the bit.
    quarters = torch.randint(4, (SLOTS, width // 2), generator=generator).repeat(1, 2)
    cos = torch.tensor([1.0, 0, -1, 0])[quarters]
    sin = torch.tensor([0.0, 1, 0, -1])[quarters]
    sin[:, : width // 2] *= -1
    keys, values = torch.randn((2, kv_heads, SLOTS, width), generator=generator)
    keys[:, position:], values[:, position:] = torch.nan, torch.nan
    rows = torch.randn((count + 2 * kv_heads, width), generator=generator).to(dtype).double()
    turned = rows * cos[position] + rows.roll(width // 2, -1) * sin[position]
    key, value = turned[count : count + kv_heads], rows[count + kv_heads :]
    kept_keys, kept_values = (
        torch.cat([old[:, :position].to(dtype).double(), new[:, None]], dim=1)
        for old, new in ((keys, key), (values, value))
    )
    q = turned[:count].view(kv_heads, -1, width)
    scores = q @ kept_keys.transpose(1, 2) / width**0.5
    answer = (scores.softmax(-1) @ kept_values).view(1, -1)
    on = {"device": device, "dtype": dtype}
    return Step(
        qkv=rows.view(1, -1).to(**on),
        keys=keys.to(**on),
        values=values.to(**on),
        turn=(cos.to(**on), sin.to(**on)),
        position=torch.tensor([position], device=device),
        answer=answer,
        new_key=key.to(**on),
        new_value=value.to(**on),
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    difference = found.double().cpu() - wanted.double().cpu()
    return float(difference.norm() / wanted.double().cpu().norm())
