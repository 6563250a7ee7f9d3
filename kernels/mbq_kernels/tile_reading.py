"""How Triton reads the tiles: one row of a tensor is one lane of a warp (picture: docs/formats/tiles.md).

    lane = 4 * g + t owns rows g and g + 8 of a tile and, in each block b of 32 columns, columns 8 t .. 8 t + 7

so codes come as (R, 8): R lanes of one or more tiles, 8 columns of one block, natural column order, one half (row g
or row g + 8). ``R = 8 g`` groups of ``t = 4``: a plain reshape to (R / 4, 32) is rows by the 32 columns of the block.
Functions of this file are compiled into the kernels that call them.
"""

from typing import Final

import triton
import triton.language as tl

W3_TILE_WORDS: Final = tl.constexpr(192)
W4_TILE_WORDS: Final = tl.constexpr(256)


@triton.jit
def vector4(pointer, at, mask):
    """Four words from each of the addresses ``at`` (R,) on, as one 16-byte load per lane."""
    offsets = at[:, None] + tl.arange(0, 4)[None, :]
    words = tl.load(pointer + offsets, mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(words, (words.shape[0], 2, 2)))  # words 0 2, words 1 3
    word0, word2 = tl.split(even)
    word1, word3 = tl.split(odd)
    return word0, word1, word2, word3


@triton.jit
def vector2(pointer, at, mask):
    """Two words from each of the addresses ``at`` (R,) on, as one 8-byte load per lane."""
    offsets = at[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(pointer + offsets, mask=mask[:, None], other=0))


@triton.jit
def w3_words(codes_ptr, tile, lane, mask):
    """Six words of each lane (R,) of layout w3t."""
    base = tile * W3_TILE_WORDS
    word0, word1, word2, word3 = vector4(codes_ptr, base + lane * 4, mask)
    word4, word5 = vector2(codes_ptr, base + 128 + lane * 2, mask)
    return word0, word1, word2, word3, word4, word5


@triton.jit
def w3_columns(word0, word1, word2, B: tl.constexpr, HALF: tl.constexpr):
    """(R, 8) codes of block B from its triple of words: j counts the 16 pairs of codes of a triple."""
    column = tl.arange(0, 8)[None, :]
    low = 16 * (column % 2)
    j = 8 * (B % 2) + 2 * (column // 2) + HALF
    word = tl.where(j < 5, word0[:, None], tl.where(j < 10, word1[:, None], word2[:, None]))
    codes = (word >> (low + 3 * (j % 5))) & 7
    if B % 2 == 1 and HALF == 1:
        # The sixteenth pair has one bit in the top of each half of each word.
        top = low + 15
        bit0, bit1 = (word0[:, None] >> top) & 1, (word1[:, None] >> top) & 1
        last = bit0 | (bit1 << 1) | (((word2[:, None] >> top) & 1) << 2)
        codes = tl.where(j == 15, last, codes)
    return codes


@triton.jit
def w4_words(codes_ptr, tile, lane, mask):
    """Eight words of each lane (R,) of layout w4t; word 2 b + half belongs to block b."""
    base = tile * W4_TILE_WORDS + lane * 4
    word0, word1, word2, word3 = vector4(codes_ptr, base, mask)
    word4, word5, word6, word7 = vector4(codes_ptr, base + 128, mask)
    return word0, word1, word2, word3, word4, word5, word6, word7


@triton.jit
def w4_columns(word):
    """(R, 8) nibbles of one word: byte c(j) holds columns j (high nibble) and 4 + j, c = [0, 2, 1, 3]."""
    column = tl.arange(0, 8)[None, :]
    byte = 2 * (column % 2) + column // 2 % 2
    return (word[:, None] >> (8 * byte + 4 * (1 - column // 4))) & 15


@triton.jit
def group_scale(scales_ptr, group, g, mask, HALF: tl.constexpr):
    """(R,) fp32 scales of rows g + 8 HALF; ``group`` counts groups over all n-tiles."""
    return tl.load(scales_ptr + (group * 8 + g) * 2 + HALF, mask=mask, other=0).to(tl.float32)


@triton.jit
def group_zeros(zeros_ptr, group, g, mask):
    """Two (R,) fp32 zero points plus 2**23 (see `integers`), of rows g and g + 8, from one byte."""
    both = tl.load(zeros_ptr + group * 8 + g, mask=mask, other=0).to(tl.int32)
    return as_float(both & 15), as_float(both >> 4)


@triton.jit
def as_float(codes):
    """Small integers u as fp32 2**23 + u, exact: one OR, where a conversion runs at a quarter of the rate."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def integers(codes, zero):
    """(R, 8) fp32 weights u - z, exact, of codes (R, 8) and zero points (R,) that carry their 2**23."""
    return as_float(codes) - zero[:, None]
