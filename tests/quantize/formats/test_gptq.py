"""GPTQ: codes of 3 bits straddle words as ours, both zero rules, and refusals."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq_export.errors import FormatError, UsageError
from mbq_export.quantize.formats.base import Kept, StoredLinear, carried_over, scheme_of
from mbq_export.quantize.formats.gptq import FORMAT, recipe
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.layouts.dense import unpack
from tests.reference import foreign

GOLDEN = (0x43C67543, 0x7543C675, 0xC67543C6)
"""Codes (5k + 3) mod 8, k = 0..31, of 3 bits: codes 10 and 21 straddle (docs/formats/dense.md)."""


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([3, 4]),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([(32, 32), (96, 32), (192, 64), (256, 128)]),
    st.booleans(),
)
def test_what_a_slow_packer_wrote_is_read(
    seed: int, bits: int, n: int, widths: tuple[int, int], minus_one: bool
) -> None:
    k, group = widths
    linear = foreign.random_linear(np.random.default_rng(seed), n, k, bits=bits, group=group)
    found = recipe(foreign.gptq_settings(bits, group, "gptq" if minus_one else "gptq_v2"))
    tensors = foreign.gptq(linear, minus_one=minus_one, group=group)
    carried = FORMAT.read(StoredLinear(n=n, k=k, tensors=tensors), found)
    scheme = scheme_of(found)
    weight, counts = carried_over(carried, k=k, recipe=found, scheme=scheme, group_size=group)
    assert scheme.name == f"w{bits}a16"
    assert np.array_equal(unpack(weight.words, bits=bits, columns=k), linear.codes)
    assert weight.zeros is not None
    assert np.array_equal(weight.zeros, linear.zeros)
    assert np.array_equal(weight.scales, linear.scales)
    assert counts.rounded == 0
    again = FORMAT.write(weight, scheme)
    for part, array in foreign.gptq(linear, minus_one=False, group=group).items():
        assert again[part].dtype == array.dtype
        assert np.array_equal(again[part], array), part


def test_golden_words_lie_along_a_column() -> None:
    codes = np.array([[(5 * k + 3) % 8 for k in range(32)]] * 32, np.uint8)
    linear = foreign.Linear(
        codes=codes,
        zeros=np.zeros((32, 1), np.uint8),
        scales=np.ones((32, 1), np.float16),
        bits=3,
    )
    tensors = foreign.gptq(linear, minus_one=False, group=32)
    assert tuple(int(word) % 2**32 for word in tensors["qweight"][:, 0]) == GOLDEN
    carried = FORMAT.read(
        StoredLinear(n=32, k=32, tensors=tensors), recipe(foreign.gptq_settings(3, 32, "gptq_v2"))
    )
    assert tuple(carried.words[0].tolist()) == GOLDEN


def test_zero_of_nothing_is_the_largest_field_of_the_older_form() -> None:
    """By field: of three bits, fields straddle words, so adding one to a word would not do."""
    linear = foreign.random_linear(np.random.default_rng(0), 32, 32, bits=3, group=32)
    zeros = np.array([[row % 8] for row in range(32)], np.uint8)
    tensors = foreign.gptq(
        foreign.Linear(codes=linear.codes, zeros=zeros, scales=linear.scales, bits=3),
        minus_one=True,
        group=32,
    )
    assert tensors["qzeros"][0, 0] & 7 == 7
    found = recipe(foreign.gptq_settings(3, 32, "gptq"))
    carried = FORMAT.read(StoredLinear(n=32, k=32, tensors=tensors), found)
    assert np.array_equal(carried.zeros, zeros)


@pytest.mark.parametrize(("version", "sym", "warned"), [
    ("gptq", False, True), ("gptq", True, False), ("gptq_v2", False, False),
])  # fmt: skip
def test_older_form_with_zero_points_is_warned_of(
    version: str, sym: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mbq_export"):
        recipe(foreign.gptq_settings(4, 32, version) | {"sym": sym})
    assert ("MBQ-W4114" in caplog.text) == warned


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format .* 'gptq_p'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"bits": 5}, "bits"),
        ({"bits": True}, "bits"),
        ({"lm_head": True}, "lm_head"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        ({"dynamic": [1]}, "dynamic"),
        ({"sym": "yes"}, "sym"),
        ({"group_size": -2}, "group_size"),
    ],
)
def test_other_settings_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        recipe(foreign.gptq_settings(4, 64, "gptq_v2") | change)
    assert caught.value.code == "E4011"


@pytest.mark.parametrize("bits", [2, 8])
def test_widths_without_a_format_of_ours_are_named(bits: int) -> None:
    with pytest.raises(FormatError, match=f"asymmetric codes of {bits} bits") as caught:
        scheme_of(recipe(foreign.gptq_settings(bits, 64, "gptq_v2")))
    assert caught.value.code == "E4011"


def test_columns_reordered_by_activation_are_refused() -> None:
    linear = foreign.random_linear(np.random.default_rng(0), 32, 64, bits=4, group=32)
    tensors = foreign.gptq(linear, minus_one=False, group=32)
    order = tensors["g_idx"].copy()
    order[[3, 40]] = order[[40, 3]]
    found = recipe(foreign.gptq_settings(4, 32, "gptq_v2"))
    with pytest.raises(FormatError, match="reordered") as caught:
        FORMAT.read(StoredLinear(n=32, k=64, tensors={**tensors, "g_idx": order}), found)
    assert caught.value.code == "E4011"


@pytest.mark.parametrize(
    ("part", "array", "code"),
    [
        ("g_idx", None, "E4103"),
        ("g_idx", np.zeros(32, np.int32), "E4102"),
        ("qzeros", np.zeros((2, 32), np.float16), "E4102"),
        ("qweight", np.zeros((32, 8), np.int32), "E4102"),
        ("perm", np.zeros(64, np.int32), "E4103"),
    ],
)
def test_tensor_that_is_not_what_the_format_says_is_refused(
    part: str, array: np.ndarray | None, code: str
) -> None:
    linear = foreign.random_linear(np.random.default_rng(0), 32, 64, bits=4, group=32)
    tensors = {**foreign.gptq(linear, minus_one=False, group=32), part: array}
    if array is None:
        del tensors[part]
    found = recipe(foreign.gptq_settings(4, 32, "gptq_v2"))
    with pytest.raises(FormatError) as caught:
        FORMAT.read(StoredLinear(n=32, k=64, tensors=tensors), found)
    assert caught.value.code == code


@pytest.mark.parametrize(("n", "k"), [(12, 64), (64, 12)])
def test_linear_that_does_not_end_with_its_words_is_refused_both_ways(n: int, k: int) -> None:
    with pytest.raises(UsageError) as caught:
        FORMAT.check(n, k, SCHEMES["w3a16"])
    assert caught.value.code == "E2006"
    found = recipe(foreign.gptq_settings(3, -1, "gptq_v2"))
    with pytest.raises(FormatError, match="does not end with its words") as refused:
        FORMAT.read(StoredLinear(n=n, k=k, tensors=dict.fromkeys(FORMAT.marks, np.zeros(1))), found)
    assert refused.value.code == "E4102"


def test_settings_written_are_those_read() -> None:
    kept = Kept(patterns=("lm_head", "model.vision_tower"), modules=())
    written = FORMAT.config(SCHEMES["w3a16"], 64, kept)
    assert recipe(written) == recipe(foreign.gptq_settings(3, 64, "gptq_v2"))
    assert list(written["dynamic"]) == ["-:lm_head", r"-:model\.vision_tower"]
