"""What `mbq.json` and config.json say about a checkpoint as a whole: model, number format, what is kept."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

from mbq_export import __version__
from mbq_export.checkpoint import CONFIG_FILE, KEPT, SCHEMA, SCHEMA_MAJOR, activation_of
from mbq_export.reading import sha256_of
from mbq_export.schemes import JOINT, SCHEMES
from mbq_export.schemes.base import CHANNEL, FULL_PRECISION_BITS
from mbq_export.schemes.layouts.dense import LAYOUT

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mbq_export.families.base import LoadedModel
    from mbq_export.quantize.apply import Rounding
    from mbq_export.quantize.head import HeadFormat

TIED: Final = "tie_word_embeddings"
MEAN_DIGITS: Final = 6


def model_facts(
    model: LoadedModel, hashes: Sequence[str], head: HeadFormat | None = None
) -> dict[str, Any]:
    """Which model it is; ``hashes`` are those of all its weights, ``head`` is the format of one that is codes."""
    tied = model.text.tied_head and head is None
    name = f"{model.family.head}.weight"
    return {
        "schema": f"{SCHEMA}@{SCHEMA_MAJOR}",
        "tool": {"name": "mbq-export", "version": __version__},
        "model": {
            "family": model.family.name,
            "architecture": model.config["architectures"][0],
            "config_sha256": sha256_of(model.folder / CONFIG_FILE),
            "source_sha256": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        },
        "tied": {name: f"{model.family.embed}.weight"} if tied else {},
        "lm_head": None
        if head is None
        else {
            "scheme": head.scheme.name,
            "group_size": head.group_size,
            "untied": model.text.tied_head,
        },
    }


def number_facts(rounding: Rounding, linears: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The number format of its linears, and how their bits lie.

    Args:
        rounding: Of all of them, or of those that have no format of their own.
        linears: Their rows, where units may have formats of their own: all names then, and the mean bits of a weight.
    """
    scheme = rounding.scheme
    return {
        "scheme": {
            "name": scheme_names(linears) or (scheme.name if scheme else KEPT),
            "bits": _mean_bits(linears) or (scheme.weight_bits if scheme else FULL_PRECISION_BITS),
            "group_size": rounding.group_size,
            "symmetric": scheme.symmetric if scheme else False,
            "rounding": "half_even",
            "scale_dtype": "float32" if scheme and rounding.group_size == CHANNEL else "float16",
            "activation": activation_of(scheme),
        },
        "layout": {"name": LAYOUT.name, "version": LAYOUT.version},
    }


def scheme_names(linears: Sequence[Mapping[str, Any]]) -> str:
    """Names of all number formats of some rows, joined by a plus, fewest bits first; empty without rows."""
    names = {row["scheme"] for row in linears}
    return JOINT.join(sorted(names, key=lambda name: (SCHEMES[name].weight_bits, name)))


def _mean_bits(linears: Sequence[Mapping[str, Any]]) -> float | int:
    """Bits of a code, averaged over weights; 0 without rows."""
    weights: int = sum(row["n"] * row["k"] for row in linears)
    bits: int = sum(row["n"] * row["k"] * SCHEMES[row["scheme"]].weight_bits for row in linears)
    if not weights or bits % weights == 0:
        return bits // max(weights, 1)
    return round(bits / weights, MEAN_DIGITS)


def skipped_modules(
    model: LoadedModel, rounding: Rounding, coded: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Which matrices stay in floating point, by pattern, and why; ``coded`` are those outside of blocks that do not."""
    blocks = model.family.blocks
    counts: dict[str, int] = {}
    for name, module in model.module.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() < 2 or name.startswith(f"{blocks}."):
            continue
        if name in coded:
            continue
        top = ".".join(name.split(".")[:2])
        pattern = name if top == name or blocks.startswith(f"{top}.") else f"{top}.*"
        counts[pattern] = counts.get(pattern, 0) + 1
    skipped = [{"pattern": p, "modules": n, "why": "policy"} for p, n in sorted(counts.items())]
    if rounding.scheme is None:
        linears = len(model.family.linears) * model.text.layers
        skipped.append({"pattern": f"{blocks}.*", "modules": linears, "why": "baseline"})
    return skipped


def config_with_quantization(
    model: LoadedModel,
    rounding: Rounding,
    coded: Collection[str] = (),
    *,
    bits: float | None = None,
) -> Mapping[str, Any]:
    """The model's config.json with a ``quantization_config`` that other tools refuse by name.

    A head of codes is no longer the embedding, so a config that ties them says so no longer. ``bits`` is the mean of a
    weight where units differ.
    """
    if rounding.scheme is None:
        return model.config
    config = dict(model.config)
    if model.family.head in coded and model.text.tied_head:
        config[TIED] = False
        config["text_config"] = {**config.get("text_config", {}), TIED: False}
    return {
        **config,
        "quantization_config": {
            "quant_method": "mbq",
            "bits": rounding.scheme.weight_bits if bits is None else bits,
            "group_size": rounding.group_size,
            "sym": rounding.scheme.symmetric,
            "format": f"mbq-{LAYOUT.name}",
            "version": LAYOUT.version,
            "modules_to_not_convert": [
                row["pattern"] for row in skipped_modules(model, rounding, coded)
            ],
        },
    }
