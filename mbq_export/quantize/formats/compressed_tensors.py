"""compressed-tensors: rows of words as ours (pack-quantized), or one signed byte per code (int-quantized).

    pack-quantized   weight_packed      I32 (N, ceil(K*b/32))   code + 2^(b-1): the words are ours
                     weight_zero_point  I32 (ceil(N*b/32), K/G) the same along N; only if asymmetric
                     weight_shape       I64 (2,)                N, K
    int-quantized    weight             I8 (N, K)               code, from -2^(b-1)
    both             weight_scale       (N, K/G), or (N, 1)     weight = (code - zero) * scale

Releases before 2026 put ten 3-bit codes into a word instead of letting them straddle. The number of words
tells the two apart: they differ wherever K is a multiple of 32.

Source: compressed-tensors 0.20, ``compressors/pack_quantized`` and ``quantization/quant_args.py``.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import FormatError
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
from mbq_export.schemes.base import CHANNEL, FULL_PRECISION_BITS, PackedWeight, QuantScheme
from mbq_export.schemes.layouts.dense import pack, unpack, words_per_row
from mbq_export.tensor_file import BFLOAT16

NAME: Final = "compressed-tensors"
PACKED: Final = "pack-quantized"
BYTES: Final = "int-quantized"
SCALES: Final = (np.dtype("<f2"), BFLOAT16, np.dtype("<f4"))
TOKEN: Final[Mapping[str, object]] = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
}  # fmt: skip
"""The one way in which activations are rounded by a format of ours."""


def recipe(config: Mapping[str, Any]) -> Recipe:
    """Read a ``quantization_config``.

    Raises:
        FormatError: E4011.
    """
    variant = choice(config, "format", (PACKED, BYTES), None)
    choice(config, "quantization_status", ("compressed",), "compressed")
    choice(config, "kv_cache_scheme", (None,), None)
    for key in ("transform_config", "sparsity_config"):
        if config.get(key) not in (None, {}, {"format": "dense"}):
            raise refused(
                f"{key} of quantization_config changes the weights.", "codes alone are read"
            )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise refused(
            "config_groups of quantization_config is not one group.", "all linears are alike"
        )
    group = next(iter(groups.values()))
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise refused("Its group has no weights.", "a group says how weights are quantized")
    choice(group, "format", (None, variant), None)
    choice(group, "output_activations", (None,), None)
    return _weights(group["weights"], variant, act_bits=_act_bits(group.get("input_activations")))


def _weights(weights: Mapping[str, Any], variant: str, *, act_bits: int) -> Recipe:
    choice(weights, "type", ("int",), "int")
    choice(weights, "dynamic", (False,), default=False)
    choice(weights, "actorder", (None, "weight", "static"), None)
    strategy = choice(weights, "strategy", ("group", "channel"), None)
    return Recipe(
        variant=variant,
        bits=choice(weights, "num_bits", tuple(range(1, 9)), None),
        group_size=CHANNEL if strategy == "channel" else group_size_in(weights, whole=()),
        symmetric=choice(weights, "symmetric", (True, False), default=True),
        act_bits=act_bits,
    )


def _act_bits(activations: object) -> int:
    if activations is None:
        return FULL_PRECISION_BITS
    if not isinstance(activations, Mapping):
        raise refused(
            "input_activations of its group is no object.", "it says how they are rounded"
        )
    for key, value in TOKEN.items():
        choice(activations, key, (value,), None)
    return 8


def read(linear: StoredLinear, recipe: Recipe) -> Carried:
    """Tensors of a linear to ours.

    Raises:
        FormatError: E4011 for reordered columns, E4102, E4103, E4411.
    """
    if "weight_g_idx" in linear.tensors:
        raise refused(
            "Its columns were reordered by activation (weight_g_idx).",
            "groups are neighbouring columns",
        )
    scales = linear.take("weight_scale", *SCALES, shape=(linear.n, recipe.groups(linear.k)))
    if recipe.variant == BYTES:
        linear.only("weight", "weight_scale")
        return Carried(words=_from_bytes(linear, recipe), scales=scales, zeros=None)
    return _from_words(linear, recipe, scales)


def _from_bytes(linear: StoredLinear, recipe: Recipe) -> NDArray[np.uint32]:
    if not recipe.symmetric:
        raise refused("Codes in bytes have zero points.", f"{BYTES} is read where it is symmetric")
    codes = linear.take("weight", np.dtype("i1"), shape=(linear.n, linear.k))
    middle = 2 ** (recipe.bits - 1)
    if int(codes.min(initial=0)) < -middle or int(codes.max(initial=0)) >= middle:
        raise FormatError(
            "E4411",
            f"Codes reach from {codes.min()} to {codes.max()}.",
            why=f"{recipe.bits} bits hold {-middle} to {middle - 1}",
            fix="check that quantization_config belongs to these weights",
        )
    return pack((codes.astype(np.int16) + middle).astype(np.uint8), bits=recipe.bits)


def _from_words(linear: StoredLinear, recipe: Recipe, scales: NDArray[Any]) -> Carried:
    n, k, bits = linear.n, linear.k, recipe.bits
    points = () if recipe.symmetric else ("weight_zero_point",)
    linear.only("weight_packed", "weight_scale", "weight_shape", *points)
    shape = linear.take("weight_shape", np.dtype("<i8"), INT32, shape=(2,))
    if shape.tolist() != [n, k]:
        raise FormatError(
            "E4102",
            f"weight_shape says {shape.tolist()}.",
            why=f"config.json makes it {[n, k]}",
            fix="check that config.json belongs to these weights",
        )
    apart = _in_tens(linear, bits)
    words = _streams(linear, "weight_packed", (n, k), bits, apart=apart)
    if recipe.symmetric:
        return Carried(words=words, scales=scales, zeros=None)
    groups = scales.shape[1]
    stored = _streams(linear, "weight_zero_point", (groups, n), bits, apart=apart, along_rows=True)
    zeros = unpack(stored, bits=bits, columns=n)
    return Carried(words=words, scales=scales, zeros=np.ascontiguousarray(zeros.T))


def _in_tens(linear: StoredLinear, bits: int) -> bool:
    """Whether codes do not straddle words, as before 2026."""
    packed = linear.tensors.get("weight_packed")
    columns = packed.shape[-1] if packed is not None and packed.ndim else 0
    return columns == -(-linear.k // (WORD_BITS // bits)) != words_per_row(linear.k, bits)


def _streams(
    linear: StoredLinear,
    part: str,
    shape: tuple[int, int],
    bits: int,
    *,
    apart: bool,
    along_rows: bool = False,
) -> NDArray[np.uint32]:
    """Words of a tensor as dense rows: ``shape`` is rows and codes of each; ``along_rows`` is its transpose."""
    rows, codes = shape
    each = WORD_BITS // bits
    columns = -(-codes // each) if apart else words_per_row(codes, bits)
    stored = linear.take(part, INT32, shape=(columns, rows) if along_rows else (rows, columns))
    words = np.ascontiguousarray(stored.T if along_rows else stored).view(np.uint32)
    if not apart:
        return words
    fields = np.empty((rows, columns * each), np.uint8)
    for place in range(each):
        fields[:, place::each] = (words >> np.uint32(bits * place)) & np.uint32(2**bits - 1)
    return pack(np.ascontiguousarray(fields[:, :codes]), bits=bits)


def check(n: int, k: int, scheme: QuantScheme) -> None:
    """Every linear fits: rows need not end with a word."""


def write(weight: PackedWeight, scheme: QuantScheme) -> dict[str, NDArray[Any]]:
    """A linear of ours to its tensors: bytes where activations are rounded too, else words, without zero points if symmetric."""
    if scheme.rounds_activations:
        codes = unpack(weight.words, bits=scheme.weight_bits, columns=weight.k)
        return {
            "weight": (codes.astype(np.int16) - scheme.middle).astype(np.int8),
            "weight_scale": weight.scales,
        }
    tensors: dict[str, NDArray[Any]] = {
        "weight_packed": weight.words.view(np.int32),
        "weight_scale": weight.scales,
        "weight_shape": np.array([weight.n, weight.k], np.int64),
    }
    if weight.zeros is not None:
        zeros = pack(np.ascontiguousarray(weight.zeros.T), bits=scheme.weight_bits)
        tensors["weight_zero_point"] = np.ascontiguousarray(zeros.T).view(np.int32)
    return tensors


def config(scheme: QuantScheme, group_size: int, kept: Kept) -> dict[str, Any]:
    """``quantization_config`` as compressed-tensors writes it."""
    variant = BYTES if scheme.rounds_activations else PACKED
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if group_size == CHANNEL else "group",
        "group_size": None if group_size == CHANNEL else group_size,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": dict(TOKEN) if scheme.rounds_activations else None,
        "output_activations": None,
        "format": variant,
    }
    return {
        "quant_method": NAME,
        "format": variant,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(kept.modules),
        "kv_cache_scheme": None,
    }


FORMAT: Final = ForeignFormat(
    name=NAME,
    marks=("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    recipe=recipe,
    read=read,
    schemes=("w3a16", "w4a16", "w4a8", "w8a8", "w8a16"),
    check=check,
    write=write,
    config=config,
)
