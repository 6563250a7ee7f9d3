"""4-bit tiles: 1024 bytes each, read as two 16-byte vectors per lane.

    word 2*b + half of a lane = its eight columns of block b, row g + 8*half
        byte   0    1    2    3
        high   0    2    1    3        column 0..3 of the eight (s = 0)
        low    4    6    5    7        column 4..7 of the eight (s = 1)

So ``w & 0xF0F0F0F0`` and ``(w << 4) & 0xF0F0F0F0`` are int8 registers that hold 16 * q, and
``(w >> {4, 12, 0, 8}) & 0x000F000F`` are pairs in the order of the columns. The nibble is stored as given: the code u
of w4a16, the two's complement of q for w4a8. Coordinates are in `tiles`, the page is docs/formats/tiles.md.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.schemes.layouts.base import Layout
from mbq_export.schemes.layouts.tiles import (
    LANES,
    TILE_COLUMNS,
    TILE_ROWS,
    check_tiles,
    check_words,
    coordinates,
)

BITS: Final = 4
LANE_WORDS: Final = 8
VECTOR_WORDS: Final = 4
TILE_WORDS: Final = LANES * LANE_WORDS
TILE_BYTES: Final = 4 * TILE_WORDS
ORDER: Final = (0, 2, 1, 3)
"""Byte j of four consecutive columns is column ``ORDER[j]``; its own inverse."""

# Bit of the nibble of columns 0..7 in their word.
_SHIFTS: Final = tuple(8 * ORDER[column % 4] + 4 * (1 - column // 4) for column in range(8))


def pack(codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint32]:
    """Pack codes into tiles.

    Args:
        codes: (N, K) uint8 below 16, N a multiple of 16 and K of 128.
        bits: 4.

    Returns:
        (N / 16, K / 128, 256) uint32.

    Raises:
        FormatError: E4102 for another width or shape, E4411 if a code does not fit.
    """
    check_tiles(codes, bits=bits, width=BITS)
    down, across = codes.shape[0] // TILE_ROWS, codes.shape[1] // TILE_COLUMNS
    columns = (
        codes.reshape(down, 2, 8, across, 2, 2, 4, 8)  # nt half g kt plane block t column
        .transpose(0, 3, 4, 2, 6, 5, 1, 7)  # nt kt plane g t block half column
        .reshape(down, across, TILE_WORDS, 8)
        .astype(np.uint32)
    )
    words = np.zeros((down, across, TILE_WORDS), np.uint32)
    for column, shift in enumerate(_SHIFTS):
        words |= columns[..., column] << shift
    return words


def unpack(words: NDArray[np.uint32], *, bits: int, columns: int) -> NDArray[np.uint8]:
    """Undo `pack`.

    Args:
        words: (N / 16, K / 128, 256) uint32.
        bits: 4.
        columns: K, a multiple of 128.

    Returns:
        (N, K) uint8.

    Raises:
        FormatError: E4102 for another shape.
    """
    check_words(words, bits=bits, width=BITS, columns=columns)
    down, across, _ = words.shape
    codes = np.stack([words >> shift & 15 for shift in _SHIFTS], axis=-1).astype(np.uint8)
    return (
        codes.reshape(down, across, 2, 8, 4, 2, 2, 8)  # nt kt plane g t block half column
        .transpose(0, 6, 3, 1, 2, 5, 4, 7)  # nt half g kt plane block t column
        .reshape(down * TILE_ROWS, across * TILE_COLUMNS)
    )


def place_of(n: int, k: int) -> list[tuple[int, int]]:
    """Return (byte, bit) in the tile of each bit of the code of row n and column k, lowest bit first."""
    at = coordinates(n, k)
    plane, word = divmod(2 * at.b + at.half, VECTOR_WORDS)
    byte = 4 * (VECTOR_WORDS * (LANES * plane + at.lane) + word) + ORDER[2 * at.h + at.p]
    return [(byte, 4 * (1 - at.s) + e) for e in range(BITS)]


LAYOUT: Final = Layout(name="w4t", version=1, pack=pack, unpack=unpack)
