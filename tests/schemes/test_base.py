"""Schemes as data, group sizes, and the checks a reader makes of a packed weight."""

from dataclasses import replace

import numpy as np
import pytest

from mbq_export.errors import FormatError, UsageError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight, check_packed, groups_of


@pytest.fixture
def weight() -> PackedWeight:
    return PackedWeight(
        words=np.zeros((4, 6), np.uint32),
        scales=np.ones((4, 2), np.float16),
        zeros=np.full((4, 2), 3, np.uint8),
        k=64,
        bits=3,
        group_size=32,
    )


def test_a_weight_says_its_shape(weight: PackedWeight) -> None:
    assert (weight.n, weight.k, weight.groups) == (4, 64, 2)
    check_packed(weight)


@pytest.mark.parametrize(
    ("name", "bits", "per_weight"), [("w3a16", 3, 3.15625), ("w4a16", 4, 4.15625)]
)
def test_a_scheme_says_its_bits(name: str, bits: int, per_weight: float) -> None:
    scheme = SCHEMES[name]
    assert (scheme.weight_bits, scheme.levels, scheme.largest_code) == (bits, 2**bits, 2**bits - 1)
    assert scheme.bits_per_weight(128) == per_weight
    assert not scheme.symmetric


def test_a_symmetric_scheme_reads_no_zero_points() -> None:
    scheme = SCHEMES["w4a8"]
    assert scheme.symmetric
    assert (scheme.middle, scheme.group_size, scheme.group_sizes) == (8, CHANNEL, (CHANNEL, 128))
    assert scheme.bits_per_weight(CHANNEL) == 4.0
    assert scheme.bits_per_weight(128) == 4.125
    assert (scheme.groups_of(200, CHANNEL), scheme.groups_of(256, 128)) == (1, 2)


def test_a_scheme_refuses_a_group_size_it_does_not_have() -> None:
    with pytest.raises(UsageError, match="w4a8 has no groups of 64") as caught:
        SCHEMES["w4a8"].groups_of(128, 64)
    assert caught.value.code == "E2004"
    assert caught.value.why == "its groups are channel, 128"
    with pytest.raises(UsageError, match="Group size 128 does not divide in_features 96"):
        SCHEMES["w4a8"].groups_of(96, 128)


def test_an_unknown_scheme_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Unknown scheme 'w3a61'") as caught:
        SCHEMES["w3a61"]
    assert caught.value.fix == ("use w3a16",)


@pytest.mark.parametrize(("k", "size", "groups"), [(128, 128, 1), (896, 128, 7), (64, 32, 2)])
def test_groups_divide_a_row(k: int, size: int, groups: int) -> None:
    assert groups_of(k, size) == groups


def test_an_unknown_group_size_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match="Group size 100 does not divide in_features 896"
    ) as caught:
        groups_of(896, 100)
    assert caught.value.code == "E2004"
    assert caught.value.why == "groups must be one of 32, 64, 128 and divide in_features"
    assert caught.value.fix == ("--group-size 128", "--group-size 64", "--group-size 32")


def test_a_row_that_no_group_divides_can_be_skipped() -> None:
    with pytest.raises(UsageError) as caught:
        groups_of(33, 32)
    assert caught.value.fix == ("--wbits 16 keeps the model as it is",)


BROKEN = {
    "one word missing": (
        {"words": np.zeros((4, 5), np.uint32)},
        "E4102",
        "Packed words are uint32",
    ),
    "signed words": ({"words": np.zeros((4, 6), np.int32)}, "E4102", "Packed words are int32"),
    "wide scales": ({"scales": np.ones((4, 2), np.float32)}, "E4102", "Scales are float32"),
    "a zero scale": ({"scales": np.zeros((4, 2), np.float16)}, "E4411", "8 scales are not finite"),
    "a NaN scale": ({"scales": np.full((4, 2), np.nan, np.float16)}, "E4411", "8 scales"),
    "a zero point of 8": ({"zeros": np.full((4, 2), 8, np.uint8)}, "E4411", "reach 8"),
    "zero points of one group": ({"zeros": np.zeros((4, 1), np.uint8)}, "E4411", r"\(4, 1\)"),
}


@pytest.mark.parametrize(("change", "code", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_weight_is_refused(
    weight: PackedWeight, change: dict[str, object], code: str, words: str
) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        check_packed(replace(weight, **change))
    assert caught.value.code == code


def test_a_weight_per_channel_has_one_float32_scale_per_row(weight: PackedWeight) -> None:
    channel = replace(weight, group_size=CHANNEL, scales=np.ones((4, 1), np.float32), zeros=None)
    check_packed(channel)
    for scales in (np.ones((4, 1), np.float16), np.ones((4, 2), np.float32)):
        with pytest.raises(FormatError, match="Scales are") as caught:
            check_packed(replace(channel, scales=scales))
        assert caught.value.why == "one scale per row and group is float32 (4, 1)"
