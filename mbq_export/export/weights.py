"""Constants that are computed while they are written: blocks of rows, never a whole unpacked weight.

A packed linear is [N, K] on disk; its 4-bit form in a graph is [K, N], because ONNX Runtime fuses only that. So a
block here is a slice of columns: take the words of some columns, unpack, transpose, write nibbles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mbq_export.errors import FormatError, InternalError
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.layouts import dense

if TYPE_CHECKING:
    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.schemes.base import PackedWeight

BLOCK_ELEMENTS: Final = 8 << 20
"""Elements of one block: 64 MB in the widest intermediate form (eight bytes per code while unpacking)."""
COLUMN_STEP: Final = 128
"""Columns are cut at multiples of the largest group: whole groups and whole words for every width."""

Blocks = Callable[[], Iterator[NDArray[Any]]]
_NIBBLES: Final = {ir.DataType.INT4, ir.DataType.UINT4}


class StreamedTensor(ir.LazyTensor):
    """A constant of known dtype and shape whose content is produced in blocks of its first axis.

    Every access computes it again: nothing is kept.
    """

    def __init__(
        self, name: str, *, dtype: ir.DataType, shape: tuple[int, ...], blocks: Blocks
    ) -> None:
        """Describe a constant.

        Args:
            name: Name of the initializer.
            dtype: Its element type; nibble types are produced as int8 or uint8 and packed here.
            shape: Its sizes. For nibbles the last is even.
            blocks: Yields consecutive slices along the first axis.
        """
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)
        self._blocks = blocks

    def _whole(self) -> ir.TensorProtocol:
        array = np.concatenate(list(self._blocks())).astype(self.dtype.numpy())
        return ir.Tensor(array, dtype=self.dtype, shape=self.shape, name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        """Write the constant, one block at a time.

        Raises:
            InternalError: E9001 if the blocks do not add up to the shape.
        """
        written = sum(file.write(chunk) for chunk in self._chunks())
        if written != self.nbytes:
            raise InternalError(
                "E9001", f"{self.name} yielded {written} bytes instead of {self.nbytes}."
            )

    def _chunks(self) -> Iterator[bytes]:
        for block in self._blocks():
            yield _nibbles(block) if self.dtype in _NIBBLES else block.tobytes()


def _nibbles(values: NDArray[Any]) -> bytes:
    """Pack pairs of values into bytes, the earlier one in the low half (ONNX, TensorProto.INT4)."""
    pairs = values.astype(np.uint8).reshape(-1, 2) & np.uint8(0xF)
    return (pairs[:, 0] | pairs[:, 1] << np.uint8(4)).tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSource:
    """The weight of one node: packed linears of one input, stacked along N.

    Attributes:
        checkpoint: Where they lie.
        modules: Their module paths, in the order of the output columns.
        n: Rows in all.
        k: Columns.
        scheme: Number format.
        bits: Width of a code.
        group_size: Columns that share a scale; `CHANNEL` for one scale per row.
        row_counts: Rows of each linear.
        symmetric: Whether there are no zero points.
    """

    checkpoint: QuantCheckpoint
    modules: tuple[str, ...]
    n: int
    k: int
    scheme: str
    bits: int
    group_size: int
    row_counts: tuple[int, ...]
    symmetric: bool

    @classmethod
    def of(cls, checkpoint: QuantCheckpoint, module: str) -> PackedSource:
        """Describe a single linear."""
        weight = checkpoint.packed(module)
        return cls(
            checkpoint=checkpoint,
            modules=(module,),
            n=weight.n,
            k=weight.k,
            scheme=checkpoint.records[module].scheme.name,
            bits=weight.bits,
            group_size=weight.group_size,
            row_counts=(weight.n,),
            symmetric=weight.zeros is None,
        )

    def stacked(self, other: PackedSource) -> PackedSource:
        """Put another linear of the same input below this one."""
        return PackedSource(
            checkpoint=self.checkpoint,
            modules=self.modules + other.modules,
            n=self.n + other.n,
            k=self.k,
            scheme=self.scheme,
            bits=self.bits,
            group_size=self.group_size,
            row_counts=self.row_counts + other.row_counts,
            symmetric=self.symmetric,
        )

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return 1 if self.group_size == CHANNEL else self.k // self.group_size

    @property
    def middle(self) -> int:
        """Zero point of a symmetric code."""
        return 1 << (self.bits - 1)

    def weights(self) -> Iterator[PackedWeight]:
        """Read one linear after the other."""
        return (self.checkpoint.packed(module) for module in self.modules)

    def scales(self) -> NDArray[np.float16] | NDArray[np.float32]:
        """(N, G) scales of all rows; (N, 1) float32 per channel."""
        return np.concatenate([weight.scales for weight in self.weights()])

    def zeros(self) -> NDArray[np.uint8]:
        """(N, G) zero points of all rows, also for symmetric codes."""
        return np.concatenate(
            [
                np.full(weight.scales.shape, self.middle, np.uint8)
                if weight.zeros is None
                else weight.zeros
                for weight in self.weights()
            ]
        )

    def codes(self) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        """Yield (columns, (columns, N) codes), a block at a time, columns cut between groups."""
        step = max(COLUMN_STEP, BLOCK_ELEMENTS // self.n // COLUMN_STEP * COLUMN_STEP)
        for start in range(0, self.k, step):
            columns = slice(start, min(start + step, self.k))
            yield (
                columns,
                np.concatenate([_codes(weight, columns) for weight in self.weights()]).T.copy(),
            )


def _codes(weight: PackedWeight, columns: slice) -> NDArray[np.uint8]:
    """(N, columns) codes of some columns that begin at a multiple of 32."""
    words = slice(
        columns.start * weight.bits // dense.WORD_BITS,
        dense.words_per_row(columns.stop, weight.bits),
    )
    count = columns.stop - columns.start
    return dense.unpack(weight.words[:, words], bits=weight.bits, columns=count)


def words_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """INT32 (N, ceil(K * bits / 32)) words of layout ``dense``, bit for bit as in the checkpoint."""
    shape = (source.n, dense.words_per_row(source.k, source.bits))
    return StreamedTensor(
        name,
        dtype=ir.DataType.INT32,
        shape=shape,
        blocks=lambda: (weight.words.view(np.int32) for weight in source.weights()),
    )


def scales_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """FLOAT16 (N, G) scales; FLOAT (N,) per channel."""
    channel = source.group_size == CHANNEL
    shape = (source.n,) if channel else (source.n, source.groups)
    return StreamedTensor(
        name,
        dtype=ir.DataType.FLOAT if channel else ir.DataType.FLOAT16,
        shape=shape,
        blocks=lambda: iter([source.scales().reshape(shape)]),
    )


def zeros_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """INT32 (N, G) zero points."""
    return StreamedTensor(
        name,
        dtype=ir.DataType.INT32,
        shape=(source.n, source.groups),
        blocks=lambda: iter([source.zeros().astype(np.int32)]),
    )


def signed_codes_tensor(
    name: str, source: PackedSource, *, minus_zero: bool, dtype: ir.DataType = ir.DataType.INT4
) -> StreamedTensor:
    """INT4 or INT8 (K, N): code minus zero point, or minus the middle of the range.

    Args:
        name: Name of the initializer.
        source: The linears.
        minus_zero: Subtract each group's zero point; the result must fit -8 .. 7, as 3-bit codes do.
        dtype: Element type.
    """

    def minus_zeros() -> Iterator[NDArray[np.int8]]:
        origin = source.zeros().T.astype(np.int8)
        for columns, codes in source.codes():
            groups = slice(columns.start // source.group_size, columns.stop // source.group_size)
            signed = codes.astype(np.int8) - np.repeat(origin[groups], source.group_size, axis=0)
            _check_int4(signed)
            yield signed

    def minus_middle() -> Iterator[NDArray[np.int8]]:
        # The middle of eight bits, 128, is no int8.
        for _, codes in source.codes():
            yield (codes.astype(np.int16) - source.middle).astype(np.int8)

    blocks = minus_zeros if minus_zero else minus_middle
    return StreamedTensor(name, dtype=dtype, shape=(source.k, source.n), blocks=blocks)


def _check_int4(values: NDArray[np.int8]) -> None:
    if values.min() < -8 or values.max() > 7:
        raise InternalError(
            "E9001", f"Signed codes span {values.min()} .. {values.max()} and do not fit INT4."
        )


def unsigned_codes_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """UINT4 (K, N) codes."""
    return StreamedTensor(
        name,
        dtype=ir.DataType.UINT4,
        shape=(source.k, source.n),
        blocks=lambda: (codes for _, codes in source.codes()),
    )


def unsigned_zeros_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """UINT4 (G, N) zero points."""
    return StreamedTensor(
        name,
        dtype=ir.DataType.UINT4,
        shape=(source.groups, source.n),
        blocks=lambda: iter([source.zeros().T.copy()]),
    )


def block_scales_tensor(name: str, source: PackedSource, dtype: ir.DataType) -> StreamedTensor:
    """T (G, N) scales of a blocked DequantizeLinear; fp16 scales are exact in T."""
    return StreamedTensor(
        name,
        dtype=dtype,
        shape=(source.groups, source.n),
        blocks=lambda: iter([source.scales().T.astype(dtype.numpy(), order="C")]),
    )


def offsets_tensor(name: str, source: PackedSource) -> StreamedTensor:
    """FLOAT (G, N) of ``(z - middle) * s``: what a code minus the middle is wrong by, per unit of x."""

    def blocks() -> Iterator[NDArray[np.float32]]:
        off = source.zeros().astype(np.float32) - source.middle
        yield np.ascontiguousarray((off * source.scales().astype(np.float32)).T)

    return StreamedTensor(
        name, dtype=ir.DataType.FLOAT, shape=(source.groups, source.n), blocks=blocks
    )


def plain_tensor(
    name: str, read: Callable[[], NDArray[Any]], *, shape: tuple[int, ...], dtype: ir.DataType
) -> StreamedTensor:
    """An untouched tensor of the model in T, row block by row block."""

    def blocks() -> Iterator[NDArray[Any]]:
        whole = read()
        step = max(1, BLOCK_ELEMENTS // max(1, whole[:1].size))
        for start in range(0, len(whole), step):
            with np.errstate(over="ignore"):  # reported with its name, in the next line
                block = whole[start : start + step].astype(dtype.numpy())
            _check_finite(name, block)
            yield block

    return StreamedTensor(name, dtype=dtype, shape=shape, blocks=blocks)


def _check_finite(name: str, block: NDArray[Any]) -> None:
    if not np.isfinite(block).all():
        raise FormatError(
            "E4110",
            f"{int((~np.isfinite(block)).sum())} values of {name} are not finite in {block.dtype}.",
            why="every weight of a graph is a finite number of the graph's dtype",
            fix=("--dtype fp32", "mbq-export inspect MODEL"),
        )


def transposed_tensor(
    name: str, read: Callable[[], NDArray[Any]], *, shape: tuple[int, int], dtype: ir.DataType
) -> StreamedTensor:
    """A float linear (N, K) of the model as T (K, N), a block of columns at a time."""
    return plain_tensor(name, lambda: read().T, shape=shape, dtype=dtype)


def tensor_reader(checkpoint: QuantCheckpoint, name: str) -> Callable[[], NDArray[Any]]:
    """Put off reading a tensor until it is written."""
    return partial(checkpoint.tensor, name)
