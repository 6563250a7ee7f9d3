"""3-bit tiles: examples by hand, golden bytes, a map that hits every bit once, and packing back and forth."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq_export.errors import FormatError
from mbq_export.schemes.layouts import LAYOUTS
from mbq_export.schemes.layouts.w3t import LAYOUT, TILE_BYTES, pack, place_of, unpack
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
        (0, 0, [(0, 0), (0, 1), (0, 2)]),
        (10, 45, [(155, 1), (155, 2), (155, 3)]),
        (15, 62, [(497, 7), (501, 7), (505, 7)]),
        (8, 96, [(513, 4), (513, 5), (513, 6)]),
        (3, 127, [(639, 4), (639, 5), (639, 6)]),
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
    assert pack(codes, bits=3).tobytes() == bytes(expected)


def test_golden_bytes_of_version_1() -> None:
    found = pack(golden_tile(3), bits=3).astype("<u4").tobytes()
    assert len(found) == TILE_BYTES == 768
    assert found.hex().startswith("8044ed9fb481d9da12e97f328044ed9f")
    assert hashlib.sha256(found).hexdigest().startswith("134c22adb56bf456")
    assert (LAYOUT.name, LAYOUT.version) == ("w3t", 1)
    assert LAYOUTS["w3t"] is LAYOUT


def test_codes_hit_every_bit_of_a_tile_once() -> None:
    places = every_place(place_of)
    assert len(places) == 8 * TILE_BYTES
    assert set(places) == {(byte, bit) for byte in range(TILE_BYTES) for bit in range(8)}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_every_code_lies_where_the_map_says(seed: int) -> None:
    codes = random_codes(seed, bits=3, shape=(16, 128))
    tile = pack(codes, bits=3).astype("<u4").tobytes()
    found = [[read_code(tile, place_of, n, k) for k in range(128)] for n in range(16)]
    assert found == codes.tolist()


def test_a_tile_does_not_depend_on_its_neighbours() -> None:
    codes = random_codes(0, bits=3, shape=(48, 384))
    words = pack(codes, bits=3)
    for down in range(3):
        for across in range(3):
            alone = codes[16 * down : 16 * down + 16, 128 * across : 128 * across + 128]
            assert pack(alone, bits=3)[0, 0].tolist() == words[down, across].tolist()


@settings(max_examples=30, deadline=None)
@given(down=st.integers(1, 5), across=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_unpack_returns_every_code(down: int, across: int, seed: int) -> None:
    codes = random_codes(seed, bits=3, shape=(16 * down, 128 * across))
    words = pack(codes, bits=3)
    assert words.shape == (down, across, 192)
    assert words.dtype == np.uint32
    np.testing.assert_array_equal(unpack(words, bits=3, columns=128 * across), codes)


@pytest.mark.parametrize("columns", MODEL_COLUMNS)
def test_the_widths_of_real_models_come_back(columns: int) -> None:
    codes = random_codes(columns, bits=3, shape=(16, columns))
    words = pack(codes, bits=3)
    assert 32 * words.size == 3 * codes.size
    np.testing.assert_array_equal(unpack(words, bits=3, columns=columns), codes)


@pytest.mark.parametrize("fill", FILLS)
def test_extreme_codes_come_back(fill: str) -> None:
    codes = FILLS[fill](32, 256, 7)
    words = pack(codes, bits=3)
    np.testing.assert_array_equal(unpack(words, bits=3, columns=256), codes)
    bits_set = int(np.bitwise_count(words).sum())
    assert bits_set == int(np.bitwise_count(codes).sum())


def test_a_code_of_four_bits_is_named() -> None:
    with pytest.raises(FormatError, match="Code 8 does not fit in 3 bits") as caught:
        pack(np.full((16, 128), 8, np.uint8), bits=3)
    assert caught.value.code == "E4411"


@pytest.mark.parametrize(("rows", "columns", "bits"), [(15, 128, 3), (16, 127, 3), (16, 128, 4)])
def test_codes_that_fill_no_tile_are_refused(rows: int, columns: int, bits: int) -> None:
    with pytest.raises(FormatError, match=f"{rows} x {columns} codes of {bits} bits") as caught:
        pack(np.zeros((rows, columns), np.uint8), bits=bits)
    assert caught.value.code == "E4102"
    assert caught.value.why == "a tile is 16 x 128 codes of 3 bits"


@pytest.mark.parametrize(
    ("shape", "columns", "bits"),
    [((1, 1, 191), 128, 3), ((1, 192), 128, 3), ((1, 1, 192), 256, 3), ((1, 1, 192), 128, 4)],
)
def test_words_of_another_shape_are_refused(
    shape: tuple[int, ...], columns: int, bits: int
) -> None:
    with pytest.raises(FormatError, match="are no tiles of") as caught:
        unpack(np.zeros(shape, np.uint32), bits=bits, columns=columns)
    assert caught.value.code == "E4102"
