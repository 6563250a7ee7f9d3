"""Int8 activations and 4-bit weights: the widest row, and a real weight from rounding to a product."""

import numpy as np
import pytest

from mbq_export.schemes.integers import integer_sums
from mbq_export.schemes.w4a8 import LARGEST_K, SCHEME
from tests.schemes.integer_weights import assert_multiplies_nearly_exactly, weight_of

ACTIVATION_RELATIVE = 0.02
"""Rounding to int8 moves each of K activations by at most 1 / 254 of the row's largest; on normals 0.007 to 0.011."""


def test_the_largest_sum_is_exact() -> None:
    columns = LARGEST_K
    weight = weight_of(np.full((1, columns), -8))
    xq = np.full((1, columns), -127, np.int8)
    assert integer_sums(xq, weight).tolist() == [[[8 * 127 * columns]]]
    assert 16 * 8 * 127 * columns < 2**31


@pytest.mark.parametrize("group_size", SCHEME.group_sizes)
def test_a_rounded_weight_multiplies_nearly_as_with_exact_activations(group_size: int) -> None:
    assert_multiplies_nearly_exactly(SCHEME, group_size, relative=ACTIVATION_RELATIVE)
