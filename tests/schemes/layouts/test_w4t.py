"""4-bit tiles: examples by hand, golden bytes, a map that hits every bit once, and packing back and forth."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mbq_export.errors import FormatError
from mbq_export.schemes.layouts import LAYOUTS
from mbq_export.schemes.layouts.w4t import LAYOUT, ORDER, TILE_BYTES, pack, place_of, unpack
from tests.schemes.layouts.one_tile import (
    FILLS,
    MODEL_COLUMNS,
    every_place,
    golden_tile,
    random_codes,
    read_code,
)


@pytest.mark.parametrize(
    ("n", "k", "places"),
    [
        (0, 0, [(0, 4), (0, 5), (0, 6), (0, 7)]),
        (10, 45, [(158, 0), (158, 1), (158, 2), (158, 3)]),
        (15, 62, [(509, 0), (509, 1), (509, 2), (509, 3)]),
        (8, 96, [(524, 4), (524, 5), (524, 6), (524, 7)]),
    ],
)
def test_a_single_code_sets_the_bits_of_the_worked_example(
    n: int, k: int, places: list[tuple[int, int]]
) -> None:
    assert place_of(n, k) == places
    codes = np.zeros((16, 128), np.uint8)
    codes[n, k] = 0b101
    expected = bytearray(TILE_BYTES)
    for bit in (0, 2):
        byte, place = places[bit]
        expected[byte] |= 1 << place
    assert pack(codes, bits=4).tobytes() == bytes(expected)


def test_golden_bytes_of_version_1() -> None:
    found = pack(golden_tile(4), bits=4).astype("<u4").tobytes()
    assert len(found) == TILE_BYTES == 1024
    assert found.hex().startswith("04ae59f38c26d17b04ae59f38c26d17b")
    assert hashlib.sha256(found).hexdigest().startswith("50e2ca7db23cd320")
    assert (LAYOUT.name, LAYOUT.version) == ("w4t", 1)
    assert LAYOUTS["w4t"] is LAYOUT


def test_codes_hit_every_bit_of_a_tile_once() -> None:
    places = every_place(place_of)
    assert len(places) == 8 * TILE_BYTES
    assert set(places) == {(byte, bit) for byte in range(TILE_BYTES) for bit in range(8)}


def lane_word(words: NDArray[np.uint32], lane: int, word: int) -> int:
    """Word 2*b + half of a lane, from two planes of four words per lane."""
    return int(words[0, 0, 128 * (word // 4) + 4 * lane + word % 4])


def test_two_masks_turn_a_word_into_signed_bytes_of_sixteen_times_the_weight() -> None:
    """FORMATS 6: the int8 path reads high nibbles (s = 0) and low nibbles (s = 1) without further work."""
    q = random_codes(1, bits=4, shape=(16, 128)).astype(np.int16) - 8
    words = pack((q & 15).astype(np.uint8), bits=4)
    for lane, word in itertools.product(range(32), range(8)):
        block, half = divmod(word, 2)
        row, column = 8 * half + lane // 4, 32 * block + 8 * (lane % 4)
        found = lane_word(words, lane, word)
        for s, masked in enumerate((found & 0xF0F0F0F0, found << 4 & 0xF0F0F0F0)):
            bytes_ = np.array([masked], "<u4").view(np.int8)
            expected = 16 * q[row, column + 4 * s + np.array(ORDER)]
            assert bytes_.tolist() == expected.tolist()


def test_four_shifts_turn_a_word_into_pairs_in_the_order_of_columns() -> None:
    """FORMATS 6: the 16-bit path."""
    codes = random_codes(2, bits=4, shape=(16, 128))
    words = pack(codes, bits=4)
    for lane, word in itertools.product(range(32), range(8)):
        block, half = divmod(word, 2)
        row, column = 8 * half + lane // 4, 32 * block + 8 * (lane % 4)
        found = lane_word(words, lane, word)
        pairs = [found >> shift & 0x000F000F for shift in (4, 12, 0, 8)]
        eight = [part for pair in pairs for part in (pair & 0xFFFF, pair >> 16)]
        assert eight == codes[row, column : column + 8].tolist()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_every_code_lies_where_the_map_says(seed: int) -> None:
    codes = random_codes(seed, bits=4, shape=(16, 128))
    tile = pack(codes, bits=4).astype("<u4").tobytes()
    found = [[read_code(tile, place_of, n, k) for k in range(128)] for n in range(16)]
    assert found == codes.tolist()


def test_a_tile_does_not_depend_on_its_neighbours() -> None:
    codes = random_codes(0, bits=4, shape=(48, 384))
    words = pack(codes, bits=4)
    for down in range(3):
        for across in range(3):
            alone = codes[16 * down : 16 * down + 16, 128 * across : 128 * across + 128]
            assert pack(alone, bits=4)[0, 0].tolist() == words[down, across].tolist()


@settings(max_examples=30, deadline=None)
@given(down=st.integers(1, 5), across=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_unpack_returns_every_code(down: int, across: int, seed: int) -> None:
    codes = random_codes(seed, bits=4, shape=(16 * down, 128 * across))
    words = pack(codes, bits=4)
    assert words.shape == (down, across, 256)
    assert words.dtype == np.uint32
    np.testing.assert_array_equal(unpack(words, bits=4, columns=128 * across), codes)


@pytest.mark.parametrize("columns", MODEL_COLUMNS)
def test_the_widths_of_real_models_come_back(columns: int) -> None:
    codes = random_codes(columns, bits=4, shape=(16, columns))
    words = pack(codes, bits=4)
    assert 32 * words.size == 4 * codes.size
    np.testing.assert_array_equal(unpack(words, bits=4, columns=columns), codes)


@pytest.mark.parametrize("fill", FILLS)
def test_extreme_codes_come_back(fill: str) -> None:
    codes = FILLS[fill](32, 256, 15)
    words = pack(codes, bits=4)
    np.testing.assert_array_equal(unpack(words, bits=4, columns=256), codes)
    bits_set = int(np.bitwise_count(words).sum())
    assert bits_set == int(np.bitwise_count(codes).sum())


def test_a_code_of_five_bits_is_named() -> None:
    with pytest.raises(FormatError, match="Code 16 does not fit in 4 bits") as caught:
        pack(np.full((16, 128), 16, np.uint8), bits=4)
    assert caught.value.code == "E4411"


@pytest.mark.parametrize(("rows", "columns", "bits"), [(15, 128, 4), (16, 127, 4), (16, 128, 3)])
def test_codes_that_fill_no_tile_are_refused(rows: int, columns: int, bits: int) -> None:
    with pytest.raises(FormatError, match=f"{rows} x {columns} codes of {bits} bits") as caught:
        pack(np.zeros((rows, columns), np.uint8), bits=bits)
    assert caught.value.code == "E4102"
    assert caught.value.why == "a tile is 16 x 128 codes of 4 bits"


@pytest.mark.parametrize(
    ("shape", "columns", "bits"),
    [((1, 1, 255), 128, 4), ((1, 256), 128, 4), ((1, 1, 256), 256, 4), ((1, 1, 256), 128, 3)],
)
def test_words_of_another_shape_are_refused(
    shape: tuple[int, ...], columns: int, bits: int
) -> None:
    with pytest.raises(FormatError, match="are no tiles of") as caught:
        unpack(np.zeros(shape, np.uint32), bits=bits, columns=columns)
    assert caught.value.code == "E4102"
