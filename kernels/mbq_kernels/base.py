"""What a Triton kernel of a scheme offers: run it, and compile it ahead of time for a device that is not there."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import triton
from torch import Tensor

from mbq_export.errors import FormatError, UsageError
from mbq_kernels.weights import DeviceWeight

SCHEMES_WITH_KERNELS: Final = ("w3a16", "w4a16", "w4a8")
"""Each has a module of its name in this package that ends with ``KERNEL: Final = Kernel(...)``."""


class Run(Protocol):
    """Multiply activations by a weight."""

    def __call__(self, x: Tensor, weight: DeviceWeight, *, out: Tensor | None = None) -> Tensor:
        """Multiply (M, K) activations by a weight of this scheme.

        Args:
            x: (M, K) float16 or bfloat16, contiguous, on the device of the weight.
            weight: N by K; its bias, if any, has the dtype of x.
            out: (M, N) to write to, or None for a new tensor.

        Returns:
            (M, N) in the dtype of x.

        Raises:
            FormatError: E4102 if x or out does not fit the weight.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One compilation: a kernel with its types and constants fixed.

    Attributes:
        name: Tells builds of a scheme apart.
        function: The jitted function.
        signature: Type of every argument in order, ``constexpr`` for constants.
        constants: Values of the constants.
        options: Compiler options, for example ``num_warps``.
    """

    name: str
    function: object
    signature: Mapping[str, str]
    constants: Mapping[str, int | bool]
    options: Mapping[str, int | bool]


class Builds(Protocol):
    """List what can be compiled ahead of time."""

    def __call__(self, *, sm: int) -> tuple[Build, ...]:
        """Return the main configurations of a compute capability, for example 90."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The Triton kernels of one scheme.

    Attributes:
        name: Name of the scheme.
        run: Multiplies; under ``TRITON_INTERPRET=1`` on a CPU, else on a GPU.
        builds: What a machine without a GPU can compile.
    """

    name: str
    run: Run
    builds: Builds


def kernel_for(scheme: str) -> Kernel:
    """Return the kernels of a scheme, importing them now.

    Raises:
        UsageError: E2001 if the scheme has none.
    """
    if scheme not in SCHEMES_WITH_KERNELS:
        raise UsageError(
            "E2001",
            f"Unknown kernel {scheme!r}.",
            why=f"known: {', '.join(SCHEMES_WITH_KERNELS)}",
            fix=f"use one of {', '.join(SCHEMES_WITH_KERNELS)}",
        )
    kernel = importlib.import_module(f"mbq_kernels.{scheme}").KERNEL
    assert isinstance(kernel, Kernel), f"mbq_kernels.{scheme} ends with KERNEL = Kernel(...)"
    return kernel


def interpreted(function: object) -> bool:
    """True if a jitted function runs in Triton's interpreter, which is decided when it is defined."""
    return not isinstance(function, triton.JITFunction)


def interpretable(tensor: Tensor, function: object) -> Tensor:
    """Return the tensor, or under the interpreter a float32 copy if it is bfloat16.

    The interpreter's dot of bfloat16 is silently wrong and its cast to it cuts bits off; of float32 both are right.
    """
    wide = interpreted(function) and tensor.dtype == torch.bfloat16
    return tensor.float() if wide else tensor


def compute_capability(x: Tensor) -> int:
    """Of the device of a tensor, for example 90; 0 for a CPU."""
    if x.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def checked_output(x: Tensor, weight: DeviceWeight, out: Tensor | None) -> Tensor:
    """Check the arguments of `Run` and return the tensor to write to.

    Raises:
        FormatError: E4102.
    """
    fits = x.ndim == 2 and x.shape[1] == weight.k and x.is_contiguous()
    if not fits or x.dtype not in {torch.float16, torch.bfloat16} or x.device != weight.device:
        raise FormatError(
            "E4102",
            f"Activations are {x.dtype} {tuple(x.shape)} on {x.device}, strides {x.stride()}.",
            why=f"the kernel reads contiguous float16 or bfloat16 (M, {weight.k}) on {weight.device}",
            fix="call contiguous() and to() on the activations first",
        )
    if weight.bias is not None and weight.bias.dtype != x.dtype:
        raise FormatError(
            "E4102",
            f"The bias is {weight.bias.dtype}, the activations are {x.dtype}.",
            why="both are read as one type",
            fix="make the weight with device_weight(..., dtype=x.dtype)",
        )
    shape = (x.shape[0], weight.n)
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    same = tuple(out.shape) == shape and out.dtype == x.dtype and out.device == x.device
    if not same or not out.is_contiguous():
        raise FormatError(
            "E4102",
            f"The output is {out.dtype} {tuple(out.shape)} on {out.device}.",
            why=f"the kernel writes contiguous {x.dtype} {shape} on {x.device}",
            fix="leave out the output, or allocate it so",
        )
    return out
