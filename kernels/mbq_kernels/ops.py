"""The kernels as torch operators: ``mbq::linear`` and ``mbq::quant_act``.

    apply(weight, x) ──► mbq::linear ──┬── cpu   the scheme's oracle on the tile bytes, one rounding
                                       ├── cuda  the compiled library on the current stream, else Triton
                                       └── meta  shapes and dtypes: for torch.compile and opcheck

Importing this module registers the operators; nothing else of the project does. On CUDA they queue work on the
current stream, never synchronize, and take scratch memory from torch's allocator, which knows streams and gives
every captured graph a pool of its own: two streams never share scratch, and a replayed graph finds its own again.
"""

import logging
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from mbq_export.errors import MachineError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.integers import LARGEST_ACTIVATION, SMALLEST_ABSMAX
from mbq_export.schemes.layouts.tiles import TILE_COLUMNS, TILE_ROWS, TiledWeight, padded, untile
from mbq_kernels.library import ALIGNMENT, KernelLibrary, LinearCall
from mbq_kernels.linear_checks import (
    NO_EPILOGUE,
    SILU_MUL,
    check_linear,
    check_rows,
    columns_of,
    dtype_name,
)
from mbq_kernels.weights import DeviceWeight

logger = logging.getLogger(__name__)

BUILT_LIBRARY: Final = Path(__file__).resolve().parents[2] / "build" / "libmbq_kernels.so"
"""Where ``kernels/build.py`` of a checkout puts the library."""
BYTE_ORDER: Final = (0, 2, 1, 3)
"""Column of each byte in a word of four quantized activations (docs/formats/tiles.md)."""

_LINEAR_SCHEMA: Final = (
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? residual, "
    "str scheme, int n, int k, int group_size, str epilogue) -> Tensor"
)


class _Choice:
    """Which library the operators call; decided once, at the first launch or by `use_library`."""

    decided: bool = False
    library: KernelLibrary | None = None


def use_library(library: KernelLibrary | None) -> None:
    """Choose what runs on CUDA from now on; graphs that are captured keep what they have.

    Args:
        library: A loaded library, or None for the Triton kernels.
    """
    _Choice.decided, _Choice.library = True, library


def chosen_library() -> KernelLibrary | None:
    """The library that runs on CUDA, loading `BUILT_LIBRARY` if none was chosen; None means Triton.

    Raises:
        MachineError: E3005 if the file is there and is no such library.
    """
    if not _Choice.decided:
        found = KernelLibrary.load(BUILT_LIBRARY) if BUILT_LIBRARY.is_file() else None
        if found is None:
            logger.warning(
                "no compiled kernels at %s: linears run on the Triton kernels, which are slower "
                "(python kernels/build.py)",
                BUILT_LIBRARY,
            )
        use_library(found)
    return _Choice.library


def apply(
    weight: DeviceWeight,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    epilogue: str = NO_EPILOGUE,
) -> Tensor:
    """Multiply activations by a tiled weight.

    Args:
        weight: N by K.
        x: (..., K) float16 or bfloat16, on a CPU also float32, on the weight's device.
        residual: Shaped and typed as the result; added after the epilogue, before the one rounding.
        epilogue: ``none``, or ``silu_mul`` for a weight whose rows are gate and up interleaved by 16.

    Returns:
        (..., N) in the dtype of x, (..., N / 2) with ``silu_mul``.

    Raises:
        FormatError: E4102 for a tensor of a wrong dtype, shape or device.
        UsageError: E2001 for an unknown scheme or epilogue.
    """
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(-1, residual.shape[-1])
    y: Tensor = linear(
        rows,
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.bias,
        added,
        weight.scheme,
        weight.n,
        weight.k,
        weight.group_size,
        epilogue,
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _linear_cpu(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scheme: str,
    n: int,
    k: int,
    group_size: int,
    epilogue: str,
) -> Tensor:
    weight = _weight(codes, scales, zeros, bias, (scheme, n, k, group_size))
    check_linear(weight, x, residual, epilogue)
    tiled = TiledWeight(
        scheme=scheme,
        n=n,
        k=k,
        group_size=group_size,
        codes=codes.numpy(),
        scales=scales.numpy(),
        zeros=None if zeros is None else zeros.numpy(),
        bias=None if bias is None else bias.float().numpy(),
    )
    with np.errstate(invalid="ignore"):  # an infinity in x makes its row NaN, as on a GPU
        y = SCHEMES[scheme].linear_reference(x.float().numpy(), untile(tiled))
    # Integer schemes are defined in float32 up to the one rounding, the others in float64.
    exact = np.float32 if SCHEMES[scheme].act_bits == 8 else np.float64
    return finished(torch.from_numpy(y.astype(exact)), residual, epilogue).to(x.dtype)


linear = torch.library.custom_op(
    "mbq::linear", _linear_cpu, mutates_args=(), device_types="cpu", schema=_LINEAR_SCHEMA
)
"""y (M, N) = x (M, K) W^T + bias + residual, rounded once; see `apply` for the arguments."""


@linear.register_kernel("cuda")
def _linear_cuda(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scheme: str,
    n: int,
    k: int,
    group_size: int,
    epilogue: str,
) -> Tensor:
    weight = _weight(codes, scales, zeros, bias, (scheme, n, k, group_size))
    check_linear(weight, x, residual, epilogue)
    with torch.cuda.device(x.device):
        library = chosen_library()
        if library is None:
            return by_triton(weight, x, residual=residual, epilogue=epilogue)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        return by_library(library, weight, x, residual=residual, epilogue=epilogue, stream=stream)


@linear.register_fake
def _linear_fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scheme: str,
    n: int,
    k: int,
    group_size: int,
    epilogue: str,
) -> Tensor:
    weight = _weight(codes, scales, zeros, bias, (scheme, n, k, group_size))
    check_linear(weight, x, residual, epilogue)
    return x.new_empty((x.shape[0], columns_of(n, epilogue)))


def by_library(
    library: KernelLibrary,
    weight: DeviceWeight,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    epilogue: str = NO_EPILOGUE,
    stream: int = 0,
) -> Tensor:
    """Queue one linear of the compiled library; arguments are those of `apply`, checked already.

    Args:
        library: Runs on the device of the tensors: the emulated library on a CPU.
        weight: N by K.
        x: (M, K).
        residual: (M, N), or None.
        epilogue: As of `apply`.
        stream: A CUDA stream of the tensors' device.

    Raises:
        FormatError: E4121 if the library refuses an argument.
        MachineError: E3016 if the launch fails.
    """
    x, m = _aligned(x), len(x)
    bias = None if weight.bias is None else _aligned(weight.bias)
    added = None if residual is None else _aligned(residual)
    y = x.new_empty((m, columns_of(weight.n, epilogue)))
    if not m:
        return y
    call = LinearCall(
        scheme=weight.scheme,
        dtype=dtype_name(x.dtype),
        n=weight.n,
        k=weight.k,
        group_size=weight.group_size,
        codes=weight.codes.data_ptr(),
        scales=weight.scales.data_ptr(),
        zeros=0 if weight.zeros is None else weight.zeros.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        residual=0 if added is None else added.data_ptr(),
        epilogue=epilogue,
    )
    size = library.workspace_bytes(call, max_m=m)
    scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
    library.linear(
        call,
        m=m,
        x=x.data_ptr(),
        y=y.data_ptr(),
        workspace=(scratch.data_ptr(), size),
        stream=stream,
    )
    return y


def by_triton(
    weight: DeviceWeight, x: Tensor, *, residual: Tensor | None = None, epilogue: str = NO_EPILOGUE
) -> Tensor:
    """Run the Triton kernels, which round before residual and epilogue and so once more; arguments as of `apply`.

    Raises:
        MachineError: E3005 if Triton is not installed either.
    """
    try:
        from mbq_kernels.base import kernel_for  # noqa: PLC0415  (Triton is an extra)
    except ModuleNotFoundError as error:
        raise MachineError(
            "E3005",
            "There is no compiled kernel library, and no Triton in its place.",
            why=f"{BUILT_LIBRARY} is missing, and {error.name} is not installed",
            fix=("python kernels/build.py", 'pip install "mbq-export[triton]"'),
        ) from error
    y = kernel_for(weight.scheme).run(x.contiguous(), weight)
    if residual is None and epilogue == NO_EPILOGUE:
        return y
    return finished(y.float(), residual, epilogue).to(x.dtype)


def finished(y: Tensor, residual: Tensor | None, epilogue: str) -> Tensor:
    """Do what follows the sum, in the dtype of the sum.

    Args:
        y: (M, N) float32 or float64, bias included.
        residual: Shaped as the result, any floating dtype, or None.
        epilogue: ``none`` or ``silu_mul``.

    Returns:
        (M, N), or (M, N / 2) with ``silu_mul``.
    """
    if epilogue == SILU_MUL:
        gate, up = y.reshape(len(y), -1, 2, TILE_ROWS).unbind(2)
        y = (torch.nn.functional.silu(gate) * up).reshape(len(y), -1)
    return y if residual is None else y + residual.to(y.dtype)


def _quant_act_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize in torch operations: the oracle, and the fallback on a GPU."""
    check_rows(x)
    wide = x.float()
    largest = wide.abs().amax(dim=1) if x.shape[1] else wide.new_zeros(len(x))
    scales = largest.clamp_min(SMALLEST_ABSMAX) / LARGEST_ACTIVATION
    codes = torch.round(wide / scales[:, None])
    codes = torch.where(codes.isfinite(), codes, 0).to(torch.int8)
    whole = torch.nn.functional.pad(codes, (0, padded(x.shape[1], TILE_COLUMNS) - x.shape[1]))
    words = whole.reshape(len(x), -1, len(BYTE_ORDER))
    return words[..., list(BYTE_ORDER)].reshape(len(x), -1), scales


quant_act = torch.library.custom_op(
    "mbq::quant_act",
    _quant_act_torch,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x) -> (Tensor, Tensor)",
)
"""(M, K) activations to int8 (M, 128 * ceil(K / 128)) in byte order 0 2 1 3, and float32 scales (M,)."""


@quant_act.register_kernel("cuda")
def _quant_act_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(x)
    library = chosen_library()
    if library is None or x.dtype == torch.float32:
        return _quant_act_torch(x)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        return quant_act_by_library(library, x, stream=stream)


@quant_act.register_fake
def _quant_act_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(x)
    width = padded(x.shape[1], TILE_COLUMNS)
    return (
        x.new_empty((x.shape[0], width), dtype=torch.int8),
        x.new_empty((x.shape[0],), dtype=torch.float32),
    )


def quant_act_by_library(
    library: KernelLibrary, x: Tensor, *, stream: int = 0
) -> tuple[Tensor, Tensor]:
    """Queue the library's quantization of float16 or bfloat16 activations (M, K).

    Raises:
        FormatError: E4121 if the library refuses an argument.
        MachineError: E3016 if the launch fails.
    """
    x = _aligned(x)
    m, k = x.shape
    xq = x.new_empty((m, padded(k, TILE_COLUMNS)), dtype=torch.int8)
    sx = x.new_empty((m,), dtype=torch.float32)
    library.quant_act(
        dtype=dtype_name(x.dtype),
        m=m,
        k=k,
        x=x.data_ptr(),
        xq=xq.data_ptr(),
        sx=sx.data_ptr(),
        stream=stream,
    )
    return xq, sx


def _weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    format_of: tuple[str, int, int, int],
) -> DeviceWeight:
    scheme, n, k, group_size = format_of
    return DeviceWeight(
        scheme=scheme,
        n=n,
        k=k,
        group_size=group_size,
        codes=codes,
        scales=scales,
        zeros=zeros,
        bias=bias,
    )


def _aligned(tensor: Tensor) -> Tensor:
    """A contiguous tensor whose first byte lies where kernels may read vectors."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
