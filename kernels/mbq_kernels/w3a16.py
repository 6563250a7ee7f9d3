"""3-bit weights, 16-bit activations: the weight-only kernels on layout w3t, and their oracle in torch."""

from typing import Final

from torch import Tensor

from mbq_kernels.base import Build, Kernel
from mbq_kernels.weight_only import builds as weight_only_builds
from mbq_kernels.weight_only import linear, oracle
from mbq_kernels.weights import DeviceWeight

BITS: Final = 3


def run(x: Tensor, weight: DeviceWeight, *, out: Tensor | None = None) -> Tensor:
    """Multiply; the contract is that of `mbq_kernels.base.Run`."""
    return linear(x, weight, bits=BITS, out=out)


def builds(*, sm: int) -> tuple[Build, ...]:
    """List what can be compiled ahead of time for a compute capability."""
    return weight_only_builds(bits=BITS, sm=sm)


__all__ = ["KERNEL", "oracle"]

KERNEL: Final = Kernel(name="w3a16", run=run, builds=builds)
