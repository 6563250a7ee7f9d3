"""What a linear may be given: shapes, dtypes and devices, by a message instead of by a crash.

Values are never looked at, so the same checks hold for tensors without storage.
"""

from functools import cache
from typing import Final, NoReturn

import torch
from torch import Tensor

from mbq_export.errors import FormatError, UsageError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, QuantScheme
from mbq_export.schemes.layouts.tiles import TILE_COLUMNS, TILE_ROWS, padded
from mbq_kernels.library import EPILOGUE_IDS, SCHEME_IDS
from mbq_kernels.weights import DeviceWeight

NO_EPILOGUE: Final = "none"
SILU_MUL: Final = "silu_mul"
HALVES: Final = (torch.float16, torch.bfloat16)
FLOATS: Final = (*HALVES, torch.float32)


def check_linear(weight: DeviceWeight, x: Tensor, residual: Tensor | None, epilogue: str) -> None:
    """Check everything that a linear is given.

    Raises:
        FormatError: E4102 for a tensor of a wrong dtype, shape or device, naming it.
        UsageError: E2001 for an unknown scheme or epilogue, E2004 for a group size the scheme does not have.
    """
    _known("scheme", weight.scheme, tuple(SCHEME_IDS))
    _known("epilogue", epilogue, tuple(EPILOGUE_IDS))
    check_rows(x)
    _expect("x", x, (x.shape[0], weight.k), HALVES if x.device.type == "cuda" else FLOATS)
    if epilogue == SILU_MUL and weight.n % (2 * TILE_ROWS):
        _refuse("codes", weight.codes, f"N in whole tiles of gate and up, not {weight.n}")
    _check_tiles(weight, SCHEMES[weight.scheme])
    if weight.bias is not None:
        _expect("bias", weight.bias, (weight.n,), (x.dtype,))
    if residual is not None:
        _expect("residual", residual, (x.shape[0], columns_of(weight.n, epilogue)), (x.dtype,))
    others = (weight.codes, weight.scales, weight.zeros, weight.bias, residual)
    for tensor in others:
        if tensor is not None and tensor.device != x.device:
            _refuse("x", x, f"all tensors on one device, one is on {tensor.device}")


def check_rows(x: Tensor) -> None:
    """Check that activations are a matrix of floats.

    Raises:
        FormatError: E4102.
    """
    if x.ndim != 2 or x.dtype not in FLOATS:
        _refuse("x", x, f"{' or '.join(map(dtype_name, FLOATS))} (M, K)")


def columns_of(n: int, epilogue: str) -> int:
    """Columns of the result of a linear with N rows of weights."""
    return n // 2 if epilogue == SILU_MUL else n


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """How the kernel library calls a dtype, for example ``float16``."""
    return str(dtype).removeprefix("torch.")


def _check_tiles(weight: DeviceWeight, scheme: QuantScheme) -> None:
    scheme.groups_of(weight.k, weight.group_size)
    down = padded(weight.n, TILE_ROWS) // TILE_ROWS
    across = padded(weight.k, TILE_COLUMNS) // TILE_COLUMNS
    words = TILE_ROWS * TILE_COLUMNS * scheme.weight_bits // 32
    _expect("codes", weight.codes, (down, across, words), (torch.int32,))
    if (weight.zeros is None) != scheme.symmetric:
        zeros = "no zero points" if scheme.symmetric else "zero points"
        _refuse("codes", weight.codes, f"{zeros}, which {weight.scheme} has")
    if weight.group_size == CHANNEL:
        _expect("scales", weight.scales, (down * TILE_ROWS,), (torch.float32,))
    else:
        groups = padded(weight.k, TILE_COLUMNS) // weight.group_size
        _expect("scales", weight.scales, (down, groups, 8, 2), (torch.float16,))
        if weight.zeros is not None:
            _expect("zeros", weight.zeros, (down, groups, 2), (torch.int32,))
    parts = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros}
    for name, tensor in parts.items():
        if tensor is not None and not tensor.is_contiguous():
            _refuse(name, tensor, "contiguous tiles")


def _known(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UsageError(
            "E2001",
            f"Unknown {what} {name!r}.",
            why=f"known: {', '.join(known)}",
            fix=f"use one of {', '.join(known)}",
        )


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        _refuse(name, tensor, f"{' or '.join(map(dtype_name, dtypes))} {shape}")


def _refuse(name: str, tensor: Tensor, wanted: str) -> NoReturn:
    raise FormatError(
        "E4102",
        f"{name} of a linear is {dtype_name(tensor.dtype)} {tuple(tensor.shape)} on {tensor.device}.",
        why=f"expected {wanted}",
        fix="make weights with device_weight(), in the dtype and on the device of the activations",
    )
