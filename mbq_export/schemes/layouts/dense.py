"""One bit stream per row: bit e of code k is bit ``k * bits + e``, and no bit is wasted.

    bits = 3    word 0   codes 0..9, low 2 bits of code 10
                word 1   high bit of code 10, codes 11..20, low bit of code 21
                word 2   high 2 bits of code 21, codes 22..31

Serves every width and any K; the tail of the last word is 0. The canonical form of checkpoints.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import FormatError
from mbq_export.schemes.layouts.base import Layout

WORD_BITS: Final = 32


def words_per_row(columns: int, bits: int) -> int:
    """Words that hold a row of ``columns`` codes."""
    return -(-columns * bits // WORD_BITS)


def pack(codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint32]:
    """Pack codes into words.

    Args:
        codes: (N, K) uint8, each below ``2**bits``.
        bits: Width of a code, 1 .. 8.

    Returns:
        (N, ceil(K * bits / 32)) uint32.

    Raises:
        FormatError: E4411 if a code does not fit.
    """
    if codes.max(initial=0) >> bits:
        raise FormatError(
            "E4411",
            f"Code {codes.max()} does not fit in {bits} bits.",
            why=f"codes are below {2**bits}",
            fix="quantize before packing",
        )
    rows, columns = codes.shape
    stream = np.zeros((rows, words_per_row(columns, bits) * WORD_BITS), np.uint8)
    stream[:, : columns * bits] = np.unpackbits(
        codes[..., None], axis=-1, count=bits, bitorder="little"
    ).reshape(rows, columns * bits)
    packed = np.packbits(stream, axis=-1, bitorder="little")
    return packed.view("<u4").astype(np.uint32, copy=False)


def unpack(words: NDArray[np.uint32], *, bits: int, columns: int) -> NDArray[np.uint8]:
    """Undo `pack`.

    Args:
        words: (N, ceil(K * bits / 32)) uint32.
        bits: Width of a code, 1 .. 8.
        columns: K.

    Returns:
        (N, K) uint8.

    Raises:
        FormatError: E4102 if the words cannot hold K codes, E4411 if tail bits are set.
    """
    if words.shape[1] != words_per_row(columns, bits):
        raise FormatError(
            "E4102",
            f"A row has {words.shape[1]} words.",
            why=f"{columns} codes of {bits} bits take {words_per_row(columns, bits)} words",
            fix="quantize the model again",
        )
    little = np.ascontiguousarray(words.astype("<u4", copy=False)).view(np.uint8)
    stream = np.unpackbits(little, axis=-1, bitorder="little")
    if stream[:, columns * bits :].any():
        raise FormatError(
            "E4411",
            "Bits behind the last code are set.",
            why="the tail of a row is zero",
            fix="quantize the model again",
        )
    per_code = stream[:, : columns * bits].reshape(words.shape[0], columns, bits)
    codes: NDArray[np.uint8] = np.packbits(per_code, axis=-1, bitorder="little")[..., 0]
    return codes


LAYOUT: Final = Layout(name="dense", version=1, pack=pack, unpack=unpack)
