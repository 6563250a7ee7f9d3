"""AWQ: golden word, equality with a slow packer both ways, and refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq_export.errors import FormatError, UsageError
from mbq_export.quantize.formats.awq import FORMAT, pack_rows, recipe, unpack_rows
from mbq_export.quantize.formats.base import Kept, StoredLinear, carried_over, scheme_of
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.layouts.dense import unpack
from tests.reference import foreign


def test_codes_0_to_7_are_the_golden_word() -> None:
    word = pack_rows(np.arange(8, dtype=np.uint8)[None])
    assert word.view(np.uint32).tolist() == [[0x75316420]]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([8, 24, 40]),
    st.sampled_from([(32, 32), (96, 32), (128, 64), (256, 128)]),
)
def test_what_a_slow_packer_wrote_is_read_and_written_again(
    seed: int, n: int, widths: tuple[int, int]
) -> None:
    k, group = widths
    linear = foreign.random_linear(np.random.default_rng(seed), n, k, bits=4, group=group)
    found = recipe(foreign.awq_settings(group))
    tensors = foreign.awq(linear)
    carried = FORMAT.read(StoredLinear(n=n, k=k, tensors=tensors), found)
    assert np.array_equal(unpack(carried.words, bits=4, columns=k), linear.codes)
    weight, _ = carried_over(carried, k=k, recipe=found, scheme=scheme_of(found), group_size=group)
    assert weight.zeros is not None
    assert np.array_equal(weight.zeros, linear.zeros)
    assert np.array_equal(weight.scales, linear.scales)
    again = FORMAT.write(weight, SCHEMES["w4a16"])
    assert again.keys() == tensors.keys()
    for part, array in tensors.items():
        assert again[part].dtype == array.dtype
        assert np.array_equal(again[part], array), part


def test_words_are_unpacked_as_the_slow_way_does() -> None:
    words = np.random.default_rng(3).integers(-(2**31), 2**31, (5, 4)).astype(np.int32)
    assert unpack_rows(words).tolist() == foreign.awq_codes(words)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "gemv"}, "version is 'gemv'"),
        ({"version": 3}, "version is '3'"),
        ({"bits": 3}, "bits of quantization_config is '3'"),
        ({"bits": 4.0}, "bits of quantization_config is '4.0'"),
        ({"zero_point": False}, "zero_point"),
        ({"backend": "llm-awq"}, "backend"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": "128"}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"group_size": 1 << 40}, "group_size"),
    ],
)
def test_other_settings_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        recipe(foreign.awq_settings(64) | change)
    assert caught.value.code == "E4011"


@pytest.mark.parametrize(
    ("part", "array", "code"),
    [
        ("qweight", None, "E4103"),
        ("qweight", np.zeros((64, 2), np.int32), "E4102"),
        ("qweight", np.zeros((64, 1), np.int64), "E4102"),
        ("qzeros", np.zeros((2, 8), np.float16), "E4102"),
        ("scales", np.zeros((8, 2), np.float16), "E4102"),
        ("scales", np.zeros((2, 8), np.float64), "E4102"),
        ("g_idx", np.zeros(64, np.int32), "E4103"),
    ],
)
def test_tensor_that_is_not_what_the_format_says_is_refused(
    part: str, array: np.ndarray | None, code: str
) -> None:
    linear = foreign.random_linear(np.random.default_rng(0), 8, 64, bits=4, group=32)
    tensors = {**foreign.awq(linear), part: array}
    if array is None:
        del tensors[part]
    with pytest.raises(FormatError) as caught:
        FORMAT.read(StoredLinear(n=8, k=64, tensors=tensors), recipe(foreign.awq_settings(32)))
    assert caught.value.code == code


def test_rows_that_do_not_fill_words_are_not_written() -> None:
    with pytest.raises(UsageError, match="12 output features") as caught:
        FORMAT.check(12, 64, SCHEMES["w4a16"])
    assert caught.value.code == "E2006"


def test_settings_written_are_those_read() -> None:
    written = FORMAT.config(SCHEMES["w4a16"], 64, Kept(patterns=("lm_head",), modules=()))
    assert recipe(written) == recipe(foreign.awq_settings(64))
    assert written["modules_to_not_convert"] == ["lm_head"]
