"""One bit stream per row: hand-made words, golden bytes, and every width back and forth."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mbq_export.errors import FormatError
from mbq_export.schemes.layouts.dense import LAYOUT, pack, unpack, words_per_row

WIDTHS = range(1, 9)


def codes_of(*values: int) -> NDArray[np.uint8]:
    return np.array([values], np.uint8)


def golden_tile(bits: int) -> NDArray[np.uint8]:
    n, k = np.mgrid[:16, :128]
    return ((7 * n + 5 * k + k // 8 * n) % 2**bits).astype(np.uint8)


def by_formula(words: NDArray[np.uint32], bits: int, k: int) -> int:
    """Code k by shifting whole words, with no use of numpy's bit functions."""
    word, offset = divmod(k * bits, 32)
    value = int(words[word]) >> offset
    if offset + bits > 32:
        value |= int(words[word + 1]) << (32 - offset)
    return value & (2**bits - 1)


def test_three_bit_codes_fill_three_words() -> None:
    words = pack(codes_of(*((5 * k + 3) % 8 for k in range(32))), bits=3)
    assert [hex(word) for word in words[0]] == ["0x43c67543", "0x7543c675", "0xc67543c6"]
    assert words.view(np.int32).tolist() == [[1137079619, 1967375989, -965393466]]


def test_a_code_that_straddles_words_is_split() -> None:
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 10] = 5
    assert pack(codes, bits=3).tolist() == [[0x40000000, 1, 0]]


def test_eight_four_bit_codes_fill_a_word() -> None:
    assert pack(codes_of(3, 8, 13, 2, 7, 12, 1, 6), bits=4).tolist() == [[0x61C72D83]]


def test_four_eight_bit_codes_fill_a_word() -> None:
    assert pack(codes_of(1, 127, 128, 228), bits=8).tolist() == [[0xE4807F01]]


@pytest.mark.parametrize(
    ("bits", "first", "digest"),
    [
        (3, "a8ce78a8ce78a8ce", "20963f312a340829"),
        (4, "50fa943ed8721cb6", "17627aa560efe974"),
        (8, "00050a0f14191e23", "8f4b846134d2151d"),
    ],
)
def test_golden_bytes_of_version_1(bits: int, first: str, digest: str) -> None:
    found = pack(golden_tile(bits), bits=bits).astype("<u4").tobytes()
    assert found.hex().startswith(first)
    assert hashlib.sha256(found).hexdigest().startswith(digest)
    assert (LAYOUT.name, LAYOUT.version) == ("dense", 1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 128, 896])
def test_unpack_returns_every_code(bits: int, columns: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, columns), np.uint8)
    words = pack(codes, bits=bits)
    assert words.shape == (5, words_per_row(columns, bits))
    assert words.dtype == np.uint32
    np.testing.assert_array_equal(unpack(words, bits=bits, columns=columns), codes)


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(1, 8), columns=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_every_code_lies_where_the_formula_says(bits: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (1, columns), np.uint8)
    words = pack(codes, bits=bits)[0]
    assert [by_formula(words, bits, k) for k in range(columns)] == codes[0].tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_largest_code_of_one_column_touches_no_other(bits: int) -> None:
    for k in (0, 1, 10, 21, 31):
        codes = np.zeros((1, 32), np.uint8)
        codes[0, k] = 2**bits - 1
        bits_set = sum(int(word).bit_count() for word in pack(codes, bits=bits)[0])
        assert bits_set == bits


def test_pack_names_the_code_that_does_not_fit() -> None:
    with pytest.raises(FormatError, match="Code 9 does not fit in 3 bits") as caught:
        pack(np.full((1, 32), 9, np.uint8), bits=3)
    assert caught.value.code == "E4411"


def test_unpack_refuses_too_few_words() -> None:
    with pytest.raises(FormatError, match="A row has 2 words") as caught:
        unpack(np.zeros((1, 2), np.uint32), bits=3, columns=32)
    assert caught.value.code == "E4102"
    assert caught.value.why == "32 codes of 3 bits take 3 words"


def test_unpack_refuses_bits_behind_the_last_code() -> None:
    words = pack(codes_of(1, 2, 3), bits=3)
    words[0, 0] |= np.uint32(1 << 9)
    with pytest.raises(FormatError, match="Bits behind the last code are set") as caught:
        unpack(words, bits=3, columns=3)
    assert caught.value.code == "E4411"
