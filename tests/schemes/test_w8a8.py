"""Weights and activations of 8 bits: hand vectors, the code that is never chosen, exact sums of the widest rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq_export.errors import UsageError
from mbq_export.schemes.affine import Grid, codes_on, dequantize, quantize, quantize_per_token
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.integers import (
    integer_linear,
    integer_sums,
    quantize_activations,
    signed_codes,
)
from mbq_export.schemes.w8a8 import LARGEST_K, SCHEME
from tests.schemes.integer_weights import (
    assert_multiplies_nearly_exactly,
    packed_of,
    random_q,
    weight_of,
)

ACTIVATION_RELATIVE = 0.02
"""As of w4a8: rounding the activations costs the same."""
FLOAT32_STEPS = 0.5 + 127 * 2.0**-23
"""Half a step, and the error of a float32 quotient of up to 127 steps."""


def test_a_channel_has_hand_made_codes() -> None:
    """127 is the largest, so the scale is 1 and halves are ties."""
    weight = torch.tensor([[-127, -2.5, -1, 0, 0.5, 1.5, 100, 63.5]])
    found = quantize(weight, scheme=SCHEME, group_size=CHANNEL)
    assert found.codes.tolist() == [[1, 126, 127, 128, 128, 130, 228, 192]]
    assert found.scales.tolist() == [[1.0]]
    assert found.scales.dtype == torch.float32
    assert packed_of(found, bits=8).words[0].tolist() == [0x807F7E01, 0xC0E48280]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 13),
    exponent=st.integers(-30, 30),
)
def test_codes_have_opposites_and_are_half_a_step_away(
    seed: int, rows: int, blocks: int, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 8 * blocks, generator=generator) * 2.0**exponent
    found = quantize(weight, scheme=SCHEME, group_size=CHANNEL)
    assert 1 <= int(found.codes.min()) <= int(found.codes.max()) <= 255
    packed = packed_of(found, bits=8)
    real = signed_codes(packed) * packed.scales.astype(np.float64)
    assert (np.abs(real - weight.double().numpy()) <= packed.scales * FLOAT32_STEPS).all()
    np.testing.assert_allclose(dequantize(found).numpy(), real, rtol=2.0**-24)


def test_the_code_without_an_opposite_is_kept_out_also_of_values_beyond_the_range() -> None:
    """Error feedback moves weights beyond the range that made the scale."""
    grid = Grid(scales=torch.ones(1), zeros=torch.full((1,), 128.0), clamped=0)
    beyond = torch.tensor([[-500.0, -128, -127, 127, 500]])
    assert codes_on(beyond, grid, scheme=SCHEME).tolist() == [[1, 1, 1, 255, 255]]


def test_torch_and_numpy_round_activations_to_the_same_bits() -> None:
    x = np.random.default_rng(1).standard_normal((64, 520)).astype(np.float32)
    x[0], x[1], x[2, 9] = 0, x[1] * 1e-9, 1e4
    codes, scales = quantize_activations(x)
    found, steps = quantize_per_token(torch.from_numpy(x), bits=8)
    np.testing.assert_array_equal(found.numpy(), codes)
    np.testing.assert_array_equal(steps.numpy()[:, 0], scales)


def test_a_one_hot_row_reads_one_column() -> None:
    """Its scale is 1 / 127 and its code 127, so a column comes back but for two roundings of float32."""
    q = random_q(2, 7, 40, bits=8)
    weight = weight_of(q, bits=8)
    assert q.min() == -128  # checkpoints of others hold it
    found = integer_linear(np.eye(40, dtype=np.float32), weight)
    np.testing.assert_allclose(found, (q * weight.scales.astype(np.float64)).T, rtol=2.0**-22)


def test_the_largest_sum_is_exact() -> None:
    columns = LARGEST_K
    weight = weight_of(np.full((1, columns), -128), bits=8)
    xq = np.full((1, columns), -127, np.int8)
    assert integer_sums(xq, weight).tolist() == [[[128 * 127 * columns]]]
    assert 128 * 127 * columns < 2**31 <= 128 * 127 * (columns + 1)


def test_a_wider_row_is_refused() -> None:
    SCHEME.check_columns(LARGEST_K, CHANNEL)
    with pytest.raises(UsageError, match="132112 products of w8a8 may overflow") as caught:
        SCHEME.check_columns(132_112, CHANNEL)
    assert caught.value.code == "E2007"


def test_a_rounded_weight_multiplies_nearly_as_with_exact_activations() -> None:
    assert_multiplies_nearly_exactly(SCHEME, CHANNEL, relative=ACTIVATION_RELATIVE)


def test_it_has_no_groups_and_no_kernel() -> None:
    assert (SCHEME.group_sizes, SCHEME.kernel_layout) == ((CHANNEL,), None)
    assert SCHEME.bits_per_weight(CHANNEL) == 8
