"""Rounding weights to codes: numbers made by hand, then properties on random weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbq_export.errors import FormatError, UsageError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import Codes, dequantize, quantize
from mbq_export.schemes.base import CHANNEL, QuantScheme
from tests.reference.published import fake_quantized

W3, W4, W4A8 = SCHEMES["w3a16"], SCHEMES["w4a16"], SCHEMES["w4a8"]
FP16_STEP = 2.0**-11  # largest relative error of rounding a normal number to fp16


def group_of(values: list[float]) -> Tensor:
    """One row whose values repeat to a group of 32: repeating changes neither range nor codes."""
    return torch.tensor(values).repeat(32 // len(values))[None]


def scheme_of(bits: int) -> QuantScheme:
    return QuantScheme(
        name=f"w{bits}",
        number=0,
        weight_bits=bits,
        symmetric=False,
        group_size=32,
        act_bits=16,
        checkpoint_layout="dense",
        kernel_layout="none",
        linear_reference=W3.linear_reference,
    )


def quantized(values: list[float], *, bits: int, compat: bool = False) -> Codes:
    return quantize(group_of(values), scheme=scheme_of(bits), group_size=32, compat=compat)


def weights(seed: int, *, rows: int = 8, columns: int = 128, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) + offset


@pytest.mark.parametrize("compat", [False, True])
def test_a_group_around_zero_has_hand_made_codes(compat: bool) -> None:
    found = quantized([-1, 0, 0.5, 0.75], bits=2, compat=compat)
    assert found.codes[0, :4].tolist() == [0, 2, 3, 3]
    assert found.zeros.tolist() == [[2]]
    assert found.scales.item() == pytest.approx(7 / 12, rel=FP16_STEP)
    expected = torch.tensor([-7 / 6, 0, 7 / 12, 7 / 12])
    torch.testing.assert_close(dequantize(found)[0, :4], expected, rtol=FP16_STEP, atol=0)


def test_an_all_positive_group_keeps_its_largest_weight() -> None:
    found = quantized([0.1, 0.16, 0.3, 0.4], bits=3)
    assert found.codes[0, :4].tolist() == [2, 3, 5, 7]
    assert found.zeros.item() == 0
    expected = torch.tensor([0.114286, 0.171429, 0.285714, 0.4])
    torch.testing.assert_close(dequantize(found)[0, :4], expected, rtol=FP16_STEP, atol=0)


def test_the_published_rule_saturates_an_all_positive_group() -> None:
    found = quantized([0.1, 0.16, 0.3, 0.4], bits=3, compat=True)
    assert found.codes[0, :4].tolist() == [2, 4, 7, 7]
    assert found.zeros.item() == 0
    assert found.scales.item() == pytest.approx(0.0428571, rel=1e-5)
    expected = torch.tensor([0.085714, 0.171429, 0.3, 0.3])
    torch.testing.assert_close(dequantize(found)[0, :4], expected, rtol=1e-4, atol=0)


def test_an_all_negative_group_keeps_its_smallest_weight() -> None:
    found = quantized([-0.4, -0.3, -0.21, -0.1], bits=3)
    assert found.zeros.item() == 7
    assert found.codes[0, :4].tolist() == [0, 2, 3, 5]
    expected = torch.tensor([-0.4, -0.285714, -0.228571, -0.114286])
    torch.testing.assert_close(dequantize(found)[0, :4], expected, rtol=FP16_STEP, atol=0)


def test_the_published_rule_saturates_an_all_negative_group() -> None:
    found = quantized([-0.4, -0.3, -0.21, -0.1], bits=3, compat=True)
    assert found.zeros.item() == 7
    assert found.codes[0, :4].tolist() == [0, 0, 2, 5]
    expected = torch.tensor([-0.3, -0.3, -0.214286, -0.085714])
    torch.testing.assert_close(dequantize(found)[0, :4], expected, rtol=1e-4, atol=0)


def test_codes_are_chosen_against_the_rounded_scale() -> None:
    """1.0 is a tie at s = 0.4 and would be 5; at fp16(0.4) = 0.39990234375 it is 6."""
    found = quantized([-1.2, -0.4, 0, 0.1, 0.3, 0.7, 1.0, 1.6], bits=3)
    assert found.scales.item() == 0.39990234375
    assert found.zeros.item() == 3
    assert found.codes[0, :8].tolist() == [0, 2, 3, 3, 4, 5, 6, 7]


def test_ties_go_to_the_even_code() -> None:
    """Range 0 to 7 makes the scale 1: halves are ties."""
    found = quantized([0, 0.5, 1.5, 2.5, 3.5, 7, 7, 7], bits=3)
    assert found.codes[0, :5].tolist() == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("scheme", [W3, W4], ids=lambda s: s.name)
def test_a_row_times_a_factor_has_the_same_codes(scheme: QuantScheme) -> None:
    """A power of two leaves fp16 rounding of the scale alone, so codes must not move at all."""
    weight = weights(0)
    once = quantize(weight, scheme=scheme, group_size=32)
    scaled = quantize(weight * 8, scheme=scheme, group_size=32)
    assert torch.equal(once.codes, scaled.codes)
    assert torch.equal(once.zeros, scaled.zeros)
    assert torch.equal(once.scales * 8, scaled.scales)


def test_a_row_times_any_factor_has_the_same_codes_before_scales_are_rounded() -> None:
    weight = weights(1)
    once = quantize(weight, scheme=W3, group_size=32, compat=True)
    scaled = quantize(weight * 7.3, scheme=W3, group_size=32, compat=True)
    assert torch.equal(once.zeros, scaled.zeros)
    assert (once.codes != scaled.codes).float().mean() < 1e-3  # float32 ties
    torch.testing.assert_close(once.scales * 7.3, scaled.scales)


def test_a_zero_group_is_zero_with_the_smallest_scale() -> None:
    found = quantize(torch.zeros(2, 64), scheme=W3, group_size=32)
    assert found.codes.max() == 0
    assert found.zeros.max() == 0
    assert set(found.scales.flatten().tolist()) == {2.0**-14}
    assert found.clamped == 4


def test_groups_of_a_tiny_range_are_counted() -> None:
    weight = torch.ones(1, 64)
    weight[0, :32] = torch.linspace(0, 1e-7, 32)
    found = quantize(weight, scheme=W3, group_size=32)
    assert found.clamped == 1
    assert found.scales[0, 0] == 2.0**-14


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("scheme", [W3, W4], ids=lambda s: s.name)
@pytest.mark.parametrize("offset", [-5.0, 0.0, 5.0])
def test_no_weight_moves_by_more_than_half_a_step(
    scheme: QuantScheme, group_size: int, offset: float
) -> None:
    weight = weights(2, offset=offset)
    found = quantize(weight, scheme=scheme, group_size=group_size)
    step = found.scales.float().repeat_interleave(group_size, 1)
    limit = 0.5 + scheme.largest_code * FP16_STEP
    assert float(((weight - dequantize(found)).abs() / step).max()) <= limit


def test_zero_is_exact() -> None:
    weight = weights(3)
    weight[:, ::7] = 0
    assert dequantize(quantize(weight, scheme=W3, group_size=64))[:, ::7].abs().max() == 0


def test_differences_of_three_bit_codes_fit_signed_four_bit_numbers() -> None:
    found = quantize(weights(4, rows=64), scheme=W3, group_size=32)
    centred = found.codes.int() - found.zeros.int().repeat_interleave(32, 1)
    assert centred.min() >= -7
    assert centred.max() <= 7


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([32, 64]),
    offset=st.sampled_from([-3.0, 0.0, 0.02, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_published_rule_is_the_published_formula_to_the_bit(
    seed: int, bits: int, group_size: int, offset: float, dtype: torch.dtype
) -> None:
    weight = weights(seed, rows=4, offset=offset).to(dtype)
    found = quantize(weight, scheme=scheme_of(bits), group_size=group_size, compat=True)
    assert found.scales.dtype == dtype
    centred = found.codes.float() - found.zeros.float().repeat_interleave(group_size, 1)
    product = centred.to(dtype) * found.scales.repeat_interleave(group_size, 1)
    assert torch.equal(product, fake_quantized(weight, bits=bits, group_size=group_size))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(bad: float) -> None:
    weight = weights(5)
    weight[3, 5] = bad
    with pytest.raises(FormatError, match=r"1 of 1024 weights are not finite") as caught:
        quantize(weight, scheme=W3, group_size=32)
    assert caught.value.code == "E4110"


def test_a_range_beyond_fp16_is_refused() -> None:
    with pytest.raises(FormatError, match=r"A group spans 2e\+06") as caught:
        quantize(torch.tensor([[-1e6, 1e6]]).repeat(1, 16), scheme=W3, group_size=32)
    assert caught.value.code == "E4112"


def test_a_group_size_that_does_not_divide_is_refused_with_the_ones_that_do() -> None:
    with pytest.raises(UsageError, match="Group size 128 does not divide in_features 96") as caught:
        quantize(torch.zeros(1, 96), scheme=W3, group_size=128)
    assert caught.value.fix == ("--group-size 32",)


def test_a_symmetric_channel_has_hand_made_codes() -> None:
    """The largest is 7, so the scale is 1: halves are ties, and -8 is never used."""
    found = quantize(
        torch.tensor([[-7, -2.5, -0.5, 0, 0.5, 1.5, 3.2, 7]]), scheme=W4A8, group_size=CHANNEL
    )
    assert found.codes.tolist() == [[1, 6, 8, 8, 8, 10, 11, 15]]
    assert found.scales.tolist() == [[1.0]]
    assert found.scales.dtype == torch.float32
    assert dequantize(found).tolist() == [[-7, -2, 0, 0, 0, 2, 3, 7]]


def test_a_symmetric_group_rounds_its_scale_to_fp16_before_its_codes() -> None:
    """2.8 / 7 = 0.4 becomes 0.39990234375: 1.0 is a tie at the one and 3 at the other."""
    found = quantize(torch.tensor([[2.8, 1.0, -1.0, 0] * 32]), scheme=W4A8, group_size=128)
    assert found.scales.tolist() == [[0.39990234375]]
    assert found.scales.dtype == torch.float16
    assert found.codes[0, :4].tolist() == [15, 11, 5, 8]


@pytest.mark.parametrize(("group_size", "smallest"), [(CHANNEL, 1e-5 / 7), (128, 2.0**-14)])
def test_a_symmetric_row_of_zeros_is_zero_with_the_smallest_scale(
    group_size: int, smallest: float
) -> None:
    found = quantize(torch.zeros(2, 128), scheme=W4A8, group_size=group_size)
    assert set(found.codes.flatten().tolist()) == {8}
    assert found.scales.flatten().tolist() == pytest.approx([smallest] * 2, rel=1e-7)
    assert found.clamped == 2
    assert dequantize(found).abs().max() == 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    group_size=st.sampled_from(W4A8.group_sizes),
    offset=st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_symmetric_codes_are_at_most_seven_and_half_a_step_away(
    seed: int, group_size: int, offset: float
) -> None:
    weight = weights(seed, columns=256, offset=offset)
    found = quantize(weight, scheme=W4A8, group_size=group_size)
    q = found.codes.int() - 8
    assert q.abs().max() == 7
    step = found.scales.float().repeat_interleave(found.group_size, 1)
    limit = 0.5 + 7 * FP16_STEP
    assert float(((weight - dequantize(found)).abs() / step).max()) <= limit


def test_symmetric_rounding_has_one_rule_whatever_the_dtype() -> None:
    weight = weights(6).bfloat16()
    plain = quantize(weight.float(), scheme=W4A8, group_size=128)
    compat = quantize(weight, scheme=W4A8, group_size=128, compat=True)
    assert torch.equal(plain.codes, compat.codes)
    assert torch.equal(plain.scales, compat.scales)


def test_a_symmetric_group_beyond_fp16_is_refused_and_a_channel_is_not() -> None:
    weight = torch.tensor([[-1e6, 1e6]]).repeat(1, 64)
    with pytest.raises(FormatError, match=r"A group spans 2e\+06") as caught:
        quantize(weight, scheme=W4A8, group_size=128)
    assert caught.value.code == "E4112"
    assert quantize(weight, scheme=W4A8, group_size=CHANNEL).scales.item() == pytest.approx(1e6 / 7)


def test_a_group_size_that_the_scheme_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="w4a8 has no groups of 64") as caught:
        quantize(torch.zeros(1, 128), scheme=W4A8, group_size=64)
    assert caught.value.code == "E2004"
    with pytest.raises(UsageError, match="w3a16 has no groups of a whole channel"):
        quantize(torch.zeros(1, 128), scheme=W3, group_size=CHANNEL)
