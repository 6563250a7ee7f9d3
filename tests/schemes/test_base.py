"""Schemes as data, group sizes, and the checks a reader makes of a packed weight."""

from dataclasses import replace

import numpy as np
import pytest

from mbq_export.errors import FormatError, UsageError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import PackedWeight, check_packed, groups_of


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
