"""Which linears are timed: shapes of real decoders, rows of activations, and the suites made of both."""

from dataclasses import dataclass
from typing import Final

from mbq_export.errors import UsageError

ROW_STEP: Final = 16
COLUMN_STEP: Final = 128
"""Shapes are whole tiles: padding would blur what a byte costs. 128 is also the group size that is timed."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Shape:
    """One linear.

    Attributes:
        n: Output features.
        k: Input features, a multiple of 128.
    """

    n: int
    k: int

    @property
    def name(self) -> str:
        """``18944x3584``, N first."""
        return f"{self.n}x{self.k}"

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.n * self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The linears of one decoder block, q|k|v and gate|up fused, and how many blocks there are."""

    name: str
    layers: int
    linears: tuple[Shape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What one run times.

    Attributes:
        name: ``short``, ``full``, ``rehearsal`` or ``chosen``.
        shapes: Linears.
        rows: Values of M.
        few_rows: Values of M for those who are there for comparison only; empty for all.
        largest_head_rows: M up to which the head is timed: a decoder computes logits of few positions.
    """

    name: str
    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    few_rows: tuple[int, ...] = ()
    largest_head_rows: int = 64

    def problems(self) -> list[tuple[Shape, int]]:
        """Every (shape, M), shape by shape."""
        return [
            (shape, m)
            for shape in self.shapes
            for m in self.rows
            if shape != HEAD or m <= self.largest_head_rows
        ]


def _shapes(*sizes: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(Shape(n=n, k=k) for n, k in sizes)


HEAD: Final = Shape(n=152064, k=3584)
OUTPUT, QKV, GATE_OR_UP, GATE_UP, DOWN = _shapes(
    (3584, 3584), (4608, 3584), (18944, 3584), (37888, 3584), (3584, 18944)
)
LLAVA_OV_7B: Final = Block(
    name="LLaVA-OV-7B class", layers=28, linears=(QKV, OUTPUT, GATE_UP, DOWN)
)
SHORT: Final = Suite(
    name="short", shapes=(OUTPUT, QKV, GATE_OR_UP, GATE_UP, DOWN), rows=(1, 8, 512)
)
FULL: Final = Suite(
    name="full",
    shapes=(*SHORT.shapes, *_shapes((4096, 4096), (11008, 4096), (4096, 11008)), HEAD),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    few_rows=(1, 8, 16, 64, 512, 2048),
)
REHEARSAL: Final = Suite(name="rehearsal", shapes=_shapes((64, 256), (96, 384)), rows=(1, 8, 17))
REHEARSAL_BLOCK: Final = Block(
    name="two tiny blocks", layers=2, linears=_shapes((64, 256), (256, 128))
)
SUITES: Final = {suite.name: suite for suite in (SHORT, FULL)}


def shapes_of(text: str) -> tuple[Shape, ...]:
    """Read ``3584x3584,18944x3584``, N before K.

    Raises:
        UsageError: E2003 for anything else, or a K that is not timed.
    """
    found = []
    for word in text.split(","):
        n, _, k = word.strip().partition("x")
        sizes = [int(size) if size.isdecimal() else 0 for size in (n, k)]
        if not all(sizes) or sizes[0] % ROW_STEP or sizes[1] % COLUMN_STEP:
            raise UsageError(
                "E2003",
                f"{word.strip()!r} is no shape of a linear.",
                why=f"a shape is NxK, output before input features, N a multiple of {ROW_STEP} and K of {COLUMN_STEP}",
                fix="--shapes 3584x3584,18944x3584",
            )
        found.append(Shape(n=sizes[0], k=sizes[1]))
    return tuple(dict.fromkeys(found))
