"""Rotary positions: tables made once in float64, one operator per use.

    angle[p, j] = p * theta ** (-2 j / D)        j = 0 .. D/2 - 1
    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)    halves of a head, not interleaved

RoFormer (Su et al. 2021), section 3.2.2, in the half-split order that Qwen2 and Llama use.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mbq_export.errors import FormatError
from mbq_export.export.graph import Emitter, dims_of
from mbq_export.families.base import TextShape


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

    def rotate(self, x: ir.Value, name: str) -> ir.Value:
        """Rotate (B, H, T, D) queries or keys."""
        out = self._g.value(f"{name}.out", dims_of(x))
        return self._g.op("RotaryEmbedding", [x, self._cos, self._sin, self._ids], out)
