"""Is the answer right? Asked at the shape that is timed, in the process that times it, before it is timed.

    dense_rows     codes, scales and zero points back to W, bit by bit, from where the layout says each bit lies
    expected       x W^T in float64; for int8 activations the exact integer sums
    wrong_answer   what is off, or nothing

The truth shares no code with any kernel: the places of bits come from ``mbq_export.schemes.layouts``. It runs on the
device of the weights, a block of rows at a time. Of many rows of x only `MOST_ROWS` are compared, and every element of y
must have been written: outputs begin as NaN.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.integers import LARGEST_ACTIVATION, SMALLEST_ABSMAX
from mbq_export.schemes.layouts import w3t, w4t
from mbq_export.schemes.layouts.tiles import INT8_FACTOR, TILE_COLUMNS, TILE_ROWS, kernel_layout_of
from mbq_kernels.bench.shapes import Shape
from mbq_kernels.comparison import Tolerance, difference
from mbq_kernels.weights import DeviceWeight

MOST_ROWS: Final = 64
"""Rows of x that are compared: rows do not see each other, and the first and last of a block are always among them."""
BLOCK_WEIGHTS: Final = 1 << 25
"""Weights that are unpacked at once, in float64."""
ZEROS_OF: Final = {"w3a16": 0x77777777, "w4a16": -1}
"""Masks that make any word of zero points legal."""
SMALLEST_EXPONENT, LARGEST_EXPONENT = -9.0, -6.0
PLACES: Final = {"w3t": w3t.place_of, "w4t": w4t.place_of}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The right answer at the compared rows.

    Attributes:
        rows: Rows of x.
        reference: (rows, N) float64.
        slack: (rows, N) float64, sum of |x| |w|.
        exact: (rows, N) in the dtype of x where only one answer is right, else None.
    """

    rows: list[int]
    reference: Tensor
    slack: Tensor
    exact: Tensor | None = None


def random_weight(
    shape: Shape, *, scheme: str, group_size: int, device: torch.device, seed: int
) -> DeviceWeight:
    """Draw a weight where it will lie: every bit pattern of codes is legal, so nothing needs packing.

    Args:
        shape: N a multiple of 16, K of 128: no padding.
        scheme: Name of a scheme.
        group_size: Columns per scale, `CHANNEL` for one per row.
        device: Where.
        seed: Equal seeds give equal weights on equal devices.
    """
    spec = SCHEMES[scheme]
    random = torch.Generator(device).manual_seed(seed)
    down, across = shape.n // TILE_ROWS, shape.k // TILE_COLUMNS
    words = TILE_ROWS * TILE_COLUMNS * spec.weight_bits // 32

    def bits(*size: int) -> Tensor:
        return torch.randint(
            -(2**31), 2**31, size, dtype=torch.int32, device=device, generator=random
        )

    def scales(*size: int) -> Tensor:
        exponents = torch.rand(size, device=device, generator=random)
        return torch.exp2(SMALLEST_EXPONENT + exponents * (LARGEST_EXPONENT - SMALLEST_EXPONENT))

    codes = bits(down, across, words)
    if group_size == CHANNEL:
        drawn, zeros = scales(shape.n) / INT8_FACTOR, None
    else:
        groups = shape.k // group_size
        drawn = scales(down, groups, 8, 2).to(torch.float16)
        zeros = None if spec.symmetric else bits(down, groups, 2) & ZEROS_OF[scheme]
    return DeviceWeight(
        scheme=scheme,
        n=shape.n,
        k=shape.k,
        group_size=group_size,
        codes=codes,
        scales=drawn,
        zeros=zeros,
        bias=None,
    )


@cache
def bit_places(layout: str) -> tuple[np.ndarray, np.ndarray]:
    """(16, 128, bits) word in the tile, and bit in the word, of every bit of every code."""
    bytes_and_bits = np.array(
        [[PLACES[layout](n, k) for k in range(TILE_COLUMNS)] for n in range(TILE_ROWS)]
    )
    byte, bit = bytes_and_bits[..., 0], bytes_and_bits[..., 1]
    return byte // 4, 8 * (byte % 4) + bit


def integer_rows(weight: DeviceWeight, first: int, last: int) -> Tensor:
    """Codes of row tiles ``first`` to ``last`` as signed integers u - z, or q: (rows, K) float64."""
    spec = SCHEMES[weight.scheme]
    tiles = weight.codes[first:last]
    words, shifts = (
        torch.from_numpy(places.reshape(-1, spec.weight_bits)).to(tiles.device)
        for places in bit_places(kernel_layout_of(spec).name)
    )
    codes = torch.zeros(*tiles.shape[:2], len(words), dtype=torch.int32, device=tiles.device)
    for bit in range(spec.weight_bits):
        codes |= ((tiles[..., words[:, bit]] >> shifts[:, bit].int()) & 1) << bit
    codes = codes.view(*tiles.shape[:2], TILE_ROWS, TILE_COLUMNS).transpose(1, 2)
    codes = codes.reshape(len(tiles) * TILE_ROWS, -1)
    if spec.symmetric:
        return torch.where(codes < spec.middle, codes, codes - spec.levels).double()
    assert weight.zeros is not None
    packed = weight.zeros[first:last].contiguous().view(torch.uint8)  # row tile, group, g
    zeros = torch.stack([packed & 15, packed >> 4], dim=1).transpose(
        2, 3
    )  # row tile, half, g, group
    zeros = zeros.reshape(len(codes), -1).repeat_interleave(weight.group_size, dim=1)
    return (codes - zeros.int()).double()


def scale_rows(weight: DeviceWeight, first: int, last: int) -> Tensor:
    """Scales of row tiles as (rows, G) float64; per channel (rows, 1)."""
    if weight.group_size == CHANNEL:
        rows = weight.scales[first * TILE_ROWS : last * TILE_ROWS, None].double()
        return rows * INT8_FACTOR
    tiles = weight.scales[first:last]  # row tile, group, g, half
    return tiles.permute(0, 3, 2, 1).reshape((last - first) * TILE_ROWS, -1).double()


def dense_rows(weight: DeviceWeight) -> Iterator[Tensor]:
    """W = (u - z) * s, a block of whole row tiles at a time: (rows, K) float64."""
    for first, last in _blocks(weight.n, weight.k):
        scales = scale_rows(weight, first, last)
        yield integer_rows(weight, first, last) * scales.repeat_interleave(
            weight.k // scales.shape[1], dim=1
        )


def _blocks(n: int, k: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_WEIGHTS // (k * TILE_ROWS))
    tiles = n // TILE_ROWS
    return ((first, min(first + step, tiles)) for first in range(0, tiles, step))


def compared_rows(m: int) -> list[int]:
    """All rows, or `MOST_ROWS` of them spread over all, the first and the last among them."""
    if m <= MOST_ROWS:
        return list(range(m))
    return sorted({round(i * (m - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)})


def expected(x: Tensor, blocks: Iterable[Tensor]) -> Expected:
    """Multiply the compared rows of x by W^T.

    Args:
        x: (M, K).
        blocks: W as (rows, K) float64, from the top down.
    """
    rows = compared_rows(len(x))
    seen = x[rows].double()
    parts = [(seen @ block.T, seen.abs() @ block.abs().T) for block in blocks]
    return Expected(
        rows=rows,
        reference=torch.cat([part for part, _ in parts], dim=1),
        slack=torch.cat([part for _, part in parts], dim=1),
    )


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) integers as float64 and (M, 1) float32 scales, as the format defines them."""
    wide = x.float()
    # A tensor, not a number: dividing by a number multiplies by its reciprocal.
    most = torch.full((1,), float(LARGEST_ACTIVATION), device=x.device)
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_ABSMAX) / most
    return torch.round(wide / scales).double(), scales


def expected_int8(x: Tensor, weight: DeviceWeight) -> Expected:
    """The answer of int8 activations: exact per channel, float64 sums of groups else."""
    rows = compared_rows(len(x))
    codes, scales = quantized_rows(x[rows])
    if weight.group_size != CHANNEL:
        effective = expected(codes * scales.double(), dense_rows(weight))
        return replace(effective, rows=rows)
    parts = []
    for first, last in _blocks(weight.n, weight.k):
        sums = (codes @ integer_rows(weight, first, last).T).float()
        parts.append(sums * scale_rows(weight, first, last).T.float() * scales)
    exact = torch.cat(parts, dim=1).to(x.dtype)
    return Expected(
        rows=rows, reference=exact.double(), slack=torch.zeros_like(exact).double(), exact=exact
    )


def wrong_answer(y: Tensor, answer: Expected, tolerance: Tolerance) -> str:
    """Say what is wrong with an output, or nothing.

    Args:
        y: (M, N), all rows.
        answer: For the compared rows.
        tolerance: Where no exact answer is known.
    """
    if y.shape[1] != answer.reference.shape[1]:
        return f"output has {y.shape[1]} columns, expected {answer.reference.shape[1]}"
    missing = int((~torch.isfinite(y)).sum())
    if missing:
        return f"{missing} of {y.numel()} outputs were not written or are no numbers"
    rows = y[answer.rows]
    if answer.exact is not None:
        differ = int((rows != answer.exact).sum())
        return f"{differ} of {rows.numel()} outputs differ in their bits" if differ else ""
    return difference(
        rows.double().cpu().numpy(),
        answer.reference.cpu().numpy(),
        slack=answer.slack.cpu().numpy(),
        tolerance=tolerance,
    )


def float_gate(
    blocks: Callable[[], Iterable[Tensor]], tolerance: Tolerance
) -> Callable[[Tensor, Tensor], str]:
    """A gate for anything that multiplies by a known W: (y, x) to what is wrong."""

    def wrong(y: Tensor, x: Tensor) -> str:
        return wrong_answer(y, expected(x, blocks()), tolerance)

    return wrong
