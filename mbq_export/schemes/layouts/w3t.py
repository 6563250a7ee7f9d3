"""3-bit tiles: 768 bytes each, no bit wasted, read as one 16-byte and one 8-byte vector per lane.

    word of a lane, one triple of words = 16 slots:
        bit  0  3  6  9 12 15 16 19 22 25 28 31
             five codes, p = 0 |  five codes, p = 1 |
                            one bit of the 16th pair in each word

Slots 0..14 of a triple lie five to a word, in 3-bit fields of the half that p selects; slot 15 has bit e of its
code in bit 15 (p = 0) or 31 (p = 1) of word e. Coordinates are in `tiles`, the page is docs/formats/tiles.md.
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

BITS: Final = 3
LANE_WORDS: Final = 6
WIDE_WORDS: Final = 4
"""Words of a lane in the 16-byte vector; the other two follow in the 8-byte vector."""
TILE_WORDS: Final = LANES * LANE_WORDS
TILE_BYTES: Final = 4 * TILE_WORDS
FIELDS: Final = 5
"""3-bit fields in a 16-bit half; its last bit belongs to the spread pair."""
SPREAD: Final = 15
"""Slot of a triple whose code is spread over three words."""


def pack(codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint32]:
    """Pack codes into tiles.

    Args:
        codes: (N, K) uint8 below 8, N a multiple of 16 and K of 128.
        bits: 3.

    Returns:
        (N / 16, K / 128, 192) uint32.

    Raises:
        FormatError: E4102 for another width or shape, E4411 if a code does not fit.
    """
    check_tiles(codes, bits=bits, width=BITS)
    down, across = codes.shape[0] // TILE_ROWS, codes.shape[1] // TILE_COLUMNS
    pairs = (
        codes.reshape(down, 2, 8, across, 4, 4, 2, 2, 2)  # nt half g kt b t s h p
        .transpose(0, 3, 2, 5, 4, 6, 7, 1, 8)  # nt kt g t b s h half p
        .reshape(down, across, LANES, 2, 16, 2)  # nt kt lane triple slot p
        .astype(np.uint32)
    )
    words = np.zeros((down, across, LANES, 2, 3), np.uint32)
    for word in range(3):
        for p in range(2):
            for field in range(FIELDS):
                words[..., word] |= pairs[..., FIELDS * word + field, p] << (BITS * field + 16 * p)
            words[..., word] |= (pairs[..., SPREAD, p] >> word & 1) << (15 + 16 * p)
    lanes = words.reshape(down, across, LANES, LANE_WORDS)
    wide = lanes[..., :WIDE_WORDS].reshape(down, across, -1)
    return np.concatenate([wide, lanes[..., WIDE_WORDS:].reshape(down, across, -1)], axis=-1)


def unpack(words: NDArray[np.uint32], *, bits: int, columns: int) -> NDArray[np.uint8]:
    """Undo `pack`.

    Args:
        words: (N / 16, K / 128, 192) uint32.
        bits: 3.
        columns: K, a multiple of 128.

    Returns:
        (N, K) uint8.

    Raises:
        FormatError: E4102 for another shape.
    """
    check_words(words, bits=bits, width=BITS, columns=columns)
    down, across, _ = words.shape
    split = LANES * WIDE_WORDS
    lanes = np.concatenate(
        [
            words[..., :split].reshape(down, across, LANES, WIDE_WORDS),
            words[..., split:].reshape(down, across, LANES, LANE_WORDS - WIDE_WORDS),
        ],
        axis=-1,
    ).reshape(down, across, LANES, 2, 3)
    pairs = np.zeros((down, across, LANES, 2, 16, 2), np.uint8)
    for word in range(3):
        for p in range(2):
            for field in range(FIELDS):
                pairs[..., FIELDS * word + field, p] = (
                    lanes[..., word] >> (BITS * field + 16 * p) & 7
                )
            pairs[..., SPREAD, p] |= (lanes[..., word] >> (15 + 16 * p) & 1).astype(
                np.uint8
            ) << word
    return (
        pairs.reshape(down, across, 8, 4, 4, 2, 2, 2, 2)  # nt kt g t b s h half p
        .transpose(0, 7, 2, 1, 4, 3, 5, 6, 8)  # nt half g kt b t s h p
        .reshape(down * TILE_ROWS, across * TILE_COLUMNS)
    )


def place_of(n: int, k: int) -> list[tuple[int, int]]:
    """Return (byte, bit) in the tile of each bit of the code of row n and column k, lowest bit first."""
    at = coordinates(n, k)
    triple, slot = divmod(at.slot, 16)
    if slot == SPREAD:
        places = [(3 * triple + e, 16 * at.p + 15) for e in range(BITS)]
    else:
        word, field = divmod(slot, FIELDS)
        places = [(3 * triple + word, 16 * at.p + BITS * field + e) for e in range(BITS)]
    return [(_address(at.lane, word) + bit // 8, bit % 8) for word, bit in places]


def _address(lane: int, word: int) -> int:
    """First byte in the tile of a word of a lane."""
    if word < WIDE_WORDS:
        return 4 * (WIDE_WORDS * lane + word)
    narrow = LANE_WORDS - WIDE_WORDS
    return 4 * (LANES * WIDE_WORDS + narrow * lane + word - WIDE_WORDS)


LAYOUT: Final = Layout(name="w3t", version=1, pack=pack, unpack=unpack)
