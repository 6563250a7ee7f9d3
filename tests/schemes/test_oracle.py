"""The oracle against loops that a reader can follow."""

from dataclasses import replace

import numpy as np
import pytest

from mbq_export.schemes.base import PackedWeight
from mbq_export.schemes.layouts.dense import pack
from mbq_export.schemes.oracle import dequantized, weight_only_linear

CODES = np.random.default_rng(0).integers(0, 8, (3, 64), np.uint8)


@pytest.fixture
def weight() -> PackedWeight:
    return PackedWeight(
        words=pack(CODES, bits=3),
        scales=np.array([[0.5, 1], [2, 0.25], [1, 1]], np.float16),
        zeros=np.array([[0, 7], [3, 4], [1, 2]], np.uint8),
        k=64,
        bits=3,
        group_size=32,
        bias=np.array([1, -2, 3], np.float32),
    )


def value(weight: PackedWeight, n: int, k: int) -> float:
    group = k // weight.group_size
    assert weight.zeros is not None
    return (int(CODES[n, k]) - int(weight.zeros[n, group])) * float(weight.scales[n, group])


def test_every_weight_is_code_minus_zero_times_scale(weight: PackedWeight) -> None:
    expected = [[value(weight, n, k) for k in range(64)] for n in range(3)]
    assert dequantized(weight).tolist() == expected
    assert dequantized(weight).dtype == np.float64


def test_a_one_hot_input_reads_one_column(weight: PackedWeight) -> None:
    columns = weight_only_linear(np.eye(64), replace(weight, bias=None))
    assert columns.tolist() == dequantized(weight).T.tolist()


def test_the_bias_is_added_once(weight: PackedWeight) -> None:
    assert weight_only_linear(np.zeros((2, 64)), weight).tolist() == [[1, -2, 3]] * 2


def test_without_zero_points_the_middle_code_is_zero(weight: PackedWeight) -> None:
    found = dequantized(replace(weight, zeros=None))
    scales = weight.scales.astype(float).repeat(32, 1)
    assert found.tolist() == ((CODES.astype(float) - 4) * scales).tolist()


def test_a_channel_s_float32_scale_holds_for_its_whole_row(weight: PackedWeight) -> None:
    scales = np.array([[0.1], [0.2], [0.3]], np.float32)
    found = dequantized(replace(weight, zeros=None, scales=scales, group_size=0))
    assert found.tolist() == ((CODES.astype(float) - 4) * scales.astype(float)).tolist()
