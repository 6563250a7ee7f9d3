"""3-bit weights, 16-bit activations: the weight-only kernels on layout w3t, and their oracle in torch."""

from typing import Final

import torch
from torch import Tensor

from mbq_export.schemes.layouts.tiles import TiledWeight, untile
from mbq_export.schemes.oracle import dequantized
from mbq_kernels.base import Kernel
from mbq_kernels.weight_only import builds, linear
from mbq_kernels.weights import DeviceWeight

BITS: Final = 3


def oracle(x: Tensor, tiled: TiledWeight) -> Tensor:
    """Slow truth: x W^T + bias with W = (u - z) * s.

    Args:
        x: (M, K).
        tiled: N by K.

    Returns:
        (M, N) float64, not rounded.
    """
    packed = untile(tiled)
    y = x.double() @ torch.from_numpy(dequantized(packed)).T
    return y if packed.bias is None else y + torch.from_numpy(packed.bias.astype("float64"))


def run(x: Tensor, weight: DeviceWeight, *, out: Tensor | None = None) -> Tensor:
    """Multiply; the contract is that of `mbq_kernels.base.Run`."""
    return linear(x, weight, bits=BITS, out=out)


KERNEL: Final = Kernel(name="w3a16", run=run, builds=builds(BITS))
