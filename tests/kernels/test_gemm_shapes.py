"""Shared memory of the gemm's blocks: it fits the devices, and a warp's loads meet no bank twice."""

import functools
import subprocess
from typing import Final

import pytest

from tests.kernels.emulated import CASES, EMULATION, compiled
from tests.kernels.emulated_linear import Emulator

SMALL_BLOCK_BYTES: Final = 99 * 1024
"""Shared memory that a block may have on SM 86, 89 and 120."""
H100_BLOCK_BYTES: Final = 227 * 1024
H100_SM_BYTES: Final = 228 * 1024
RESERVED_BYTES: Final = 1024
"""What each block costs besides its own."""
WIDEST: Final = 116
"""The one config that the small devices cannot have."""
DEFAULT_LARGE: Final = 112
BANKS: Final = 32
SCHEME_NUMBERS: Final = ("1", "2", "3")


@functools.cache
def printed() -> list[list[str]]:
    program = compiled("gemm_shapes", [CASES / "gemm_shapes.cu", *EMULATION], flags=())
    made = subprocess.run([program], capture_output=True, text=True, check=True)
    return [line.split() for line in made.stdout.splitlines()]


def shared_bytes() -> dict[tuple[int, str], int]:
    """By config and scheme number."""
    return {(int(row[1]), row[2]): int(row[3]) for row in printed() if row[0] == "config"}


def swizzled(column: int) -> dict[tuple[int, int], int]:
    """Address within a panel by row and 16-byte chunk."""
    return {(int(row[1]), int(row[2])): int(row[column]) for row in printed() if row[0] == "chunk"}


def test_every_block_fits_an_h100_and_all_but_one_fit_every_device() -> None:
    for (config, _), size in shared_bytes().items():
        assert size <= (H100_BLOCK_BYTES if config == WIDEST else SMALL_BLOCK_BYTES), config


def test_two_blocks_of_the_default_for_many_tokens_fit_an_h100() -> None:
    for scheme in SCHEME_NUMBERS:
        size = shared_bytes()[DEFAULT_LARGE, scheme]
        assert 2 * (size + RESERVED_BYTES) <= H100_SM_BYTES


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        # Four stages of X, 128 rows of 128 bytes; three tiles of eight: codes, four groups of 32 and 8 bytes.
        ("1", 4 * 128 * 128 + 3 * 8 * (768 + 4 * 40)),
        ("2", 4 * 128 * 128 + 3 * 8 * (1024 + 4 * 40)),
        # A stage is a whole tile of columns, so there are four tiles; one group of scales, no zeros.
        ("3", 4 * 128 * 128 + 4 * 8 * (1024 + 32)),
    ],
)
def test_the_rings_are_as_long_as_drawn(scheme: str, expected: int) -> None:
    assert shared_bytes()[DEFAULT_LARGE, scheme] == expected


def test_there_is_a_ticket_for_each_block_of_outputs_if_k_is_split() -> None:
    configs = {config["id"]: config for config in Emulator.unbroken().library.configs()}
    tickets = {int(row[1]): int(row[4]) for row in printed() if row[0] == "config"}
    for number, found in tickets.items():
        shape = configs[number]
        blocks = -(-1000 // (16 * shape["n_tiles"])) * -(-100 // shape["rows"])
        assert found == (blocks if shape["splits"] > 1 else 0)


def test_every_chunk_of_a_panel_has_a_place_of_its_own() -> None:
    for column in (3, 4):
        places = swizzled(column)
        assert sorted(places.values()) == list(range(0, 8 * 128, 16))
        assert all(128 * row <= place < 128 * (row + 1) for (row, _), place in places.items())


def test_fragment_loads_of_16_bit_rows_meet_no_bank_twice() -> None:
    places = swizzled(3)
    for first_lane in range(0, 32, 8):  # sixteen bytes per lane: eight lanes at a time
        for block in range(2):
            starts = [
                places[lane // 4, 4 * block + lane % 4]
                for lane in range(first_lane, first_lane + 8)
            ]
            banks = {(start // 4 + word) % BANKS for start in starts for word in range(4)}
            assert len(banks) == BANKS


def test_fragment_loads_of_int8_rows_meet_no_bank_twice() -> None:
    places = swizzled(4)
    for first_lane in (0, 16):  # eight bytes per lane: sixteen lanes at a time
        for block in range(4):
            starts = [
                places[lane // 4, 2 * block + lane % 4 // 2] + 8 * (lane % 2)
                for lane in range(first_lane, first_lane + 16)
            ]
            banks = {(start // 4 + word) % BANKS for start in starts for word in range(2)}
            assert len(banks) == BANKS
