"""Activations rounded per token, and products of integers: hand vectors, exact sums, order of the float operations."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.integers import (
    integer_linear,
    integer_reference,
    integer_sums,
    largest_activation,
    quantize_activations,
    signed_codes,
)
from tests.schemes.integer_weights import random_q, weight_of


def test_activations_round_to_int8_with_ties_to_even() -> None:
    """127 is the row's largest, so sx is 1 and halves are ties."""
    codes, scales = quantize_activations(np.array([[127, 0.5, 1.5, 2.5, -0.5, -3.5, -127, 0]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -4, -127, 0]]
    assert scales.tolist() == [1.0]
    assert (codes.dtype, scales.dtype) == (np.int8, np.float32)


def test_the_example_of_the_format_s_page() -> None:
    """docs/formats/checkpoint.md, with zeros where the page stops at four columns."""
    x, q = np.zeros((1, 8)), np.zeros((1, 8), np.int64)
    x[0, :4], q[0, :4] = (127, 0.5, 1.5, -3.5), (1, 0, 2, -3)
    weight = replace(weight_of(q), scales=np.array([[0.5]], np.float32))
    assert quantize_activations(x)[0][0, :4].tolist() == [127, 0, 2, -4]
    assert integer_sums(quantize_activations(x)[0], weight).item() == 143
    assert integer_linear(x, weight).item() == 71.5


def test_a_row_of_zeros_has_codes_0_and_the_smallest_scale() -> None:
    codes, scales = quantize_activations(np.zeros((2, 8), np.float16))
    assert not codes.any()
    assert scales.tolist() == [float(np.float32(1e-5) / np.float32(127))] * 2


def test_every_row_has_its_own_scale() -> None:
    codes, scales = quantize_activations(np.array([[1.27, 0.01], [12.7, 0.1]]))
    assert codes.tolist() == [[127, 1], [127, 1]]
    assert scales == pytest.approx([0.01, 0.1])


def test_activations_are_divided_not_multiplied_by_the_inverse() -> None:
    """Codes of the two formulas differ, rarely: on 2 million values some do, so the choice is part of the format."""
    x = np.random.default_rng(0).standard_normal((512, 4096)).astype(np.float16)
    codes, _ = quantize_activations(x)
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(1, keepdims=True)
    np.testing.assert_array_equal(codes, np.rint(wide / (largest / np.float32(127))))
    other = np.rint(wide * (np.float32(127) / largest))
    assert 0 < (codes != other).sum() < x.size / 1000


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (6, 31), (4, 7)])
def test_the_largest_code_of_a_width_has_an_opposite(bits: int, largest: int) -> None:
    assert largest_activation(bits) == largest
    codes, scales = quantize_activations(np.array([[-largest, 1.5, largest, 0]]), bits=bits)
    assert codes.tolist() == [[-largest, 2, largest, 0]]
    assert scales.tolist() == [1.0]


def test_the_reference_of_a_width_rounds_to_that_width() -> None:
    weight = weight_of(random_q(9, 4, 64))
    x = np.random.default_rng(9).standard_normal((3, 64))
    for bits in (4, 6, 8):
        found = integer_reference(bits)(x, weight)
        assert found.tolist() == integer_linear(x, weight, act_bits=bits).astype(float).tolist()
    assert (integer_reference(4)(x, weight) != integer_reference(8)(x, weight)).any()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-20, 12),
    dtype=st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]),
    bits=st.sampled_from([4, 6, 8]),
)
def test_codes_stay_within_their_width_and_near_their_value(
    seed: int, exponent: int, dtype: type[np.floating], bits: int
) -> None:
    x = (np.random.default_rng(seed).standard_normal((3, 65)) * 2.0**exponent).astype(dtype)
    codes, scales = quantize_activations(x, bits=bits)
    assert np.abs(codes.astype(int)).max() <= largest_activation(bits)
    off = np.abs(codes * scales[:, None].astype(np.float64) - x.astype(np.float64))
    assert (off <= scales[:, None] * (0.5 + 127 * 2.0**-23)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group_size", [CHANNEL, 128])
def test_a_value_that_is_no_number_reaches_its_own_row_only(bad: float, group_size: int) -> None:
    weight = weight_of(random_q(0, 16, 128), group_size=group_size)
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    clean = integer_linear(x, weight)
    x[1, 77] = bad
    found = integer_linear(x, weight)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_sums_are_exact_integers(bits: int) -> None:
    xq = np.random.default_rng(1).integers(-127, 128, (3, 256)).astype(np.int8)
    q = random_q(2, 5, 256, bits=bits)
    weight = weight_of(q, group_size=128, bits=bits)
    np.testing.assert_array_equal(signed_codes(weight), q)
    found = integer_sums(xq, weight)
    for m in range(3):
        for n in range(5):
            for g in range(2):
                columns = range(128 * g, 128 * g + 128)
                assert found[m, n, g] == sum(int(xq[m, k]) * int(q[n, k]) for k in columns)
    assert found.dtype == np.int64
    whole = integer_sums(xq, weight_of(q, bits=bits))
    np.testing.assert_array_equal(whole[..., 0], found.sum(-1))


@pytest.mark.parametrize(("bits", "act_bits"), [(4, 8), (8, 8), (4, 4), (6, 6)])
def test_a_channel_s_output_is_sum_times_weight_scale_times_token_scale(
    bits: int, act_bits: int
) -> None:
    weight = weight_of(random_q(3, 7, 512, bits=bits), seed=3, bits=bits)
    x = np.random.default_rng(3).standard_normal((4, 512)).astype(np.float16)
    found = integer_linear(x, weight, act_bits=act_bits)
    xq, sx = quantize_activations(x, bits=act_bits)
    sums = integer_sums(xq, weight)[..., 0]
    for m in range(4):
        for n in range(7):
            by_weight = np.float32(np.float32(sums[m, n]) * weight.scales[n, 0])
            assert found[m, n] == np.float32(by_weight * sx[m])
    assert found.dtype == np.float32


def test_the_other_order_of_scales_gives_other_bits() -> None:
    """The order is part of the format because it shows."""
    weight = weight_of(random_q(4, 64, 512), seed=4)
    x = np.random.default_rng(4).standard_normal((16, 512)).astype(np.float16)
    xq, sx = quantize_activations(x)
    sums = integer_sums(xq, weight)[..., 0].astype(np.float32)
    other = sums * (weight.scales[:, 0] * sx[:, None])
    assert (other != integer_linear(x, weight)).any()


def test_sixteen_times_the_sum_and_a_sixteenth_of_the_scale_are_the_same_bits() -> None:
    """Kernels sum 16 * q (FORMATS 1.6): powers of two move no bit of a mantissa."""
    rng = np.random.default_rng(5)
    sums = rng.integers(-(2**27), 2**27, 100_000)
    scales = (10.0 ** rng.uniform(-6, 1, sums.size)).astype(np.float32)
    plain = sums.astype(np.float32) * scales
    np.testing.assert_array_equal((16 * sums).astype(np.float32) * (scales / 16), plain)


def test_groups_are_scaled_before_they_are_added() -> None:
    weight = weight_of(random_q(6, 5, 384), group_size=128, seed=6)
    x = np.random.default_rng(6).standard_normal((2, 384)).astype(np.float16)
    xq, sx = quantize_activations(x)
    sums = integer_sums(xq, weight)
    expected = [
        [
            sum(int(sums[m, n, g]) * float(weight.scales[n, g]) for g in range(3)) * float(sx[m])
            for n in range(5)
        ]
        for m in range(2)
    ]
    np.testing.assert_allclose(integer_linear(x, weight), expected, rtol=2.0**-23)


def test_the_bias_is_added_in_float32() -> None:
    weight = replace(weight_of(random_q(7, 3, 128)), bias=np.array([1, -2, 3], np.float16))
    assert integer_linear(np.zeros((2, 128)), weight).tolist() == [[1, -2, 3]] * 2
