"""A tiled weight as tensors: what every kernel of this package is handed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mbq_export.schemes.layouts.tiles import TiledWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWeight:
    """One linear, ready to multiply. Np and Kp are N and K rounded up to whole tiles of 16 by 128.

    Attributes:
        scheme: Name of the number format.
        n: N, not padded.
        k: K, not padded.
        group_size: Columns that share a scale; 0 for one scale per output channel.
        codes: (Np / 16, Kp / 128, words of a tile) int32.
        scales: (Np / 16, Kp / G, 8, 2) float16; per channel (Np,) float32, a sixteenth of the scale.
        zeros: (Np / 16, Kp / G, 2) int32; None when symmetric.
        bias: (N,) in the dtype of the activations, or None.
    """

    scheme: str
    n: int
    k: int
    group_size: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weights reads: codes, scales and zero points."""
        read = (self.codes, self.scales, self.zeros)
        return sum(tensor.nbytes for tensor in read if tensor is not None)

    def to(self, device: str | torch.device) -> "DeviceWeight":
        """Return the same weight on another device."""
        return DeviceWeight(
            scheme=self.scheme,
            n=self.n,
            k=self.k,
            group_size=self.group_size,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            bias=None if self.bias is None else self.bias.to(device),
        )


def device_weight(
    tiled: TiledWeight, *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> DeviceWeight:
    """Copy a tiled weight to a device.

    Args:
        tiled: One linear.
        dtype: Of the activations, torch.float16 or torch.bfloat16; the bias is rounded to it.
        device: Where the tensors go.
    """
    bias = None
    if tiled.bias is not None:
        bias = torch.from_numpy(tiled.bias.astype(np.float32)).to(dtype)
    return DeviceWeight(
        scheme=tiled.scheme,
        n=tiled.n,
        k=tiled.k,
        group_size=tiled.group_size,
        codes=torch.from_numpy(tiled.codes),
        scales=torch.from_numpy(tiled.scales),
        zeros=None if tiled.zeros is None else torch.from_numpy(tiled.zeros),
        bias=bias,
    ).to(device)
