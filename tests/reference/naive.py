"""The scale search of `mbq` the long way: one exponent at a time, all tokens, the whole module run again for each.

What the full-precision block feeds its modules and what they answer is noted once; nothing else is kept, shared or
estimated. METHODS 2.1, 5, 6.1, 6.3 and 6.4 with the statistic ``mixed`` and the loss ``mae``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VISION, ANSWER = 2, 3
GRID = tuple(k / 20 for k in range(21))
UNITS = {
    "qkv": ("self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn"),
    "gate_up": ("mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    "down": ("mlp.down_proj", ("mlp.down_proj",), "mlp"),
}
"""Module whose output is looked at, linears that share a scale, half of the block."""


@dataclass(frozen=True)
class Batch:
    """Samples of one length: rows (B, T, hidden) that enter the block, its other arguments, classes (B, T)."""

    rows: Tensor
    arguments: Mapping[str, Any]
    classes: Tensor


@dataclass(frozen=True)
class Choice:
    """What a unit's search found: the exponent with the least error, and the error at every exponent."""

    alpha: float
    curve: tuple[float, ...]


@torch.no_grad()
def search_block(
    block: nn.Module,
    batches: Sequence[Batch],
    r: Mapping[str, float],
    *,
    bits: int,
    group_size: int,
) -> tuple[dict[str, Choice], list[Tensor]]:
    """Search every unit of a block; also return what the block gives the next one, per batch."""
    noted: dict[str, list[tuple[Any, Any, Tensor]]] = {unit: [] for unit in UNITS}
    handles = [
        block.get_submodule(module).register_forward_hook(
            lambda _module, rows, named, output, unit=unit: noted[unit].append(
                (rows, named, output[0] if isinstance(output, tuple) else output)
            ),
            with_kwargs=True,
        )
        for unit, (module, _, _) in UNITS.items()
    ]
    outputs = [block(batch.rows, **batch.arguments) for batch in batches]
    for handle in handles:
        handle.remove()
    classes = [batch.classes for batch in batches]
    found = {
        unit: search_unit(block, unit, noted[unit], classes, r[half], bits, group_size)
        for unit, (_, _, half) in UNITS.items()
    }
    return found, [o[0] if isinstance(o, tuple) else o for o in outputs]


def search_unit(
    block: nn.Module,
    unit: str,
    calls: list[tuple[Any, Any, Tensor]],
    classes: list[Tensor],
    r: float,
    bits: int,
    group_size: int,
) -> Choice:
    """Try every exponent on every token."""
    path, linears, _ = UNITS[unit]
    module = block.get_submodule(path)
    m = mean_magnitude(calls, classes)
    weights = {name: block.get_parameter(f"{name}.weight") for name in linears}
    exact = {name: weight.clone() for name, weight in weights.items()}
    curve = []
    for alpha in GRID:
        e = scale(m, alpha)
        for name, weight in weights.items():
            weight.copy_(nearest(exact[name] * e, bits, group_size) / e)
        total, tokens = 0.0, 0
        for (rows, named, wanted), kinds in zip(calls, classes, strict=True):
            output = module(*rows, **named)
            output = output[0] if isinstance(output, tuple) else output
            error = (wanted - output).abs().sum(-1).double()
            total += float(error[kinds == ANSWER].sum() + r * error[kinds == VISION].sum())
            tokens += int((kinds == ANSWER).sum() + (kinds == VISION).sum())
        curve.append(total / (tokens * wanted.shape[-1]))
        for name, weight in weights.items():
            weight.copy_(exact[name])
    return Choice(alpha=GRID[curve.index(min(curve))], curve=tuple(curve))


def mean_magnitude(calls: list[tuple[Any, Any, Tensor]], classes: list[Tensor]) -> Tensor:
    """Mean of |x| per input channel over all real tokens, (K,) float64."""
    total, tokens = torch.zeros(()), 0
    for (rows, named, _), kinds in zip(calls, classes, strict=True):
        x = rows[0] if rows else named["hidden_states"]
        total = total + x[kinds != 0].double().abs().sum(0)
        tokens += int((kinds != 0).sum())
    return total / tokens


def scale(m: Tensor, alpha: float) -> Tensor:
    """m to the power alpha with largest times smallest equal to 1, within [1 / 256, 256]; (K,) float32."""
    alive = m > 0
    e = m.float().pow(alpha).clamp(min=1e-4)
    e = e / (e[alive].max() * e[alive].min()).sqrt()
    e[~alive] = 1.0
    return e.clamp(1 / 256, 256)


def nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Every weight at its nearest code, groups of columns with zero points."""
    top = 2**bits - 1
    groups = weight.reshape(len(weight), -1, group_size)
    low, high = (
        groups.amin(-1, keepdim=True).clamp(max=0),
        groups.amax(-1, keepdim=True).clamp(min=0),
    )
    step = ((high - low) / top).clamp(min=2.0**-14).half().float()
    zero = torch.round(-low / step).clamp(0, top)
    codes = (torch.round(groups / step) + zero).clamp(0, top)
    values: Tensor = (codes - zero) * step
    return values.reshape(weight.shape)
