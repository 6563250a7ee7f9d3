"""What each operation of kernels/emulation/conformance.cu has to print, worked out with exact fractions.

Nothing here shares code with the emulation: numbers are `Fraction`s rounded by one function, fragments are placed by
the tables of the PTX manual, memory operations are array indexing. Values that are not numbers count as equal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

THREADS: Final = 128
BLOCK: Final = 64
NAN16: Final = 0x7FFF
NAN32: Final = 0x7FFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation as the program printed it.

    Attributes:
        compare: "exact", "ulp2" or "sum".
        given: (operands, THREADS) uint32.
        out: (results, THREADS) uint32.
    """

    compare: str
    given: Words
    out: Words


def read(text: str) -> dict[str, Operation]:
    """Operations by name, from the program's output."""
    header, *blocks = text.split("operation ")
    assert header.startswith("conformance 1 "), header
    operations = {}
    for block in blocks:
        title, *lines = block.strip().split("\n")
        name, compare = title.split()
        rows = [line.split() for line in lines]
        words = {
            kind: np.array(
                [[int(w, 16) for w in row[2:]] for row in rows if row[0] == kind], np.uint32
            )
            for kind in ("in", "out")
        }
        operations[name] = Operation(compare=compare, given=words["in"], out=words["out"])
    return operations


def read_file(path: Path) -> dict[str, Operation]:
    """Operations by name, from a file."""
    return read(path.read_text())


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A binary floating-point format.

    Attributes:
        mantissa: Stored bits of the fraction.
        exponent: Bits of the exponent.
    """

    mantissa: int
    exponent: int

    @property
    def width(self) -> int:
        """All bits."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What the stored exponent of 1.0 is."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def infinity(self) -> int:
        """Bits of plus infinity."""
        return ((1 << self.exponent) - 1) << self.mantissa

    def value(self, bits: int) -> Fraction | float:
        """The number that bits stand for; a float where it is infinite, not a number, or minus zero."""
        magnitude, negative = bits & ((1 << (self.width - 1)) - 1), bits >> (self.width - 1) & 1
        if magnitude >= self.infinity:
            return math.nan if magnitude > self.infinity else (-math.inf if negative else math.inf)
        if magnitude == 0:
            return -0.0 if negative else Fraction(0)
        stored, fraction = divmod(magnitude, 1 << self.mantissa)
        whole = fraction + (1 << self.mantissa if stored else 0)
        exact = whole * Fraction(2) ** (max(stored, 1) - self.bias - self.mantissa)
        return -exact if negative else exact

    def rounded(self, value: Fraction | float) -> int:
        """Bits of the nearest number, ties to even."""
        sign = 1 << (self.width - 1)
        if isinstance(value, float):
            if math.isnan(value):
                return NAN16 if self.width == 16 else NAN32
            return (sign if math.copysign(1, value) < 0 else 0) | (self.infinity if value else 0)
        exponent = 1 - self.bias
        while abs(value) >= Fraction(2) ** (exponent + 1) and exponent <= self.bias:
            exponent += 1
        count = round(abs(value) / Fraction(2) ** (exponent - self.mantissa))  # half to even
        code = ((exponent + self.bias - 1) << self.mantissa) + count
        return (sign if value < 0 else 0) | min(code, self.infinity)


F16: Final = Format(mantissa=10, exponent=5)
BF16: Final = Format(mantissa=7, exponent=8)
F32: Final = Format(mantissa=23, exponent=8)

Number = Fraction | float


def is_plain(*numbers: Number) -> bool:
    """True for fractions other than zero: only those need no rule about signs."""
    return all(isinstance(number, Fraction) and number for number in numbers)


def product(a: Number, b: Number) -> Number:
    """Exact, with the signs and infinities of IEEE 754."""
    return a * b if is_plain(a, b) else float(_sign_and_size(a) * _sign_and_size(b))


def total(a: Number, b: Number) -> Number:
    """Exact, with the signs and infinities of IEEE 754."""
    if any(isinstance(x, float) and not math.isfinite(x) for x in (a, b)):
        return _sign_and_size(a) + _sign_and_size(b)
    if a == 0 and b == 0:
        return float(a) + float(b)
    return Fraction(a) + Fraction(b)


def quotient(a: Number, b: Number) -> Number:
    """Exact, with the signs and infinities of IEEE 754."""
    if is_plain(a, b):
        return Fraction(a) / Fraction(b)
    with np.errstate(all="ignore"):
        return float(np.float64(_sign_and_size(a)) / np.float64(_sign_and_size(b)))


def _sign_and_size(a: Number) -> float:
    """0, 1 or infinity with the number's sign: enough where one factor is 0 or infinite."""
    if isinstance(a, float):
        return a
    return float((a > 0) - (a < 0))


def arithmetic(form: Format, function: Callable[..., Number]) -> Callable[[Words], Words]:
    """A reference for an operation on every number of a word: one for fp32, a pair for 16 bits."""

    def one(*bits: int) -> int:
        return form.rounded(function(*(form.value(b) for b in bits)))

    def all_words(given: Words) -> Words:
        numbers = given.view(np.uint16) if form.width == 16 else given
        results = [one(*(int(bits) for bits in column)) for column in numbers.T]
        return np.array(results, numbers.dtype).view(np.uint32)[None]

    return all_words


def conversion(source: Format, target: Format) -> Callable[[Words], Words]:
    """A reference for the low half, or the whole, of each word in another format."""
    mask = (1 << source.width) - 1
    return lambda given: np.array(
        [[target.rounded(source.value(int(word) & mask)) for word in given[0]]], np.uint32
    )


def matrices(given: Words, *, depth: int) -> tuple[NDArray[np.uint32], ...]:
    """Raw elements of A (warps, 16, depth), B (warps, depth, 8), and C (warps, 16, 8) as words."""
    per_word = depth // 8
    bits = 32 // per_word
    warps = given.shape[1] // 32
    a, b = np.zeros((warps, 16, depth), np.uint32), np.zeros((warps, depth, 8), np.uint32)
    c = np.zeros((warps, 16, 8), np.uint32)
    for warp in range(warps):
        for lane in range(32):
            words, (g, t) = given[:, 32 * warp + lane], divmod(lane, 4)
            for i in range(4 * per_word):  # the manual's index of an element of A in a lane
                row = g + 8 * (i // per_word % 2)
                column = per_word * t + i % per_word + (depth // 2 if i >= 2 * per_word else 0)
                a[warp, row, column] = words[i // per_word] >> (bits * (i % per_word))
            for i in range(2 * per_word):
                row = per_word * t + i % per_word + (depth // 2 if i >= per_word else 0)
                b[warp, row, g] = words[4 + i // per_word] >> (bits * (i % per_word))
            for i in range(4):
                c[warp, g + 8 * (i // 2), 2 * t + i % 2] = words[6 + i]
    mask = np.uint32((1 << bits) - 1)
    return a & mask, b & mask, c


def fragments_of(c: NDArray[np.uint32]) -> Words:
    """C (warps, 16, 8) as the four words of every lane."""
    out = np.zeros((4, 32 * len(c)), np.uint32)
    for warp, lane, i in np.ndindex(len(c), 32, 4):
        out[i, 32 * warp + lane] = c[warp, lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]
    return out


def mma_sums(given: Words, form: Format) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A B + C in fp64, and the sum of the sizes of its terms; both as (4, THREADS)."""
    a, b, c = matrices(given, depth=16)
    numbers = np.vectorize(lambda bits: float(form.value(int(bits))), otypes=[np.float64])
    a, b, c = numbers(a), numbers(b), c.view(np.float32).astype(np.float64)
    exact, sizes = a @ b + c, np.abs(a) @ np.abs(b) + np.abs(c)
    order = fragments_of(np.arange(exact.size, dtype=np.uint32).reshape(exact.shape))
    return exact.reshape(-1)[order], sizes.reshape(-1)[order]


def mma_integers(form: Format) -> Callable[[Words], Words]:
    """A reference for sums that are exact in fp32 in any order."""
    return lambda given: mma_sums(given, form)[0].astype(np.float32).view(np.uint32)


def mma_s8(given: Words) -> Words:
    """A B + C in integers that wrap at 32 bits."""
    a, b, c = matrices(given, depth=32)
    signed = [x.astype(np.uint8).view(np.int8).astype(np.int64) for x in (a, b)]
    sums = signed[0] @ signed[1] + c.view(np.int32).astype(np.int64)
    return fragments_of((sums & 0xFFFFFFFF).astype(np.uint32))


def shuffle_xor(given: Words) -> Words:
    lanes = np.arange(THREADS)
    return np.stack([given[0][lanes ^ mask] for mask in (1, 2, 4, 8, 16, 31)])


def ldmatrix4(given: Words) -> Words:
    out = np.zeros((4, THREADS), np.uint32)
    for thread in range(THREADS):
        warp, lane = thread // 32 * 32, thread % 32
        for i in range(4):  # row lane // 4 of matrix i lies where lane 8 i + lane // 4 says
            row = int(given[4, warp + 8 * i + lane // 4]) % 32
            out[i, thread] = given[lane % 4, warp + row]
    return out


def shared(given: Words) -> Words:
    out = np.zeros((7, THREADS), np.uint32)
    for thread in range(THREADS):
        block, t = thread // BLOCK * BLOCK, thread % BLOCK
        pair = (t ^ 33) % 32
        out[0:2, thread] = given[0, block + 2 * pair : block + 2 * pair + 2]
        word = t ^ 37
        out[2, thread] = given[1 + word % 4, block + word // 4]
        out[3:7, thread] = given[1:5, block + (t ^ 34)]
    return out


def cp_async(given: Words) -> Words:
    words = given.reshape(-1)
    out = np.zeros((8, THREADS), np.uint32)
    for thread in range(THREADS):
        block, t = thread // BLOCK, thread % BLOCK
        for group in range(2):
            writer = t ^ (33 + group)
            begin = 4 * (group * 32 + writer % 32) + THREADS * block
            if writer % 5 != group:
                out[4 * group : 4 * group + 4, thread] = words[begin : begin + 4]
    return out


def cp_async8(given: Words) -> Words:
    words = given.reshape(-1)
    out = np.zeros((2, THREADS), np.uint32)
    for thread in range(THREADS):
        block, writer = thread // BLOCK, thread % BLOCK ^ 33
        if writer % 3 != 1:
            out[:, thread] = words[2 * writer + THREADS * block :][:2]
    return out


def wide_loads(given: Words) -> Words:
    words = given.reshape(-1)
    at = 4 * (np.arange(THREADS) ^ 7)
    a = [words[at + i] for i in range(4)]
    b = [words[at + THREADS + i] for i in range(4)]
    d = [words[at + 2 * THREADS + i] for i in range(2)]
    return np.stack([*a, b[0] ^ b[3], b[1] ^ b[2], a[2] ^ a[3], d[0] ^ d[1]])


def narrow_loads(given: Words) -> Words:
    word = given[0][np.arange(THREADS) ^ 5]
    bytes_of = [word >> (8 * i) & 0xFF for i in range(4)]
    return np.stack([word, word, word, word & 0xFFFF, word >> 16, *bytes_of[:2], bytes_of[3]])


def stores(given: Words) -> Words:
    out = np.zeros(7 * THREADS, np.uint32)
    out[:THREADS] = (given[0] & 0xFFFF) | given[1] << 16
    out[THREADS : 3 * THREADS] = given[2:4].reshape(-1)
    for t in range(0, THREADS, 2):
        out[3 * THREADS + 2 * t :][:2] = given[:2, t]
        out[5 * THREADS + 2 * t :][:4] = given[:4, t]
    return out.reshape(7, THREADS)


def tickets(given: Words) -> Words:
    out = np.zeros((3, THREADS), np.uint32)
    out[0], out[2, 0] = 3 * np.arange(THREADS), 3 * THREADS
    return out


def places(given: Words) -> Words:
    thread = np.arange(THREADS, dtype=np.uint32)
    block, index = np.divmod(thread, BLOCK)
    zeros = np.zeros(THREADS, np.uint32)
    threads, blocks = zeros + BLOCK, zeros + THREADS // BLOCK
    return np.stack(
        [index, threads, block, zeros, zeros, blocks, index % 32, index // 32, block]
    ).astype(np.uint32)


def rint_to_int(given: Words) -> Words:
    def one(value: Number) -> int:
        if isinstance(value, float):
            return 0 if value == 0 or math.isnan(value) else int(math.copysign(1 << 31, value))
        return round(value)

    integers = [min(max(one(F32.value(int(w))), -(1 << 31)), (1 << 31) - 1) for w in given[0]]
    return (np.array([integers]) & 0xFFFFFFFF).astype(np.uint32)


EXACT: Final[dict[str, Callable[[Words], Words]]] = {
    "f16_add2": arithmetic(F16, total),
    "f16_mul2": arithmetic(F16, product),
    "f16_fma2": arithmetic(F16, lambda a, b, c: total(product(a, b), c)),
    "f16_to_float": conversion(F16, F32),
    "f16_from_float": conversion(F32, F16),
    "bf16_add2": arithmetic(BF16, total),
    "bf16_mul2": arithmetic(BF16, product),
    "bf16_fma2": arithmetic(BF16, lambda a, b, c: total(product(a, b), c)),
    "bf16_to_float": conversion(BF16, F32),
    "bf16_from_float": conversion(F32, BF16),
    "f32_add": arithmetic(F32, total),
    "f32_mul": arithmetic(F32, product),
    "f32_fma": arithmetic(F32, lambda a, b, c: total(product(a, b), c)),
    "f32_div": arithmetic(F32, quotient),
    "f32_rint_to_int": rint_to_int,
    "int_to_float": lambda given: given.view(np.int32).astype(np.float32).view(np.uint32),
    "and_or": lambda given: (given[:1] & given[1:2]) | given[2:3],
    "mma_f16_integers": mma_integers(F16),
    "mma_bf16_integers": mma_integers(BF16),
    "mma_s8": mma_s8,
    "shuffle_xor": shuffle_xor,
    "ldmatrix4": ldmatrix4,
    "shared": shared,
    "cp_async": cp_async,
    "cp_async8": cp_async8,
    "wide_loads": wide_loads,
    "narrow_loads": narrow_loads,
    "stores": stores,
    "tickets": tickets,
    "places": places,
}
"""By name, the words that an operation has to give, from the words it is given."""


def differences(name: str, out: Words, expected: Words) -> int:
    """Results that differ; two results that are not numbers count as equal."""
    if name.startswith(("f16_", "bf16_")) and not name.endswith("to_float"):
        infinity = F16.infinity if name.startswith("f16_") else BF16.infinity
        both_nan = [(x.view(np.uint16) & 0x7FFF) > infinity for x in (out, expected)]
        return int(
            ((out.view(np.uint16) != expected.view(np.uint16)) & ~(both_nan[0] & both_nan[1])).sum()
        )
    if "float" in name or (name.startswith(("f32_", "mma_f", "mma_b")) and "int" not in name):
        both_nan = [(x & 0x7FFFFFFF) > F32.infinity for x in (out, expected)]
        return int(((out != expected) & ~(both_nan[0] & both_nan[1])).sum())
    return int((out != expected).sum())
