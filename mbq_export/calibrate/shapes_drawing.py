"""Small pictures with known content: coloured shapes and handwritten digits on a 3 x 3 grid.

    cell numbers        words
      0 | 1 | 2         top left    | top    | top right
      3 | 4 | 5         left        | center | right
      6 | 7 | 8         bottom left | bottom | bottom right

A cell is 16 x 16 pixels, a picture 48 x 48. One to six cells hold a thing: one of six shapes,
or a real 8 x 8 handwritten digit (UCI "optical recognition of handwritten digits", as packaged
by scikit-learn; see the NOTICE file), enlarged to the cell.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CELL: Final = 16
GRID: Final = 3
SIZE: Final = CELL * GRID
COLORS: Final = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (225, 200, 30),
    "purple": (150, 50, 180),
    "cyan": (40, 190, 200),
}
SHAPES: Final = ("circle", "square", "triangle", "diamond", "cross", "star")
DIGITS: Final = tuple(str(digit) for digit in range(10))
KINDS: Final = SHAPES + DIGITS
POSITIONS: Final = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
OBJECT_WEIGHTS: Final = (1, 2, 3, 3, 2, 1)
"""Relative frequency of scenes with 1, 2, ... 6 things."""

HELD_OUT_DIGITS: Final = 450
DIGIT_SHUFFLE: Final = 7
DIGIT_COPIES: Final = 4
SHAPE_SHARE: Final = 0.62
COLOR_JITTER: Final = 18
NOISE_SIGMA: Final = 6
SUPERSAMPLING: Final = 4

Mask = NDArray[np.float32]
T = TypeVar("T")


class Dice:
    """Random choices that NumPy promises never to change: only `RandomState` doubles are used.

    `random.choice` and `Generator` may pick differently in a later release, and every scene of
    the training and evaluation sets is named by nothing but its number.
    """

    def __init__(self, number: int) -> None:
        """Start the stream that belongs to `number`, in [0, 2**32)."""
        self._stream = np.random.RandomState(number)

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * float(self._stream.random_sample())

    def chance(self, probability: float) -> bool:
        """Return true with this probability."""
        return float(self._stream.random_sample()) < probability

    def pick(self, items: Sequence[T]) -> T:
        """Return one item, each as likely."""
        return items[int(self._stream.random_sample() * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """Return one item, as likely as its weight says."""
        left = self.uniform(0.0, math.fsum(weights))
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` different items in random order."""
        pool = list(items)
        return [pool.pop(int(self._stream.random_sample() * len(pool))) for _ in range(count)]

    def shuffled(self, count: int) -> NDArray[np.int64]:
        """Return 0 .. count-1 in random order."""
        return self._stream.permutation(count).astype(np.int64)

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return standard normal float32 numbers of this shape."""
        return self._stream.standard_normal(shape).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One shape or digit in a picture.

    Attributes:
        cell: 0 (top left) to 8 (bottom right).
        color: A name out of `COLORS`.
        kind: A name out of `KINDS`; digits are "0" to "9".
    """

    cell: int
    color: str
    kind: str

    @property
    def is_digit(self) -> bool:
        """True for a handwritten digit, false for a drawn shape."""
        return self.kind.isdigit()


@cache
def handwriting() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the bundled digits: (1797, 8, 8) uint8 ink in [0, 16], and (1797,) uint8 labels."""
    raw = files("mbq_export.calibrate").joinpath("digits.npy").read_bytes()
    table = np.load(BytesIO(raw), allow_pickle=False)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64]


def digit_split() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices into `handwriting`: 1,347 for training and calibration, 450 held out."""
    order = Dice(DIGIT_SHUFFLE).shuffled(len(handwriting()[1]))
    return order[HELD_OUT_DIGITS:], order[:HELD_OUT_DIGITS]


@cache
def shape_masks() -> dict[str, list[Mask]]:
    """Return, per shape, 25 coverage masks (16, 16) in [0, 1]: five sizes by five rotations."""
    return {
        shape: [
            _shape_mask(shape, size, turn)
            for size in (10, 11, 12, 13, 14)
            for turn in (-8, -4, 0, 4, 8)
        ]
        for shape in SHAPES
    }


@cache
def digit_masks(*, held_out: bool) -> dict[str, list[Mask]]:
    """Return, per digit, coverage masks (16, 16) in [0, 1].

    Args:
        held_out: True for the 450 evaluation digits as they are; false for the 1,347 others,
            each with four copies turned by up to 12 degrees and scaled by 0.88 to 1.12.
    """
    pixels, labels = handwriting()
    masks: dict[str, list[Mask]] = {digit: [] for digit in DIGITS}
    dice = Dice(DIGIT_SHUFFLE + 1)
    for index in digit_split()[1 if held_out else 0]:
        copies = masks[str(labels[index])]
        copies.append(_digit_mask(pixels[index], turn=0.0, scale=1.0))
        for _ in range(0 if held_out else DIGIT_COPIES):
            turn, scale = dice.uniform(-12, 12), dice.uniform(0.88, 1.12)
            copies.append(_digit_mask(pixels[index], turn=turn, scale=scale))
    return masks


def draw_things(dice: Dice, weights: Sequence[float] = OBJECT_WEIGHTS) -> tuple[Thing, ...]:
    """Choose 1 to 6 things for different cells, in reading order."""
    count = dice.weighted(range(1, 7), weights)
    cells = sorted(dice.several(range(GRID * GRID), count))
    colors = tuple(COLORS)
    return tuple(
        Thing(
            cell=cell,
            kind=dice.pick(SHAPES if dice.chance(SHAPE_SHARE) else DIGITS),
            color=dice.pick(colors),
        )
        for cell in cells
    )


def render(dice: Dice, things: Sequence[Thing], *, held_out: bool) -> NDArray[np.uint8]:
    """Paint things on a dark or light ground, each a little off its colour and cell, with noise.

    Args:
        dice: Where ground, jitter, masks and noise come from.
        things: What to paint.
        held_out: Take digits from the evaluation handwriting.

    Returns:
        (48, 48, 3) uint8.
    """
    ground = dice.uniform(0, 60) if dice.chance(0.5) else dice.uniform(195, 250)
    picture = np.full((SIZE, SIZE, 3), ground, np.float32)
    for thing in things:
        masks = digit_masks(held_out=held_out) if thing.is_digit else shape_masks()
        mask = dice.pick(masks[thing.kind])
        mask = np.roll(mask, (dice.pick((-1, 0, 1)), dice.pick((-1, 0, 1))), (0, 1))[..., None]
        jitter = [dice.uniform(-COLOR_JITTER, COLOR_JITTER) for _ in range(3)]
        color = np.array(COLORS[thing.color], np.float32) + np.array(jitter, np.float32)
        top, left = thing.cell // GRID * CELL, thing.cell % GRID * CELL
        patch = picture[top : top + CELL, left : left + CELL]
        patch[:] = patch * (1 - mask) + color * mask
    picture += dice.normal(picture.shape) * NOISE_SIGMA
    return np.clip(picture, 0, 255).astype(np.uint8)


def _shape_mask(shape: str, size: float, turn: float) -> Mask:
    """Draw one shape `size` pixels wide, four times too large, turn it and shrink it."""
    width = CELL * SUPERSAMPLING
    canvas = Image.new("L", (width, width), 0)
    pen = ImageDraw.Draw(canvas)
    middle, radius = width / 2, size * SUPERSAMPLING / 2

    def box(across: float, down: float) -> list[float]:
        return [middle - across, middle - down, middle + across, middle + down]

    if shape == "circle":
        pen.ellipse(box(radius, radius), fill=255)
    elif shape == "square":
        pen.rectangle(box(radius * 0.88, radius * 0.88), fill=255)
    elif shape == "cross":
        pen.rectangle(box(radius * 0.38, radius), fill=255)
        pen.rectangle(box(radius, radius * 0.38), fill=255)
    else:
        pen.polygon(
            [(middle + x * radius, middle + y * radius) for x, y in _corners(shape)], fill=255
        )
    turned = canvas.rotate(turn, resample=Image.Resampling.BILINEAR)
    return _coverage(turned.resize((CELL, CELL), Image.Resampling.LANCZOS))


def _corners(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a polygon in units of its radius, y downwards."""
    if shape == "diamond":
        return [(0, -1), (1, 0), (0, 1), (-1, 0)]
    if shape == "triangle":
        return [(0, -1), (1, 0.85), (-1, 0.85)]
    angles = [point * math.pi / 5 - math.pi / 2 for point in range(10)]
    reach = [1.0, 0.42] * 5
    return [
        (r * math.cos(angle), r * math.sin(angle)) for r, angle in zip(reach, angles, strict=True)
    ]


def _digit_mask(ink: NDArray[np.uint8], *, turn: float, scale: float) -> Mask:
    """Enlarge (8, 8) ink in [0, 16] to about 14 pixels and centre it in a cell."""
    width = max(8, min(CELL, round(14 * scale)))
    digit = Image.fromarray((ink / 16 * 255).astype(np.uint8))
    canvas = Image.new("L", (CELL, CELL), 0)
    corner = (CELL - width) // 2
    canvas.paste(digit.resize((width, width), Image.Resampling.BICUBIC), (corner, corner))
    return _coverage(canvas.rotate(turn, resample=Image.Resampling.BILINEAR) if turn else canvas)


def _coverage(image: Image.Image) -> Mask:
    return np.asarray(image, np.float32) / np.float32(255)
