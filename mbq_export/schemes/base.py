"""What a number format is, and one linear layer packed in it.

Axis letters, used in every docstring of the project:

    N  output features        B  batch
    K  input features         T  sequence length
    G  groups along K         H  attention heads
    M  rows of activations    D  width of one head

A stored code ``u`` is unsigned, ``0 <= u < 2**bits``; the weight it stands for is ``(u - z) * s``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import FormatError, UsageError

GROUP_SIZES: Final = (32, 64, 128)
FULL_PRECISION_BITS: Final = 16
"""Width of activations that are not rounded."""
WHOLE_WORDS: Final = 8
"""Columns of a row without groups are a multiple: kernels read eight at a time, and codes end with a word."""
CHANNEL: Final = 0
"""Group size that stands for one group per output channel."""

# The smallest normal fp16 number: kernels assume that group scales are normal.
SMALLEST_SCALE: Final = 2.0**-14


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """One linear layer as it lies on disk and in an ONNX initializer.

    Attributes:
        words: (N, ceil(K * bits / 32)) uint32 in layout ``dense``.
        scales: (N, G) float16, or (N, 1) float32 per channel, in weight units per code.
        zeros: (N, G) uint8, in codes; None when the scheme is symmetric.
        k: K, which the words alone do not tell.
        bits: Width of a code.
        group_size: Columns that share a scale; `CHANNEL` for one group per row.
        bias: (N,) in the model's dtype, or None.
    """

    words: NDArray[np.uint32]
    scales: NDArray[np.float16] | NDArray[np.float32]
    zeros: NDArray[np.uint8] | None
    k: int
    bits: int
    group_size: int
    bias: NDArray[np.floating] | None = None

    @property
    def n(self) -> int:
        """Output features."""
        return int(self.words.shape[0])

    @property
    def groups(self) -> int:
        """Groups per row."""
        return int(self.scales.shape[1])


LinearReference = Callable[[NDArray[np.floating], PackedWeight], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """One number format.

    Attributes:
        name: The name users type, for example ``w3a16``.
        number: Its number in the kernel library, given also to formats that wait for a kernel; 0 for others.
        weight_bits: Width of a code.
        symmetric: True if there are no zero points.
        group_size: Default columns per scale.
        group_sizes: All it may have; `CHANNEL` stands for one scale per row.
        act_bits: Width of activations; 16 leaves them in the model's dtype.
        evaluation_only: Whether neither kernels nor graphs compute it: `torch` alone does, to see what it would cost.
        checkpoint_layout: Canonical bit placement on disk.
        kernel_layout: Tile layout that the kernels read; None where there are none.
        linear_reference: Slow, obvious oracle: (M, K) activations and a packed weight to (M, N) float64.
        smallest_code: Smallest code that rounding may choose. 1 leaves out the one that has no opposite.
        largest_k: Largest K whose integer sums fit 32 bits, None where kernels sum floats.
    """

    name: str
    weight_bits: int
    symmetric: bool
    group_size: int
    act_bits: int
    checkpoint_layout: str
    linear_reference: LinearReference
    kernel_layout: str | None = None
    number: int = 0
    evaluation_only: bool = False
    group_sizes: tuple[int, ...] = GROUP_SIZES
    smallest_code: int = 0
    largest_k: int | None = None

    @property
    def levels(self) -> int:
        """Number of codes."""
        return int(2**self.weight_bits)

    @property
    def largest_code(self) -> int:
        """Largest code, also the number of steps in a group's range."""
        return self.levels - 1

    @property
    def middle(self) -> int:
        """The code that stands for 0 where there are no zero points."""
        return self.levels // 2

    def bits_per_weight(self, group_size: int) -> float:
        """Bits a kernel reads per weight (FORMATS, table of schemes).

        The code, the fp16 scale and the 4-bit zero point of its group; per channel, scales count as nothing.
        """
        if group_size == CHANNEL:
            return self.weight_bits
        return self.weight_bits + (16 if self.symmetric else 16 + 4) / group_size

    def groups_of(self, k: int, group_size: int) -> int:
        """Number of groups in a row of K columns; 1 for `CHANNEL`.

        Raises:
            UsageError: E2004 if the scheme has no such group size, or it does not divide K.
        """
        if group_size not in self.group_sizes:
            known = {size: "channel" if size == CHANNEL else str(size) for size in self.group_sizes}
            fits = [name for size, name in known.items() if size == CHANNEL or k % size == 0]
            raise UsageError(
                "E2004",
                f"{self.name} has no groups of {group_size or 'a whole channel'}.",
                why=f"its groups are {', '.join(known.values())}",
                fix=tuple(f"--group-size {name}" for name in fits)
                or "--wbits 16 keeps the model as it is",
            )
        return 1 if group_size == CHANNEL else groups_of(k, group_size)

    @property
    def rounds_activations(self) -> bool:
        """Whether activations are rounded too, row by row while the model runs."""
        return self.act_bits != FULL_PRECISION_BITS

    def check_deployable(self, *, fix: str = "") -> None:
        """Refuse a format that exists for evaluation only, where a graph or a kernel is wanted.

        Args:
            fix: What else the user may do.

        Raises:
            UsageError: E2006.
        """
        if self.evaluation_only:
            raise UsageError(
                "E2006",
                f"{self.name} exists for evaluation only.",
                why="no kernel multiplies it, and it has no form in a graph",
                fix=tuple(filter(None, (fix, "--scheme w3a16, w4a16, w4a8 or w8a8"))),
            )

    def check_columns(self, k: int, group_size: int) -> None:
        """Refuse rows that this scheme cannot hold.

        Raises:
            UsageError: E2004 as `groups_of` or for K that is no multiple of `WHOLE_WORDS`, E2007 if integer sums
                over K may overflow.
        """
        self.groups_of(k, group_size)
        if k % WHOLE_WORDS:
            raise UsageError(
                "E2004",
                f"Rows of {k} columns do not end with a word.",
                why=f"in_features must be a multiple of {WHOLE_WORDS}, because kernels read as many at a time",
                fix="--wbits 16 keeps the model as it is",
            )
        if self.largest_k is not None and k > self.largest_k:
            raise UsageError(
                "E2007",
                f"{k} products of {self.name} may overflow a 32-bit sum.",
                why=f"the sum is exact up to in_features {self.largest_k}",
                fix="--scheme w4a16",
            )


def group_name(group_size: int) -> str:
    """What people read: ``g128``, or ``channel``."""
    return "channel" if group_size == CHANNEL else f"g{group_size}"


def groups_of(k: int, group_size: int) -> int:
    """Number of groups in a row of K columns.

    Raises:
        UsageError: E2004 if the group size is unknown or does not divide K.
    """
    if group_size not in GROUP_SIZES or k % group_size:
        fits = [size for size in GROUP_SIZES if k % size == 0]
        raise UsageError(
            "E2004",
            f"Group size {group_size} does not divide in_features {k}.",
            why=f"groups must be one of {', '.join(map(str, GROUP_SIZES))} and divide in_features",
            fix=tuple(f"--group-size {size}" for size in reversed(fits))
            or "--wbits 16 keeps the model as it is",
        )
    return k // group_size


def check_packed(weight: PackedWeight) -> None:
    """Check shapes and values of a packed weight as a reader does (FORMATS 13.1).

    Raises:
        FormatError: E4102 for a wrong shape or dtype, E4411 for a scale or zero point out of range, or for bits
            behind the last code of a row.
    """
    columns = -(-weight.k * weight.bits // 32)
    if weight.words.dtype != np.uint32 or weight.words.shape[1:] != (columns,):
        raise FormatError(
            "E4102",
            f"Packed words are {weight.words.dtype} {weight.words.shape}.",
            why=f"{weight.n} rows of {weight.k} codes of {weight.bits} bits are uint32 ({weight.n}, {columns})",
            fix="quantize the model again",
        )
    channel = weight.group_size == CHANNEL
    expected = (weight.n, 1 if channel else groups_of(weight.k, weight.group_size))
    dtype = np.dtype(np.float32 if channel else np.float16)
    if weight.scales.dtype != dtype or weight.scales.shape != expected:
        raise FormatError(
            "E4102",
            f"Scales are {weight.scales.dtype} {weight.scales.shape}.",
            why=f"one scale per row and group is {dtype} {expected}",
            fix="quantize the model again",
        )
    if not (np.isfinite(weight.scales) & (weight.scales > 0)).all():
        raise FormatError(
            "E4411",
            f"{int((~(weight.scales > 0)).sum())} scales are not finite and positive.",
            why="a scale is a positive number",
            fix="quantize the model again",
        )
    used = weight.k * weight.bits % 32
    if used and (weight.words[:, -1] >> np.uint32(used)).any():
        raise FormatError(
            "E4411",
            "Bits behind the last code of a row are set.",
            why="the tail of a row is zero",
            fix="quantize the model again",
        )
    if weight.zeros is not None and (
        weight.zeros.shape != expected or int(weight.zeros.max(initial=0)) >= 2**weight.bits
    ):
        raise FormatError(
            "E4411",
            f"Zero points of shape {weight.zeros.shape} reach {int(weight.zeros.max(initial=0))}.",
            why=f"zero points have shape {expected} and are below {2**weight.bits}",
            fix="quantize the model again",
        )
