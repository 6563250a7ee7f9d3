"""Constants of the plugin form: a packed linear in the tiles that kernels read, made while it is written.

    checkpoint, row-major words ── some rows at a time ── `tiles.tile` ──► tiles of 16 x 128 codes

Stacked linears follow each other whole: every part but the last ends with a tile.
"""

from dataclasses import replace
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mbq_export.export.weights import PackedSource, StreamedTensor
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight, QuantScheme
from mbq_export.schemes.layouts.tiles import (
    TILE_COLUMNS,
    TILE_ROWS,
    padded,
    tile,
    tiled_scales,
    tiled_zeros,
)

ROWS_AT_ONCE: Final = 1024
"""Whole tiles; packing takes about twelve bytes per weight of these rows."""


def tile_words(scheme: QuantScheme) -> int:
    """32-bit words of a tile."""
    return TILE_ROWS * TILE_COLUMNS * scheme.weight_bits // 32


def tiles_shape(n: int, k: int, *, scheme: QuantScheme) -> tuple[int, int, int]:
    """Sizes of the codes: (Np / 16, Kp / 128, words of a tile)."""
    return (-(-n // TILE_ROWS), -(-k // TILE_COLUMNS), tile_words(scheme))


def scales_shape(n: int, k: int, *, group_size: int) -> tuple[int, ...]:
    """Sizes of the scales: (Np / 16, Kp / G, 8, 2), per channel (Np,)."""
    if group_size == CHANNEL:
        return (padded(n, TILE_ROWS),)
    return (*zeros_shape(n, k, group_size=group_size)[:2], TILE_ROWS // 2, 2)


def zeros_shape(n: int, k: int, *, group_size: int) -> tuple[int, int, int]:
    """Sizes of the zero points: (Np / 16, Kp / G, 2)."""
    return (-(-n // TILE_ROWS), padded(k, TILE_COLUMNS) // group_size, 2)


def tiles_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """INT32 codes in tiles, some rows at a time."""
    scheme = SCHEMES[source.scheme]
    return StreamedTensor(
        name,
        dtype=ir.DataType.INT32,
        shape=tiles_shape(source.n, source.k, scheme=scheme),
        blocks=lambda: (
            tile(_rows(weight, start, scheme), scheme=scheme).codes
            for weight in source.weights()
            for start in range(0, weight.n, ROWS_AT_ONCE)
        ),
    )


def tiled_scales_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """FLOAT16 scales beside the tiles; per channel FLOAT, a sixteenth of each."""
    return StreamedTensor(
        name,
        dtype=ir.DataType.FLOAT if source.group_size == CHANNEL else ir.DataType.FLOAT16,
        shape=scales_shape(source.n, source.k, group_size=source.group_size),
        blocks=lambda: (tiled_scales(weight) for weight in source.weights()),
    )


def tiled_zeros_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """INT32 zero points beside the tiles, two to a byte."""
    return StreamedTensor(
        name,
        dtype=ir.DataType.INT32,
        shape=zeros_shape(source.n, source.k, group_size=source.group_size),
        blocks=lambda: (
            tiled_zeros(_zeros(weight, source.middle), weight) for weight in source.weights()
        ),
    )


def _rows(weight: PackedWeight, start: int, scheme: QuantScheme) -> PackedWeight:
    """Rows of a weight without its bias, with zero points where the scheme has them."""
    rows = slice(start, start + ROWS_AT_ONCE)
    zeros = None if scheme.symmetric else _zeros(weight, scheme.middle)[rows]
    return replace(
        weight, words=weight.words[rows], scales=weight.scales[rows], zeros=zeros, bias=None
    )


def _zeros(weight: PackedWeight, middle: int) -> NDArray[np.uint8]:
    """(N, G) zero points, also of codes that were rounded without any."""
    if weight.zeros is None:
        return np.full(weight.scales.shape, middle, np.uint8)
    return weight.zeros
