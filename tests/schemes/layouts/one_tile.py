"""What the tests of the tile layouts share: the golden tile, and reading a tile bit by bit."""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

PlaceOf = Callable[[int, int], list[tuple[int, int]]]

MODEL_COLUMNS: Final = (896, 3584, 4096, 4864, 8192, 11008, 18944, 29568)
"""in_features of the linears of real models; 896 and 29568 are no multiples of 256."""

FILLS: Final = {
    "zeros": lambda n, k, top: np.zeros((n, k), np.uint8),
    "largest": lambda n, k, top: np.full((n, k), top, np.uint8),
    "alternating": lambda n, k, top: (np.indices((n, k)).sum(0) % 2 * top).astype(np.uint8),
    "one bit": lambda n, k, top: (1 << np.indices((n, k)).sum(0) % top.bit_length()).astype(
        np.uint8
    ),
}
"""Codes that a wrong mask, shift or sign would show in: by name, (N, K) of the largest code."""


def golden_tile(bits: int) -> NDArray[np.uint8]:
    n, k = np.mgrid[:16, :128]
    return ((7 * n + 5 * k + k // 8 * n) % 2**bits).astype(np.uint8)


def random_codes(seed: int, *, bits: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint8)


def read_code(tile: bytes, place_of: PlaceOf, n: int, k: int) -> int:
    """The code of one element, picked out of the bytes one bit at a time."""
    return sum((tile[byte] >> bit & 1) << e for e, (byte, bit) in enumerate(place_of(n, k)))


def every_place(place_of: PlaceOf) -> list[tuple[int, int]]:
    return [place for n in range(16) for k in range(128) for place in place_of(n, k)]
