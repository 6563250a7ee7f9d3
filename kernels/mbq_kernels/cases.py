"""The lists of cases that kernels are tested with: everything that is special, one thing at a time."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch

from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_kernels.testing import Case, Epilogue, Kind

DTYPES: Final = (torch.float16, torch.bfloat16)
ROWS: Final = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33)
"""Every skinny size, the first past it, and both sides of a 16-row step."""
SHAPES: Final = ((16, 128), (32, 896), (24, 256), (40, 128), (1, 256), (72, 384))
"""(N, K): one tile, many k-tiles, and N that is no multiple of 16."""


def ragged_columns(group_size: int) -> tuple[int, ...]:
    """K that is no multiple of 128 but one of the group size and of 8."""
    return {CHANNEL: (8, 136, 200), 32: (32, 160), 64: (64, 192)}.get(group_size, ())


def adversarial_cases(scheme: str, dtype: torch.dtype) -> Iterator[Case]:
    """Every kind of value, row count, shape and group size of a scheme: some forty cases."""
    base = Case(scheme=scheme, dtype=dtype, m=3, n=48, k=256, group_size=SCHEMES[scheme].group_size)
    for kind in Kind:
        yield replace(base, kind=kind, bias=kind in {Kind.ZEROS, Kind.OUTLIERS})
    yield replace(base, m=8, n=16, k=128, kind=Kind.ONE_HOT)
    for m in ROWS:
        yield replace(base, m=m, n=32)
    for n, k in SHAPES:
        yield replace(base, n=n, k=k, bias=n % 16 != 0)
    for group_size in SCHEMES[scheme].group_sizes:
        yield replace(base, group_size=group_size, bias=True)
        yield replace(base, group_size=group_size, m=17, kind=Kind.NOT_A_NUMBER)
        for k in ragged_columns(group_size):
            yield replace(base, group_size=group_size, k=k)
            yield replace(base, group_size=group_size, k=k, m=9, n=40, bias=True)


def epilogue_cases(scheme: str, dtype: torch.dtype) -> Iterator[Case]:
    """Residual and silu-mul, which the CUDA kernels fuse and the Triton kernels do not."""
    base = Case(scheme=scheme, dtype=dtype, m=3, n=64, k=256, group_size=SCHEMES[scheme].group_size)
    for m in (1, 3, 8, 9, 17):
        yield replace(base, m=m, residual=True)
        yield replace(base, m=m, residual=True, bias=True, n=24)
        yield replace(base, m=m, epilogue=Epilogue.SILU_MUL)
        yield replace(base, m=m, epilogue=Epilogue.SILU_MUL, bias=True)
    yield replace(base, epilogue=Epilogue.SILU_MUL, kind=Kind.MIN_CODES)
