"""GPTQ: codes in one bit stream per column of the transposed weight, zero points along the output rows.

    qweight  I32 (K*b/32, N)      the transpose of our words; codes of 3 bits straddle words
    qzeros   I32 (K/G, N*b/32)    one stream per group, along N
    scales   F16 (K/G, N)         weight = (code - zero) * scale
    g_idx    I32 (K,)             group of each column; k div G, or the columns were reordered

Checkpoints of format ``gptq`` store zero - 1, those of ``gptq_v2`` store zero. A field holds b bits, so the
older form stores 0 as the largest code; its writers subtracted from whole words, which for zero points of 0
also changed the neighbours. What they wrote can no longer be told from what was meant.

Sources: AutoGPTQ, ``qlinear_cuda_old.py``; GPTQModel, ``utils/model.py`` (conversion of v1 to v2).
"""

import logging
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import FormatError, UsageError
from mbq_export.quantize.formats.base import (
    INT32,
    WORD_BITS,
    Carried,
    ForeignFormat,
    Kept,
    Recipe,
    StoredLinear,
    choice,
    group_size_in,
    refused,
)
from mbq_export.schemes.base import CHANNEL, PackedWeight, QuantScheme
from mbq_export.schemes.layouts.dense import pack, unpack, words_per_row
from mbq_export.tensor_file import BFLOAT16

logger = logging.getLogger(__name__)

NAME: Final = "gptq"
V1: Final = "gptq"
V2: Final = "gptq_v2"
PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
NOT_HERE: Final = "-:"
"""How a key of ``dynamic`` begins that leaves modules as they are."""


def recipe(config: Mapping[str, Any]) -> Recipe:
    """Read a ``quantization_config``.

    Raises:
        FormatError: E4011.
    """
    variant = choice(
        {"checkpoint_format": config.get("checkpoint_format", config.get("format", V1))},
        "checkpoint_format",
        (V1, V2),
        V1,
    )
    choice(config, "is_marlin_format", (False,), default=False)
    choice(config, "lm_head", (False,), default=False)
    choice(config, "pack_dtype", ("int32", None), default="int32")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(name.startswith(NOT_HERE) for name in dynamic):
        raise refused(
            f"dynamic of quantization_config is {str(dynamic)[:80]!r}.", "all linears are alike"
        )
    symmetric = choice(config, "sym", (True, False), default=True)
    if variant == V1 and not symmetric:
        logger.warning(
            "MBQ-W4114: zero points of asymmetric GPTQ checkpoints of format gptq are not to be trusted "
            "where one was 0: their writers then changed its neighbours"
        )
    return Recipe(
        variant=variant,
        bits=choice(config, "bits", (2, 3, 4, 8), None),
        group_size=group_size_in(config),
        symmetric=symmetric,
    )


def read(linear: StoredLinear, recipe: Recipe) -> Carried:
    """Tensors of a linear to ours.

    Raises:
        FormatError: E4011 for reordered columns, E4102, E4103.
    """
    n, k, bits = linear.n, linear.k, recipe.bits
    if k * bits % WORD_BITS or n * bits % WORD_BITS:
        raise FormatError(
            "E4102",
            f"A linear of {n} x {k} codes of {bits} bits does not end with its words.",
            why="this format holds whole words in both directions",
            fix="check that quantization_config belongs to these weights",
        )
    linear.only(*PARTS)
    groups = recipe.groups(k)
    _check_order(linear, recipe)
    codes = linear.take("qweight", INT32, shape=(words_per_row(k, bits), n))
    zeros = linear.take(
        "qzeros",
        INT32,
        shape=(groups, words_per_row(n, bits)),
        why="zero points that are no integers are refused",
    )
    scales = linear.take("scales", np.dtype("<f2"), BFLOAT16, np.dtype("<f4"), shape=(groups, n))
    fields = unpack(np.ascontiguousarray(zeros).view(np.uint32), bits=bits, columns=n)
    # By field and not by word: fields of 3 bits straddle words.
    points = (fields + (recipe.variant == V1)) & (2**bits - 1)
    return Carried(
        words=np.ascontiguousarray(codes.T).view(np.uint32),
        scales=np.ascontiguousarray(scales.T),
        zeros=np.ascontiguousarray(points.T.astype(np.uint8)),
    )


def _check_order(linear: StoredLinear, recipe: Recipe) -> None:
    order = linear.take("g_idx", INT32, shape=(linear.k,))
    size = linear.k if recipe.group_size == CHANNEL else recipe.group_size
    if not np.array_equal(order, np.arange(linear.k) // size):
        raise refused(
            "Its columns were reordered by activation (g_idx).", "groups are neighbouring columns"
        )


def check(n: int, k: int, scheme: QuantScheme) -> None:
    """Refuse linears that do not end with their words.

    Raises:
        UsageError: E2006.
    """
    for what, count in (("output", n), ("input", k)):
        if count * scheme.weight_bits % WORD_BITS:
            raise UsageError(
                "E2006",
                f"{count} {what} features of {scheme.weight_bits} bits do not fill words of GPTQ.",
                why=f"a word has {WORD_BITS} bits, and none may be left over",
                fix="--to compressed-tensors",
            )


def write(weight: PackedWeight, scheme: QuantScheme) -> dict[str, NDArray[Any]]:
    """A linear of ours to its tensors, in format ``gptq_v2``."""
    assert weight.zeros is not None  # of an asymmetric scheme
    zeros = pack(np.ascontiguousarray(weight.zeros.T), bits=scheme.weight_bits)
    return {
        "qweight": np.ascontiguousarray(weight.words.T).view(np.int32),
        "qzeros": zeros.view(np.int32),
        "scales": np.ascontiguousarray(weight.scales.T),
        "g_idx": (np.arange(weight.k) // weight.group_size).astype(np.int32),
    }


def config(scheme: QuantScheme, group_size: int, kept: Kept) -> dict[str, Any]:
    """``quantization_config`` as GPTQModel writes it."""
    return {
        "quant_method": NAME,
        "checkpoint_format": V2,
        "bits": scheme.weight_bits,
        "group_size": group_size,
        "sym": False,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": {f"{NOT_HERE}{re.escape(pattern)}": {} for pattern in kept.patterns},
    }


FORMAT: Final = ForeignFormat(
    name=NAME,
    marks=PARTS,
    recipe=recipe,
    read=read,
    schemes=("w3a16", "w4a16"),
    check=check,
    write=write,
    config=config,
)
