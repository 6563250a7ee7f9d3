"""Linears that round their activations: weights and rows that would show a mistake, and graphs of one of them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from mbq_export.schemes.base import PackedWeight
from tests.export.one_linear import one_node
from tests.schemes.integer_weights import random_q, weight_of


def normal(rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)


def ties(columns: int) -> NDArray[np.float32]:
    """Rows whose largest is 127, so that every half is a tie between two codes."""
    x = np.random.default_rng(5).integers(-253, 254, (4, columns)).astype(np.float32) / 2
    x[:, 3] = 127
    return x


def uneven(columns: int) -> NDArray[np.float32]:
    """Tokens of zeros, of almost nothing, with an outlier, and near the end of fp16."""
    x = normal(5, columns)
    x[0], x[1] = 0, x[1] * 1e-8
    x[2, 17] = 1e4
    x[3] *= 6e4 / np.abs(x[3]).max()
    return x


class Make(Protocol):
    """Makes a weight."""

    def __call__(self, group_size: int, bits: int = 4) -> PackedWeight:
        """Of this width, in groups or per channel."""


@dataclass(frozen=True)
class Rounded:
    """A weight and activations that would show a mistake."""

    name: str
    weight: Make
    x: NDArray[np.float32]


def codes(rows: int, columns: int) -> Make:
    return lambda group_size, bits=4: weight_of(
        random_q(rows, rows, columns, bits=bits), group_size=group_size, bits=bits
    )


def largest(group_size: int, bits: int = 4) -> PackedWeight:
    q = np.full((16, 256), -(2 ** (bits - 1)))
    return weight_of(q, group_size=group_size, bits=bits)


CASES = (
    Rounded("random", codes(48, 256), normal(9, 256)),
    Rounded("ties", codes(16, 128), ties(128)),
    Rounded("uneven tokens", codes(16, 256), uneven(256)),
    Rounded("each column alone", codes(16, 128), np.eye(128, dtype=np.float32)),
    Rounded("largest sums", largest, np.full((2, 256), 3, np.float32)),
    Rounded("an odd number of groups", codes(32, 896), normal(3, 896)),
)
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def lowered(weight: PackedWeight, lowering: str, **options: str) -> ir.Model:
    """A graph of one linear whose activations are rounded to 8 bits."""
    return one_node(weight, lowering=lowering, scheme=f"w{weight.bits}a8", **options)  # type: ignore[arg-type]
