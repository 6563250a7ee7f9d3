"""What a foreign format is: how its linears become ours and back, without a weight being computed.

    quantization_config ──► Recipe      widths, groups, variant; refused if codes could not be carried over
    tensors of a linear ──► Carried     codes in our words, scales, zero points: the same numbers elsewhere
    PackedWeight        ──► tensors     the way back

No function here multiplies a code by a scale. What cannot be carried over exactly is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mbq_export.errors import FormatError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import (
    CHANNEL,
    FULL_PRECISION_BITS,
    SMALLEST_SCALE,
    PackedWeight,
    QuantScheme,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

BIAS: Final = "bias"
WORD_BITS: Final = 32
LARGEST_GROUP: Final = 1 << 20
INT32: Final = np.dtype("<i4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a ``quantization_config`` says about the linears, checked.

    Attributes:
        variant: Which way of storing, where a format has several.
        bits: Width of a code.
        group_size: Columns that share a scale; `CHANNEL` for whole rows.
        symmetric: True if no zero points are stored, or all are the middle code.
        act_bits: Width of activations.
    """

    variant: str
    bits: int
    group_size: int
    symmetric: bool
    act_bits: int = FULL_PRECISION_BITS

    def groups(self, k: int) -> int:
        """Groups in a row of K columns.

        Raises:
            FormatError: E4102 if the last one would be shorter.
        """
        if self.group_size == CHANNEL:
            return 1
        if k % self.group_size:
            raise FormatError(
                "E4102",
                f"Groups of {self.group_size} do not divide in_features {k}.",
                why="a shorter last group is not carried over",
                fix="quantize that model with groups that divide its widths",
            )
        return k // self.group_size


@dataclass(frozen=True, kw_only=True)
class StoredLinear:
    """The tensors of one linear as a file has them.

    Attributes:
        n: Output features, by the model's config.
        k: Input features likewise.
        tensors: By the last part of their name.
    """

    n: int
    k: int
    tensors: Mapping[str, NDArray[Any]]

    def only(self, *parts: str) -> None:
        """Refuse tensors that nothing would read.

        Raises:
            FormatError: E4103.
        """
        surplus = sorted(set(self.tensors) - {*parts, BIAS})
        if surplus:
            raise FormatError(
                "E4103",
                f"The linear has {', '.join(surplus)} too.",
                why=f"its quantization_config needs {', '.join(parts)}; what is ignored may change the weights",
                fix="check that quantization_config belongs to these weights",
            )

    def take(
        self, part: str, *dtypes: np.dtype[Any], shape: tuple[int, ...], why: str = ""
    ) -> NDArray[Any]:
        """Return a tensor if it is what the format says.

        Args:
            part: Last part of its name.
            dtypes: Those it may have.
            shape: The one it must have.
            why: More about why another dtype is refused.

        Raises:
            FormatError: E4103 if it is missing, E4102 for another dtype or shape.
        """
        found = self.tensors.get(part)
        if found is None:
            raise FormatError(
                "E4103",
                f"There is no tensor {part!r}.",
                why=f"the linear has {', '.join(sorted(self.tensors))}",
                fix="download the folder again",
            )
        if found.dtype not in dtypes or found.shape != shape:
            known = " or ".join(str(dtype) for dtype in dtypes)
            raise FormatError(
                "E4102",
                f"Tensor {part!r} is {found.dtype} {found.shape}.",
                why=f"expected {known} {shape}{f'; {why}' if why else ''}",
                fix="check that quantization_config belongs to these weights",
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Codes, scales and zero points of a linear in our order and the file's own groups.

    Attributes:
        words: (N, ceil(K * bits / 32)) uint32 in layout ``dense``.
        scales: (N, G) in the file's dtype.
        zeros: (N, G) uint8; None if the middle code stands for 0.
    """

    words: NDArray[np.uint32]
    scales: NDArray[Any]
    zeros: NDArray[np.uint8] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFormat:
    """One format of others.

    Attributes:
        name: What ``quant_method`` says, and users type.
        marks: Last parts of the names of its tensors; a module with the first is quantized.
        recipe: Reads a ``quantization_config``; raises E4011.
        read: The tensors of a linear to ours; raises E4102, E4103, E4411.
        schemes: Ours that it can hold, and how the config of each is spelt.
        check: Refuses a linear (N, K) that it cannot hold with a `UsageError` E2006.
        write: A linear of ours to its tensors.
        config: ``quantization_config`` of a whole checkpoint: scheme, group size, modules that are no codes.
    """

    name: str
    marks: tuple[str, ...]
    recipe: Callable[[Mapping[str, Any]], Recipe]
    read: Callable[[StoredLinear, Recipe], Carried]
    schemes: tuple[str, ...]
    check: Callable[[int, int, QuantScheme], None]
    write: Callable[[PackedWeight, QuantScheme], dict[str, NDArray[Any]]]
    config: Callable[[QuantScheme, int, Kept], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Modules whose weights are no codes.

    Attributes:
        patterns: Their common beginnings.
        modules: Every one with a matrix, by its whole path.
    """

    patterns: tuple[str, ...]
    modules: tuple[str, ...]


def scheme_of(recipe: Recipe) -> QuantScheme:
    """The number format of ours that holds these codes.

    Symmetric codes without rounded activations go to the asymmetric format of that width, whose zero point
    then is the middle code: the same numbers.

    Raises:
        FormatError: E4011 if no format of this release holds them.
    """
    for scheme in SCHEMES.members().values():
        same = (scheme.weight_bits, scheme.act_bits) == (recipe.bits, recipe.act_bits)
        if same and not scheme.evaluation_only and (recipe.symmetric or not scheme.symmetric):
            return scheme
    kind = "symmetric" if recipe.symmetric else "asymmetric"
    raise refused(
        f"It has {kind} codes of {recipe.bits} bits, with activations of {recipe.act_bits} bits.",
        f"the formats of this release are {', '.join(name for name, each in SCHEMES.members().items() if not each.evaluation_only)}",
    )


def fitting_group(scheme: QuantScheme, group_size: int, widths: tuple[int, ...]) -> int:
    """Our group size for a file's: the same, or the largest part of it, whose scales then are repeated.

    Args:
        scheme: Ours.
        group_size: The file's; `CHANNEL` for whole rows.
        widths: K of all linears.

    Raises:
        FormatError: E4011 if none fits.
    """
    if group_size in scheme.group_sizes:
        return group_size
    whole = widths if group_size == CHANNEL else (group_size,)
    for size in sorted(scheme.group_sizes, reverse=True):
        if size != CHANNEL and all(width % size == 0 for width in whole):
            return size
    raise refused(
        f"Its groups have {group_size or 'all'} columns.",
        f"{scheme.name} has groups of {', '.join(str(size or 'channel') for size in scheme.group_sizes)}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleCounts:
    """What became of scales.

    Attributes:
        small: How many are below the smallest normal fp16 number.
        rounded: How many of those changed, by at most 2**-25.
    """

    small: int = 0
    rounded: int = 0


def carried_over(
    carried: Carried, *, k: int, recipe: Recipe, scheme: QuantScheme, group_size: int
) -> tuple[PackedWeight, ScaleCounts]:
    """Put a linear into our types; its values are still to be checked (`check_packed`).

    Args:
        carried: What a format read.
        k: Input features.
        recipe: Of its file.
        scheme: From `scheme_of`.
        group_size: From `fitting_group`.

    Raises:
        FormatError: E4112 if a scale is no fp16 number, E4411 for zero points that a symmetric format cannot keep.
    """
    scales, zeros = carried.scales, carried.zeros
    if group_size != recipe.group_size:
        repeats = (k if recipe.group_size == CHANNEL else recipe.group_size) // group_size
        scales = np.repeat(scales, repeats, axis=1)
        zeros = None if zeros is None else np.repeat(zeros, repeats, axis=1)
    if scheme.symmetric:
        if zeros is not None and (zeros != scheme.middle).any():
            raise FormatError(
                "E4411",
                f"{int((zeros != scheme.middle).sum())} zero points are not {scheme.middle}.",
                why=f"{scheme.name} is symmetric, as the file says of its codes",
                fix="check that quantization_config belongs to these weights",
            )
        zeros = None
    elif zeros is None:
        zeros = np.full(scales.shape, scheme.middle, np.uint8)
    exact, counts = _scales(scales, channel=group_size == CHANNEL)
    weight = PackedWeight(
        words=carried.words,
        scales=exact,
        zeros=zeros,
        k=k,
        bits=scheme.weight_bits,
        group_size=group_size,
    )
    return weight, counts


def _scales(
    values: NDArray[Any], *, channel: bool
) -> tuple[NDArray[np.float16] | NDArray[np.float32], ScaleCounts]:
    wide = values.astype(np.float32)
    if channel:
        return wide, ScaleCounts()
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    changed = narrow.astype(np.float32) != wide
    small = wide < SMALLEST_SCALE
    # Below the normal numbers fp16 has fixed steps of 2**-24: what is lost there is less than half of one.
    lost = int((changed & ~small).sum())
    if lost:
        raise FormatError(
            "E4112",
            f"{lost} of {wide.size} scales are no fp16 numbers; the largest is {float(wide.max()):.6g}.",
            why="scales of groups are fp16, and carrying over rounds nothing",
            fix="quantize that model with scales in fp16",
        )
    return narrow, ScaleCounts(small=int(small.sum()), rounded=int(changed.sum()))


def refused(what: str, why: str) -> FormatError:
    """The error for a kind of quantized checkpoint that is not read (E4011)."""
    return FormatError(
        "E4011",
        what,
        why=f"{why}; only what can be carried over without rounding is read",
        fix="give the 16-bit model it was made from",
    )


def choice(config: Mapping[str, Any], key: str, known: tuple[object, ...], default: object) -> Any:
    """A setting that must be one of a few values; a bool is no number.

    Raises:
        FormatError: E4011.
    """
    found = config.get(key, default)
    for value in known:
        if type(value) is type(found) and value == found:
            return found
    raise refused(
        f"{key} of quantization_config is {str(found)[:80]!r}.",
        f"known: {', '.join(map(repr, known))}",
    )


def group_size_in(config: Mapping[str, Any], *, whole: tuple[object, ...] = (-1,)) -> int:
    """``group_size``: a positive number, or one of the ways to say whole rows.

    Raises:
        FormatError: E4011.
    """
    found = config.get("group_size")
    if any(type(found) is type(value) and found == value for value in whole):
        return CHANNEL
    if type(found) is int and 0 < found <= LARGEST_GROUP:
        return found
    raise refused(
        f"group_size of quantization_config is {str(found)[:80]!r}.", "it is a number of columns"
    )
