"""4-bit weights, 16-bit activations: the weight-only kernels on layout w4t, and their oracle in torch."""

from typing import Final

import torch
from torch import Tensor

from mbq_export.schemes.layouts.tiles import TiledWeight, untile
from mbq_export.schemes.oracle import dequantized
from mbq_kernels.base import Build, Kernel
from mbq_kernels.weight_only import builds as weight_only_builds
from mbq_kernels.weight_only import linear
from mbq_kernels.weights import DeviceWeight

BITS: Final = 4


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


def builds(*, sm: int) -> tuple[Build, ...]:
    """List what can be compiled ahead of time for a compute capability."""
    return weight_only_builds(bits=BITS, sm=sm)


KERNEL: Final = Kernel(name="w4a16", run=run, builds=builds)
