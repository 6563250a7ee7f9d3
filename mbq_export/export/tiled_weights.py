"""Constants of the plugin form: a packed linear in the tiles that kernels read, made while it is written.

    checkpoint, row-major words ── some rows at a time ── `tiles.tile` ──► tiles of 16 x 128 codes

Stacked linears follow each other whole: every part but the last ends with a tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mbq_export.export.weights import PackedSource, StreamedTensor
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight, QuantScheme
from mbq_export.schemes.layouts.tiles import (
    TILE_COLUMNS,
    TILE_ROWS,
    TiledWeight,
    padded,
    tile,
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
    """INT32 codes in tiles."""
    scheme = SCHEMES[source.scheme]
    return _tensor(
        name, source, ir.DataType.INT32, tiles_shape(source.n, source.k, scheme=scheme), _codes
    )


def tiled_scales_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """FLOAT16 scales beside the tiles; per channel FLOAT, a sixteenth of each."""
    dtype = ir.DataType.FLOAT if source.group_size == CHANNEL else ir.DataType.FLOAT16
    shape = scales_shape(source.n, source.k, group_size=source.group_size)
    return _tensor(name, source, dtype, shape, lambda tiled: tiled.scales)


def tiled_zeros_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """INT32 zero points beside the tiles, two to a byte."""
    shape = zeros_shape(source.n, source.k, group_size=source.group_size)
    return _tensor(name, source, ir.DataType.INT32, shape, _zeros)


def _tensor(
    name: str,
    source: PackedSource,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    part: Callable[[TiledWeight], NDArray[Any]],
) -> StreamedTensor:
    return StreamedTensor(
        name, dtype=dtype, shape=shape, blocks=lambda: (part(rows) for rows in _tiled(source))
    )


def _codes(tiled: TiledWeight) -> NDArray[Any]:
    return tiled.codes


def _zeros(tiled: TiledWeight) -> NDArray[Any]:
    assert tiled.zeros is not None
    return tiled.zeros


def _tiled(source: PackedSource) -> Iterator[TiledWeight]:
    """Yield some rows of each linear after the other."""
    scheme = SCHEMES[source.scheme]
    for weight in source.weights():
        for start in range(0, weight.n, ROWS_AT_ONCE):
            yield tile(_rows(weight, start, scheme), scheme=scheme)


def _rows(weight: PackedWeight, start: int, scheme: QuantScheme) -> PackedWeight:
    """Rows of a weight without its bias, with zero points where the scheme has them."""
    rows = slice(start, start + ROWS_AT_ONCE)
    zeros = None if weight.zeros is None else weight.zeros[rows]
    if zeros is None and not scheme.symmetric:
        zeros = np.full(weight.scales[rows].shape, scheme.middle, np.uint8)
    return replace(
        weight, words=weight.words[rows], scales=weight.scales[rows], zeros=zeros, bias=None
    )
