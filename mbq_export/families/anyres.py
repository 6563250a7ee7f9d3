"""Any resolution: a picture as a grid of tiles, and its features as rows of tokens.

      picture 300 x 900          canvas 384 x 1152        tokens, padding cut
      ┌────────────────┐         ┌────┬────┬────┐         ┌──────────────┬─┐
      │                │   ──►   │    │    │    │   ──►   │ 27 x 81      │n│  n = newline,
      └────────────────┘         └────┴────┴────┘         └──────────────┴─┘  one per row

Source: "LLaVA-OneVision: Easy Visual Task Transfer", section 3.2. A grid with more tokens than
``most_tiles`` tiles hold is shrunk bilinearly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import FormatError

SLACK: Final = 1.1
"""Grids at most this many times too long on a side are left as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyResolution:
    """How a model lays pictures out.

    Attributes:
        side: Patches along one side of a tile.
        tile: Pixels along one side of a tile.
        pinpoints: Canvases (height, width) in pixels to choose from.
        most_tiles: Tiles' worth of tokens above which the grid is shrunk.
    """

    side: int
    tile: int
    pinpoints: Sequence[Sequence[int]]
    most_tiles: int


def pack_grid(
    tiles: NDArray[np.floating],
    size: tuple[int, int],
    newline: NDArray[np.floating],
    layout: AnyResolution,
) -> NDArray[np.floating]:
    """Lay tiles out as one picture, cut the padding, shrink it if it is too large, end its rows.

    Args:
        tiles: (rows * columns, side * side, hidden) of the grid, row by row.
        size: Height and width of the picture in pixels.
        newline: (hidden,).
        layout: How the model lays pictures out.

    Returns:
        (rows of tokens * (columns + 1), hidden).

    Raises:
        FormatError: E4307 for a picture so thin that the grid holds nothing but padding.
    """
    side, width = layout.side, tiles.shape[-1]
    best = best_resolution(size, layout.pinpoints)
    rows, columns = best[0] // layout.tile, best[1] // layout.tile
    picture = (
        tiles.reshape(rows, columns, side, side, width)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * side, columns * side, width)
    )
    picture = _unpadded(picture, size)
    high, wide = picture.shape[:2]
    ratio = math.sqrt(high * wide / (layout.most_tiles * side**2))
    if ratio > SLACK:
        high, wide = int(high // ratio), int(wide // ratio)
    if not high * wide:
        raise FormatError(
            "E4307",
            f"A picture of {size[1]} x {size[0]} pixels is too thin.",
            why="laid on a grid of tiles, no whole row or column of patches is left of it",
            fix="crop or pad the picture",
        )
    if ratio > SLACK:
        picture = bilinear(picture, (high, wide))
    ends = np.broadcast_to(newline.astype(tiles.dtype), (picture.shape[0], 1, width))
    packed = np.concatenate([picture, ends], axis=1)
    return packed.reshape(packed.shape[0] * packed.shape[1], width)


def best_resolution(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Choose the canvas that keeps most of a picture and, among equals, wastes least.

    Args:
        size: Height and width of the picture.
        pinpoints: Heights and widths to choose from; the first of equals wins.
    """

    def merit(canvas: Sequence[int]) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - canvas[0] * canvas[1]

    height, width = max(pinpoints, key=merit)
    return height, width


def _unpadded(picture: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.floating]:
    """Cut the rows or columns that only hold padding, equally on both sides."""
    (height, width), (high, wide) = size, picture.shape[:2]
    if width / height > wide / high:
        margin = (high - int(round(height * (wide / width), 7))) // 2
        return picture[margin : high - margin]
    margin = (wide - int(round(width * (high / height), 7))) // 2
    return picture[:, margin : wide - margin]


def bilinear(picture: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.floating]:
    """Resize (height, width, channels) as torch's ``interpolate(mode="bilinear")`` does.

    Pixel centres are aligned, edges repeat, and nothing is averaged when shrinking. Computes in float32.
    Equal to torch up to rounding, not bit for bit: torch's own code for different CPUs disagrees by 1.5e-5
    on standard normal features.
    """
    result = picture.astype(np.float32)
    for axis in (1, 0):
        lower, upper, weight = _taps(picture.shape[axis], size[axis])
        weight = np.expand_dims(weight, tuple(range(1, result.ndim - axis)))
        result = np.take(result, lower, axis) * (1 - weight) + np.take(result, upper, axis) * weight
    return result.astype(picture.dtype)


def _taps(
    length: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return, for each output, the two inputs it lies between and the weight of the second."""
    # Places in float64: in float32 a place near 80 is off by 5e-6, and with it the weight.
    scale = np.float64(np.float32(length) / np.float32(count))
    place = np.maximum((np.arange(count) + 0.5) * scale - 0.5, 0.0)
    lower = np.minimum(place.astype(np.int64), length - 1)
    return lower, np.minimum(lower + 1, length - 1), (place - lower).astype(np.float32)
