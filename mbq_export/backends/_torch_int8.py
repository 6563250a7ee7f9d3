"""Linears of the oracle that round their activations: integer sums and two products, as the format says.

    x ── per token ──► xq, sx        y = (float32(sum of xq q) * s) * sx + bias

Slow and obvious: integers travel in floats that hold every sum exactly. The scheme's numpy oracle
(`schemes.integers.integer_linear`) is the same to the bit per channel, and in groups but for the order of a float64 sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn

from mbq_export.schemes.affine import quantize_per_token
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.integers import largest_activation, signed_codes

if TYPE_CHECKING:
    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.schemes.base import PackedWeight

EXACT_FLOAT32: Final = 1 << 24
"""Integers below are exact in float32, and so are their sums as long as those stay below."""


def round_activations(
    module: nn.Module, checkpoint: QuantCheckpoint, *, but: str | None = None
) -> None:
    """Replace every linear of a model whose scheme rounds activations.

    Args:
        module: The transformers model of the checkpoint.
        checkpoint: Gives the codes.
        but: Module path whose linears are left as they are.
    """
    for record in checkpoint.records.values():
        left = but is not None and record.name.startswith(f"{but}.")
        if record.scheme.rounds_activations and not left:
            parent, _, name = record.name.rpartition(".")
            packed, bits = checkpoint.packed(record.name), record.scheme.act_bits
            setattr(module.get_submodule(parent), name, Int8Linear(packed, act_bits=bits))


class Int8Linear(nn.Module):
    """A packed linear with symmetric codes and activations of up to 8 bits, computed in float32."""

    def __init__(self, packed: PackedWeight, *, act_bits: int = 8) -> None:
        """Unpack a weight.

        Args:
            packed: N by K, symmetric, per channel or in groups.
            act_bits: Width of an activation.
        """
        super().__init__()
        self.act_bits = act_bits
        self.channel = packed.group_size == CHANNEL
        per_group = packed.k // packed.groups
        largest = largest_activation(act_bits) * 2 ** (packed.bits - 1) * per_group
        self.exact = torch.float32 if largest < EXACT_FLOAT32 else torch.float64
        codes = torch.from_numpy(signed_codes(packed)).reshape(packed.n, packed.groups, per_group)
        self.register_buffer("codes", codes.permute(1, 2, 0).to(self.exact).contiguous())
        self.register_buffer("scales", torch.from_numpy(np.array(packed.scales)))
        bias = None if packed.bias is None else torch.from_numpy(packed.bias.astype(np.float32))
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., K) rows; (..., N) float32."""
        codes, scales = self.get_buffer("codes"), self.get_buffer("scales")
        xq, sx = quantize_per_token(x, bits=self.act_bits)
        groups, per_group, n = codes.shape
        rows = xq.reshape(-1, groups, per_group).transpose(0, 1).to(self.exact)
        sums = rows @ codes  # (G, M, N), exact
        sx = sx.reshape(-1, 1)
        if self.channel:
            y = sums[0].float() * scales[:, 0] * sx
        else:
            total = (sums.double() * scales.double().T[:, None]).sum(0)
            y = (total * sx.double()).float()
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], n)
