"""Rotary positions: tables made once in float64; one operator per use, or its arithmetic where the op level has none.

    angle[p, j] = p * theta ** (-2 j / D)        j = 0 .. D/2 - 1
    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)    halves of a head, not interleaved

RoFormer (Su et al. 2021), section 3.2.2, in the half-split order that Qwen2 and Llama use.
"""

from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mbq_export.errors import FormatError
from mbq_export.export.graph import Emitter, dims_of
from mbq_export.export.primitives import rows_by_position, spelled_rotation
from mbq_export.families.base import TextShape

ROTARY: Final = "RotaryEmbedding"


def angles(shape: TextShape, positions: int) -> NDArray[np.float64]:
    """(positions, D/2) angles in radians."""
    frequency = shape.rope_theta ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    return np.outer(np.arange(positions), frequency)


class Rotary:
    """The tables of one graph, shared by all layers."""

    def __init__(self, g: Emitter, shape: TextShape, *, positions: int, ids: ir.Value) -> None:
        """Put the tables into the graph.

        Args:
            g: The graph.
            shape: Sizes of the decoder.
            positions: Rows of the tables, the largest position plus one.
            ids: (B, T) INT64 positions.

        Raises:
            FormatError: E4005 if the family's positions are of another kind.
        """
        if shape.rope != "1d":
            raise FormatError(
                "E4005",
                f"Positions of kind {shape.rope!r} cannot be exported.",
                why="graphs are written for one position per token",
                fix="use a model with plain rotary positions",
            )
        table = angles(shape, positions)
        dtype: Any = g.dtype.numpy()
        self._g = g
        self._ids = ids
        self._cos = g.numbers("rope.cos", np.cos(table).astype(dtype))
        self._sin = g.numbers("rope.sin", np.sin(table).astype(dtype))
        self._turn: tuple[ir.Value, ir.Value] | None = None
        if not g.has(ROTARY):
            self._turn = (
                rows_by_position(g, self._cos, ids, "rope.cos"),
                rows_by_position(g, self._sin, ids, "rope.sin"),
            )

    def rotate(self, x: ir.Value, name: str) -> ir.Value:
        """Rotate (B, H, T, D) queries or keys."""
        out = self._g.value(f"{name}.out", dims_of(x))
        if self._turn is not None:
            return spelled_rotation(self._g, x, out, name=name, turn=self._turn)
        return self._g.op(ROTARY, [x, self._cos, self._sin, self._ids], out)
