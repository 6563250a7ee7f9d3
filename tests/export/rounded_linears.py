"""Linears that round their activations: weights and rows that would show a mistake, and graphs of one of them."""

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Rounded:
    """A weight and activations that would show a mistake."""

    name: str
    weight: Callable[[int], PackedWeight]
    x: NDArray[np.float32]


def codes(rows: int, columns: int) -> Callable[[int], PackedWeight]:
    return lambda group_size: weight_of(random_q(rows, rows, columns), group_size=group_size)


CASES = (
    Rounded("random", codes(48, 256), normal(9, 256)),
    Rounded("ties", codes(16, 128), ties(128)),
    Rounded("uneven tokens", codes(16, 256), uneven(256)),
    Rounded("each column alone", codes(16, 128), np.eye(128, dtype=np.float32)),
    Rounded(
        "largest sums",
        lambda group_size: weight_of(np.full((16, 256), -8), group_size=group_size),
        np.full((2, 256), 3, np.float32),
    ),
    Rounded("an odd number of groups", codes(32, 896), normal(3, 896)),
)
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def lowered(weight: PackedWeight, lowering: str, **options: str) -> ir.Model:
    return one_node(weight, lowering=lowering, scheme="w4a8", **options)  # type: ignore[arg-type]
