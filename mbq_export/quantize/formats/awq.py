"""AWQ, version gemm: 4-bit asymmetric codes, eight output rows in a word, in an order of their own.

    qweight  I32 (K, N/8)      nibble i of word c is the code of output row 8 c + ORDER[i]
    qzeros   I32 (K/G, N/8)    zero points, in the same order
    scales   F16 (K/G, N)      weight = (code - zero) * scale

Source: AutoAWQ, ``awq/utils/packing_utils.py`` and ``WQLinear_GEMM``.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import UsageError
from mbq_export.quantize.formats.base import (
    INT32,
    Carried,
    ForeignFormat,
    Kept,
    Recipe,
    StoredLinear,
    choice,
    group_size_in,
    refused,
)
from mbq_export.schemes.base import PackedWeight, QuantScheme
from mbq_export.schemes.layouts.dense import pack, unpack
from mbq_export.tensor_file import BFLOAT16

NAME: Final = "awq"
BITS: Final = 4
ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD: Final = len(ORDER)
PARTS: Final = ("qweight", "qzeros", "scales")


def recipe(config: Mapping[str, Any]) -> Recipe:
    """Read a ``quantization_config``.

    Raises:
        FormatError: E4011.
    """
    version = config.get("version", config.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise refused(f"Its version is {str(version)[:80]!r}.", "codes of version gemm are read")
    choice(config, "bits", (BITS,), None)
    choice(config, "zero_point", (True,), default=True)
    choice(config, "backend", ("auto", "autoawq", "gemm"), "autoawq")
    return Recipe(variant="gemm", bits=BITS, group_size=group_size_in(config), symmetric=False)


def read(linear: StoredLinear, recipe: Recipe) -> Carried:
    """Tensors of a linear to ours.

    Raises:
        FormatError: E4102, E4103.
    """
    linear.only(*PARTS)
    groups = recipe.groups(linear.k)
    columns = -(-linear.n // PER_WORD)
    codes = linear.take("qweight", INT32, shape=(linear.k, columns))
    zeros = linear.take(
        "qzeros", INT32, shape=(groups, columns), why="zero points that are no integers are refused"
    )
    scales = linear.take(
        "scales", np.dtype("<f2"), BFLOAT16, np.dtype("<f4"), shape=(groups, linear.n)
    )
    return Carried(
        words=pack(np.ascontiguousarray(unpack_rows(codes)[:, : linear.n].T), bits=BITS),
        scales=np.ascontiguousarray(scales.T),
        zeros=np.ascontiguousarray(unpack_rows(zeros)[:, : linear.n].T),
    )


def unpack_rows(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """(R, C) words to (R, 8 C) codes."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((words.shape[0], words.shape[1] * PER_WORD), np.uint8)
    for nibble, row in enumerate(ORDER):
        codes[:, row::PER_WORD] = (unsigned >> np.uint32(BITS * nibble)) & np.uint32(15)
    return codes


def pack_rows(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(R, 8 C) codes to (R, C) words."""
    words = np.zeros((codes.shape[0], codes.shape[1] // PER_WORD), np.uint32)
    for nibble, row in enumerate(ORDER):
        words |= codes[:, row::PER_WORD].astype(np.uint32) << np.uint32(BITS * nibble)
    return words.view(np.int32)


def check(n: int, k: int, scheme: QuantScheme) -> None:
    """Refuse rows that do not fill words.

    Raises:
        UsageError: E2006.
    """
    del k, scheme
    if n % PER_WORD:
        raise UsageError(
            "E2006",
            f"{n} output features do not fill words of AWQ.",
            why=f"one word holds {PER_WORD} of them",
            fix="--to compressed-tensors",
        )


def write(weight: PackedWeight, scheme: QuantScheme) -> dict[str, NDArray[Any]]:
    """A linear of ours to its tensors."""
    assert weight.zeros is not None  # of an asymmetric scheme
    codes = unpack(weight.words, bits=scheme.weight_bits, columns=weight.k)
    return {
        "qweight": pack_rows(np.ascontiguousarray(codes.T)),
        "qzeros": pack_rows(np.ascontiguousarray(weight.zeros.T)),
        "scales": np.ascontiguousarray(weight.scales.T),
    }


def config(scheme: QuantScheme, group_size: int, kept: Kept) -> dict[str, Any]:
    """``quantization_config`` as AutoAWQ writes it."""
    return {
        "quant_method": NAME,
        "version": "gemm",
        "bits": scheme.weight_bits,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": list(kept.patterns),
    }


FORMAT: Final = ForeignFormat(
    name=NAME,
    marks=PARTS,
    recipe=recipe,
    read=read,
    schemes=("w4a16",),
    check=check,
    write=write,
    config=config,
)
