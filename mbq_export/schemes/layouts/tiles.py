"""Tiles of 16 rows by 128 columns, ordered as one warp reads them: what every kernel layout shares.

    n = 16*nt + 8*half + g                        g 0..7, half 0..1
    k = 128*kt + 32*b + 8*t + 4*s + 2*h + p       b 0..3, t 0..3, s, h, p 0..1
    lane = 4*g + t      slot = 8*b + 4*s + 2*h + half

A lane owns rows g and g + 8 and eight consecutive columns of each 32-column block. Slot r of step ``2*b + s`` is
register r of the A operand of ``mma.m16n8k16`` (PTX ISA, "Matrix Fragments"), p its low or high half.
The picture with all bytes is in docs/formats/tiles.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import FormatError, UsageError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight, QuantScheme, check_packed
from mbq_export.schemes.layouts import LAYOUTS, dense
from mbq_export.schemes.layouts.base import Layout

TILE_ROWS: Final = 16
TILE_COLUMNS: Final = 128
LANES: Final = 32
SLOTS: Final = 32
COLUMN_ALIGNMENT: Final = 8
"""A lane reads eight activations at once, so K must be a multiple."""
INT8_FACTOR: Final = 16
"""Kernels of 4-bit weights and int8 activations sum 16 * q: the nibble stays in the high half of its byte."""
ROWS_AT_ONCE: Final = 1024
"""Bounds the memory of packing: intermediate arrays take four bytes per weight."""
RowOrder = Literal["concat", "interleave16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """Where row n and column k of a tile lie in the warp's order (formulas above)."""

    half: int
    g: int
    b: int
    t: int
    s: int
    h: int
    p: int

    @property
    def lane(self) -> int:
        """Lane of the warp that owns the code, 0 .. 31."""
        return 4 * self.g + self.t

    @property
    def slot(self) -> int:
        """Which pair of codes of the lane, 0 .. 31; ``p`` tells the two apart."""
        return 8 * self.b + 4 * self.s + 2 * self.h + self.half


def coordinates(n: int, k: int) -> Coordinates:
    """Return the coordinates of row n (0 .. 15) and column k (0 .. 127) inside a tile."""
    return Coordinates(
        half=n // 8, g=n % 8, b=k // 32, t=k // 8 % 4, s=k // 4 % 2, h=k // 2 % 2, p=k % 2
    )


def nk_of(lane: int, slot: int, p: int) -> tuple[int, int]:
    """Return (n, k) inside a tile: the inverse of `coordinates`."""
    n = 8 * (slot % 2) + lane // 4
    k = 32 * (slot // 8) + 8 * (lane % 4) + 4 * (slot // 4 % 2) + 2 * (slot // 2 % 2) + p
    return n, k


def padded(size: int, multiple: int) -> int:
    """Round a size up to the next multiple."""
    return -(-size // multiple) * multiple


def check_tiles(codes: NDArray[np.uint8], *, bits: int, width: int) -> None:
    """Check that codes can be packed into whole tiles of ``width`` bits.

    Raises:
        FormatError: E4102 for another width or a shape that is no multiple of a tile, E4411 if a code does not fit.
    """
    rows, columns = codes.shape
    if bits != width or rows % TILE_ROWS or columns % TILE_COLUMNS:
        raise FormatError(
            "E4102",
            f"{rows} x {columns} codes of {bits} bits are no whole tiles.",
            why=f"a tile is {TILE_ROWS} x {TILE_COLUMNS} codes of {width} bits",
            fix="pad with codes 0",
        )
    if codes.max(initial=0) >> bits:
        raise FormatError(
            "E4411",
            f"Code {codes.max()} does not fit in {bits} bits.",
            why=f"codes are below {2**bits}",
            fix="quantize before packing",
        )


def check_words(words: NDArray[np.uint32], *, bits: int, width: int, columns: int) -> None:
    """Check the shape of packed tiles of ``width`` bits.

    Raises:
        FormatError: E4102 unless the words are (N / 16, columns / 128, 64 * bits).
    """
    tile_words = TILE_ROWS * TILE_COLUMNS * width // 32
    across = columns / TILE_COLUMNS
    if bits != width or words.ndim != 3 or words.shape[1:] != (across, tile_words):
        raise FormatError(
            "E4102",
            f"Words of shape {words.shape} are no tiles of {bits}-bit codes.",
            why=f"{columns} columns of {width}-bit codes take (N / 16, {across:g}, {tile_words}) words",
            fix="pack the weight again",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledWeight:
    """One linear as a kernel reads it: arrays are little-endian and ready to be copied to a device.

    Np and Kp are N and K rounded up to whole tiles; codes, scales and zero points of the padding are 0.

    Attributes:
        scheme: Name of the number format.
        n: N, not padded.
        k: K, not padded.
        group_size: Columns that share a scale; `CHANNEL` for one scale per output channel.
        codes: (Np / 16, Kp / 128, words of a tile) int32.
        scales: (Np / 16, Kp / G, 8, 2) float16, the last two axes being g and half; per channel (Np,) float32,
            a sixteenth of the scale, because such kernels sum 16 * q.
        zeros: (Np / 16, Kp / G, 2) int32, whose byte g is z[g] + 16 * z[g + 8]; None when symmetric.
        bias: (N,) as given, or None.
    """

    scheme: str
    n: int
    k: int
    group_size: int
    codes: NDArray[np.int32]
    scales: NDArray[np.float16] | NDArray[np.float32]
    zeros: NDArray[np.int32] | None
    bias: NDArray[np.floating] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weights reads: codes, scales and zero points."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros


def kernel_layout_of(scheme: QuantScheme) -> Layout:
    """The tiles that kernels of a scheme read.

    Raises:
        UsageError: E2006 if it has none.
    """
    if scheme.kernel_layout is None:
        with_kernels = [each.name for each in SCHEMES.members().values() if each.kernel_layout]
        raise UsageError(
            "E2006",
            f"No kernel multiplies weights of {scheme.name}.",
            why=f"kernels and plugins exist for {', '.join(with_kernels)}",
            fix=("--lowering qdq: standard operators", "--backend oracle, or ort", "--scheme w4a8"),
        )
    return LAYOUTS[scheme.kernel_layout]


def tile(weight: PackedWeight, *, scheme: QuantScheme) -> TiledWeight:
    """Lay a weight out as the kernels of its scheme read it.

    Args:
        weight: N by K, in layout ``dense``.
        scheme: Its number format.

    Raises:
        FormatError: E4102 or E4411 if the weight is not one of this scheme, or K is no multiple of 8.
        UsageError: E2004 for a group size that the scheme does not have, E2007 if K overflows int32 sums, E2006 if no
            kernel reads the scheme.
    """
    layout = kernel_layout_of(scheme)
    _check(weight, scheme)
    columns = padded(weight.k, TILE_COLUMNS)
    # A signed nibble is the two's complement of u - middle, so that the padding's 0 means 0 in every scheme.
    flip = np.uint8(scheme.middle if scheme.symmetric else 0)
    parts = []
    for start in range(0, weight.n, ROWS_AT_ONCE):
        words = weight.words[start : start + ROWS_AT_ONCE]
        codes = dense.unpack(words, bits=weight.bits, columns=weight.k) ^ flip
        whole = np.zeros((padded(len(codes), TILE_ROWS), columns), np.uint8)
        whole[: len(codes), : weight.k] = codes
        parts.append(layout.pack(whole, bits=weight.bits))
    return TiledWeight(
        scheme=scheme.name,
        n=weight.n,
        k=weight.k,
        group_size=weight.group_size,
        codes=_little(np.concatenate(parts)).view(np.int32),
        scales=tiled_scales(weight),
        zeros=None if weight.zeros is None else tiled_zeros(weight.zeros, weight),
        bias=weight.bias,
    )


def untile(tiled: TiledWeight) -> PackedWeight:
    """Undo `tile`.

    Raises:
        FormatError: E4102 for words of a wrong shape.
    """
    scheme = SCHEMES[tiled.scheme]
    layout = kernel_layout_of(scheme)
    columns = padded(tiled.k, TILE_COLUMNS)
    codes = layout.unpack(tiled.codes.view(np.uint32), bits=scheme.weight_bits, columns=columns)
    codes = codes[: tiled.n, : tiled.k] ^ np.uint8(scheme.middle if scheme.symmetric else 0)
    return PackedWeight(
        words=dense.pack(codes, bits=scheme.weight_bits),
        scales=_scales_of(tiled),
        zeros=None if tiled.zeros is None else _zeros_of(tiled.zeros, tiled),
        k=tiled.k,
        bits=scheme.weight_bits,
        group_size=tiled.group_size,
        bias=tiled.bias,
    )


def fused(parts: Sequence[PackedWeight], *, row_order: RowOrder = "concat") -> PackedWeight:
    """Make one weight of several that share their input: q, k and v, or gate and up.

        concat          rows of the first part, then of the second, ...
        interleave16    16 rows of gate, the same 16 rows of up, the next 16 of gate, ...

    Interleaved, both factors of ``silu(gate) * up`` meet in one block of a kernel, which writes N / 2 columns.

    Args:
        parts: Each N_i by K, N_i a multiple of 16, all of one format; two of equal N for ``interleave16``.
        row_order: How rows follow each other.

    Raises:
        FormatError: E4102 with the reason why the parts must stay separate.
    """
    reason = reason_to_keep_apart(parts, row_order=row_order)
    if reason is not None:
        raise FormatError(
            "E4102",
            f"Cannot fuse linears of {', '.join(str(part.n) for part in parts)} rows: {reason}.",
            why="fused linears share their input, their format and whole tiles",
            fix="keep them separate",
        )
    first = parts[0]
    return PackedWeight(
        words=_joined([part.words for part in parts], row_order),
        scales=_joined([part.scales for part in parts], row_order),
        zeros=None
        if first.zeros is None
        else _joined([part.zeros for part in parts if part.zeros is not None], row_order),
        k=first.k,
        bits=first.bits,
        group_size=first.group_size,
        bias=None
        if first.bias is None
        else _joined([part.bias for part in parts if part.bias is not None], row_order),
    )


def reason_to_keep_apart(parts: Sequence[PackedWeight], *, row_order: RowOrder) -> str | None:
    """Why parts cannot be one matrix, or None if they can."""
    checks = {
        "there are none": len(parts) > 0,
        "their inputs differ in width": len({part.k for part in parts}) <= 1,
        "their formats differ": len({_format(part) for part in parts}) <= 1,
        "only some have a bias": len({part.bias is None for part in parts}) <= 1,
        f"a part does not end with a tile of {TILE_ROWS} rows": all(
            part.n % TILE_ROWS == 0 for part in parts
        ),
        "interleaving takes two parts": row_order == "concat" or len(parts) == 2,
        "interleaving takes parts of equal size": row_order == "concat"
        or len({part.n for part in parts}) <= 1,
    }
    return next((reason for reason, fine in checks.items() if not fine), None)


def _check(weight: PackedWeight, scheme: QuantScheme) -> None:
    check_packed(weight)
    if weight.bits != scheme.weight_bits or (weight.zeros is None) != scheme.symmetric:
        zeros = "without" if weight.zeros is None else "with"
        raise FormatError(
            "E4102",
            f"A weight of {weight.bits} bits {zeros} zero points is not {scheme.name}.",
            why=f"{scheme.name} has {scheme.weight_bits} bits and is "
            + ("symmetric" if scheme.symmetric else "asymmetric"),
            fix="name the scheme that the weight was quantized with",
        )
    scheme.groups_of(weight.k, weight.group_size)
    if weight.k % COLUMN_ALIGNMENT:
        raise FormatError(
            "E4102",
            f"Kernels cannot read rows of {weight.k} activations.",
            why=f"in_features must be a multiple of {COLUMN_ALIGNMENT}, because they are read 16 bytes at a time",
            fix="leave the layer unquantized",
        )
    scheme.check_columns(weight.k, weight.group_size)


def _little(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(words.astype("<u4", copy=False))


def _grouped(values: NDArray[Any], n: int, k: int, group_size: int) -> NDArray[Any]:
    """(N, G) padded with zeros and ordered (Np / 16, Kp / G, g, half)."""
    rows, groups = padded(n, TILE_ROWS), padded(k, TILE_COLUMNS) // group_size
    whole = np.zeros((rows, groups), values.dtype)
    whole[: values.shape[0], : values.shape[1]] = values
    tiles = whole.reshape(rows // TILE_ROWS, 2, 8, groups)  # nt half g group
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1))


def _ungrouped(tiles: NDArray[Any], n: int, k: int, group_size: int) -> NDArray[Any]:
    """Undo `_grouped`."""
    rows = tiles.transpose(0, 3, 2, 1).reshape(-1, tiles.shape[1])
    return np.ascontiguousarray(rows[:n, : k // group_size])


def tiled_scales(weight: PackedWeight) -> NDArray[np.float16] | NDArray[np.float32]:
    """Scales of a weight in the order of `TiledWeight.scales`."""
    if weight.group_size != CHANNEL:
        return _grouped(weight.scales, weight.n, weight.k, weight.group_size).astype(
            "<f2", copy=False
        )
    scales = np.zeros(padded(weight.n, TILE_ROWS), "<f4")
    scales[: weight.n] = weight.scales[:, 0] / np.float32(INT8_FACTOR)
    return scales


def _scales_of(tiled: TiledWeight) -> NDArray[np.float16] | NDArray[np.float32]:
    if tiled.group_size != CHANNEL:
        return _ungrouped(tiled.scales, tiled.n, tiled.k, tiled.group_size).astype(np.float16)
    scales: NDArray[np.float32] = tiled.scales[: tiled.n, None] * np.float32(INT8_FACTOR)
    return scales


def tiled_zeros(zeros: NDArray[np.uint8], weight: PackedWeight) -> NDArray[np.int32]:
    """(N, G) zero points in the order of `TiledWeight.zeros`; the weight gives sizes."""
    halves = _grouped(zeros, weight.n, weight.k, weight.group_size).astype(np.uint8)
    packed = halves[..., 0] | halves[..., 1] << 4
    return np.ascontiguousarray(packed).view("<i4")


def _zeros_of(words: NDArray[np.int32], tiled: TiledWeight) -> NDArray[np.uint8]:
    packed = words.view(np.uint8)
    halves = np.stack([packed & 15, packed >> 4], axis=-1)
    return _ungrouped(halves, tiled.n, tiled.k, tiled.group_size).astype(np.uint8)


def _format(part: PackedWeight) -> tuple[int, int, bool]:
    return part.bits, part.group_size, part.zeros is None


def _joined(arrays: Sequence[NDArray[Any]], row_order: RowOrder) -> NDArray[Any]:
    if row_order == "concat":
        return np.concatenate(arrays)
    # (tile, part, row of the tile, ...): the tiles of the parts take turns.
    tiles = [array.reshape(-1, TILE_ROWS, *array.shape[1:]) for array in arrays]
    return np.stack(tiles, axis=1).reshape(-1, *arrays[0].shape[1:])
