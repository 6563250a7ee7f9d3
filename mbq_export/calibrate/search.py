"""Try every exponent on a grid and keep the channel scale that moves a module's output least.

    e = m**alpha / sqrt(max * min)          m: mean |x| per input channel
    W' = Q(W diag(e)) diag(1 / e)           alpha = 0 is plain rounding
    J(alpha) = error of the module's output with W' in place of W, weighed per token class

Where the scheme rounds activations (METHODS 7), the unit's linears read x / e rounded per token, and Q(W diag(e)) is
not scaled back: the objective sees both errors, and alpha = 0 is still plain rounding.

MBQ, arXiv 2412.19509, section 3.2, on the search of AWQ, arXiv 2306.00978, section 3.2. With ``tokens`` N
candidates race on tokens drawn per class, N of them in the middle step (`race`); ``all`` scores all on every token.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from mbq_export.blocks.fold import folds_safely
from mbq_export.blocks.loss import class_totals, coefficients, token_errors
from mbq_export.calibrate.excerpt import run
from mbq_export.calibrate.methods.base import Found
from mbq_export.calibrate.race import Scored, race
from mbq_export.errors import GateError
from mbq_export.families.base import ANSWER, PAD, PROMPT, TOKEN_CLASSES, VISION
from mbq_export.schemes.affine import dequantize, grid_of, quantize, rounded_per_token
from mbq_export.schemes.base import CHANNEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mbq_export.calibrate.excerpt import Excerpt
    from mbq_export.calibrate.units import Call, UnitView
    from mbq_export.channel_scales import Switches
    from mbq_export.families.base import TextShape

WIDEST: Final = 256.0
"""Scales are clipped to [1 / 256, 256] after normalizing."""

CANDIDATE_BYTES: Final = 1 << 30
"""Rounded candidate weights held at a time."""

CACHED: Final = 1 << 15
"""Weights rounded at a time: about twenty passes over what a processor's own cache holds."""


def exponents(switches: Switches, *, coarse: bool = False) -> tuple[float, ...]:
    """The grid: k / 20, without 1 in the published form; every other one of them in a coarse ``auto``."""
    if switches.grid == "auto":
        return tuple(k / 20 for k in range(0, 21, 2 if coarse else 1))
    return tuple(k / 20 for k in range(int(switches.grid)))


def statistic(unit: UnitView, switches: Switches) -> Tensor:
    """|x| per input channel, (K,) float64: the largest, or the mean over the tokens that `switches.stat` names.

    Balanced (METHODS 6.4): (answer + r vision) / (1 + r), because vision tokens outnumber answers.
    """
    mean = unit.statistics.mean
    if switches.stat == "balanced":
        m = (mean(ANSWER) + unit.r * mean(VISION)) / (1 + unit.r)
    elif switches.stat == "mixed":
        m = mean(PROMPT, VISION, ANSWER, *([PAD] if switches.compat == "mbq" else []))
    elif switches.stat == "max":
        m = unit.statistics.peak(PROMPT, VISION, ANSWER)
    else:
        m = mean(ANSWER if switches.stat == "answer" else VISION)
    return shared_by_heads(m, text=unit.text) if unit.place.unit == "o" else m


def shared_by_heads(m: Tensor, *, text: TextShape) -> Tensor:
    """Average the channels that read the same value channel: (heads * D,) to the same shape.

    Query head h reads key-value head h // (heads / kv_heads), so one scale must serve all of its readers.
    """
    per_head = m.reshape(text.kv_heads, -1, text.head_dim)
    return per_head.mean(1, keepdim=True).expand_as(per_head).reshape(-1)


def scale(m: Tensor, alpha: float, *, compat: bool = False) -> Tensor:
    """Turn a statistic into a scale.

    Channels that never see a value stay out of the normalization and keep 1; the published rule instead
    lets one of them shift all others.

    Args:
        m: (K,), not negative.
        alpha: Exponent.
        compat: Use the published rule.

    Returns:
        (K,) float32 e, with max * min = 1 before clipping.
    """
    e = m.float().pow(alpha).clamp(min=1e-4)
    return e / (e.max() * e.min()).sqrt() if compat else normalized(e, alive=m > 0)


def normalized(e: Tensor, *, alive: Tensor) -> Tensor:
    """Let the largest and the smallest of some scales multiply to 1, then clip; the others become 1.

    Args:
        e: (K,) float32, positive.
        alive: (K,) bool.
    """
    if not bool(alive.any()):
        return torch.ones_like(e)
    e = e / (e[alive].max() * e[alive].min()).sqrt()
    e[~alive] = 1.0
    return e.clamp(1 / WIDEST, WIDEST)


def rounded(unit: UnitView, e: Tensor, *, compat: bool) -> dict[str, Tensor]:
    """Weights of the unit after scaling, rounding and scaling back, named for the inspected module.

    They stay scaled where the scheme rounds activations: the inputs are divided instead, before they are rounded.
    """
    found = {}
    for linear in unit.place.into:
        weight = unit.block.get_parameter(f"{linear}.weight")
        back = torch.empty_like(weight)
        rows = max(1, CACHED // weight.shape[1])
        for part, into in zip(torch.split(weight, rows), torch.split(back, rows), strict=True):
            scaled = part * e.to(weight.dtype) if compat else part.float() * e
            real = _values(unit, scaled, compat=compat)
            into.copy_(real if unit.scheme.rounds_activations else real.div_(e))
        found[unit.parameter(linear)] = back
    return found


def _values(unit: UnitView, weight: Tensor, *, compat: bool) -> Tensor:
    """What rounding makes of weights, without the codes on the way: (N, K) float32."""
    if not compat:
        groups = unit.scheme.groups_of(weight.shape[1], unit.group_size)
        grouped = weight.reshape(len(weight), groups, -1)
        grid = grid_of(grouped, scheme=unit.scheme, channel=unit.group_size == CHANNEL)
        if bool(torch.isfinite(grid.scales).all()):
            step, zero = grid.scales[..., None].float(), grid.zeros[..., None].float()
            codes = (grouped / step).round_().add_(zero).clamp_(0, unit.scheme.largest_code)
            return codes.sub_(zero).mul_(step).reshape(weight.shape)
    # It says what is wrong with a weight that is not finite.
    return dequantize(
        quantize(weight, scheme=unit.scheme, group_size=unit.group_size, compat=compat)
    )


@contextmanager
def rounded_inputs(unit: UnitView, e: Tensor) -> Iterator[None]:
    """Divide what the unit's linears read by e and round it per token, if the scheme rounds activations at all."""

    def rounded_rows(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = rounded_per_token(args[0].float() / e, bits=unit.scheme.act_bits)
        return (rows.to(args[0].dtype),)

    with ExitStack() as hooks:
        for linear in unit.place.into if unit.scheme.rounds_activations else ():
            handle = unit.block.get_submodule(linear).register_forward_pre_hook(rounded_rows)
            hooks.callback(handle.remove)
        yield


def search(unit: UnitView, switches: Switches) -> Found:
    """Keep the exponent with the smallest objective; ties go to the smaller one.

    Args:
        unit: One unit of a block.
        switches: Loss, grid, statistic, tokens, compatibility.

    Raises:
        GateError: E1103 naming the exponent if an objective is not finite.
    """
    m = statistic(unit, switches)
    compat = switches.compat == "mbq"
    grid = exponents(switches, coarse=unit.coarse)
    candidates = {alpha: scale(m, alpha, compat=compat) for alpha in grid}
    scored = score(unit, [*candidates.values()], switches)
    usable = torch.where(scored.last, scored.values, torch.inf)
    ranked = torch.argsort(usable, stable=True).tolist()
    about = {"stat": switches.stat, "dead_channels": int((m == 0).sum())}
    return choose(unit, candidates, scored, ranked, about=about)


def choose(
    unit: UnitView,
    candidates: Mapping[float, Tensor],
    scored: Scored,
    ranked: Sequence[int],
    *,
    about: Mapping[str, object],
) -> Found:
    """Keep the first scale that can be folded, and record all objectives.

    Args:
        unit: One unit of a block.
        candidates: (K,) scales by exponent; the first is plain rounding.
        scored: Their objectives.
        ranked: Places of the candidates, best first.
        about: What they were made from, for the record.

    Raises:
        GateError: E1103 naming the exponent if an objective is not finite.
    """
    alphas, scales = [*candidates], [*candidates.values()]
    if not bool(torch.isfinite(scored.values).all()):
        bad = alphas[int((~torch.isfinite(scored.values)).nonzero()[0])]
        raise GateError(
            "E1103",
            f"The objective at exponent {bad} is not finite.",
            why="activations or weights overflow",
            fix="check the weights: mbq-export inspect MODEL",
        )
    fitting = [
        place
        for place in ranked
        if folds_safely(unit.block, scales[place], place=unit.place, text=unit.text)
    ]
    best = fitting[0] if fitting else 0
    record = {**about, **_record(unit, alphas, scored, best), "dropped": ranked.index(best)}
    return Found(alpha=alphas[best], scales=scales[best], record=record)


def score(unit: UnitView, candidates: Sequence[Tensor], switches: Switches) -> Scored:
    """Score candidates, on draws of tokens where those stand for all.

    Args:
        unit: One unit of a block.
        candidates: (K,) scales; the first is plain rounding.
        switches: Loss and compatibility.
    """
    tokens, compat = unit.statistics.tokens, switches.compat == "mbq"
    weigh = coefficients(
        tokens, width=unit.text.hidden, loss=switches.loss, weights=unit.weights, pads=compat
    )
    if unit.steps:
        return race(
            unit.steps,
            lambda place, excerpts: _drawn_errors(unit, excerpts, candidates[place], switches),
            candidates=len(candidates),
            tokens=tokens,
            weigh=weigh,
        )
    totals = _all_totals(unit, candidates, switches)
    values, every = totals @ weigh, int(tokens.sum())
    return Scored(
        values=values,
        last=torch.ones(len(values), dtype=torch.bool),
        totals=totals,
        deviation=torch.zeros_like(values),
        seen=every,
        last_seen=every,
    )


def _drawn_errors(
    unit: UnitView, excerpts: Sequence[Excerpt], e: Tensor, switches: Switches
) -> Tensor:
    """Token errors of a candidate at drawn tokens: (n,) float64."""
    weights = rounded(unit, e, compat=switches.compat == "mbq")
    with rounded_inputs(unit, e):
        found = [
            token_errors(each.output - run(unit.inspected, weights, each), loss=switches.loss)
            for each in excerpts
        ]
    return torch.cat([errors.flatten() for errors in found])


def _all_totals(unit: UnitView, candidates: Sequence[Tensor], switches: Switches) -> Tensor:
    """Per-class sums over all tokens: (C, classes) float64."""
    weight_bytes = 4 * sum(
        unit.block.get_parameter(f"{linear}.weight").numel() for linear in unit.place.into
    )
    at_once = max(1, CANDIDATE_BYTES // weight_bytes)
    parts = []
    for start in range(0, len(candidates), at_once):
        some = candidates[start : start + at_once]
        weights = [rounded(unit, e, compat=switches.compat == "mbq") for e in some]
        totals = torch.zeros(len(some), len(TOKEN_CLASSES), dtype=torch.float64)
        for call in unit.calls():
            for place, weight in enumerate(weights):
                errors = _errors(unit, call, some[place], weight, switches)
                totals[place] += class_totals(errors, call.classes)
        parts.append(totals)
    return torch.cat(parts)


def _errors(
    unit: UnitView, call: Call, e: Tensor, weights: dict[str, Tensor], switches: Switches
) -> Tensor:
    """Token errors of one call with a scale and its weights: (T,) float64. The module itself is not changed."""
    with rounded_inputs(unit, e):
        moved = torch.func.functional_call(
            unit.inspected, weights, (call.rows,), dict(call.arguments)
        )
    output = moved[0] if isinstance(moved, tuple) else moved
    return token_errors(call.output - output, loss=switches.loss).flatten()


def _record(
    unit: UnitView, alphas: Sequence[float], scored: Scored, best: int
) -> dict[str, object]:
    values = scored.values.tolist()
    width, counted = float(unit.text.hidden), unit.statistics.tokens
    per_token = scored.totals / (counted.clamp(min=1.0) * width)
    classes = {
        name: {TOKEN_CLASSES[kind]: float(per_token[place, kind]) for kind in (VISION, ANSWER)}
        for name, place in (("rtn", 0), ("best", best))
    }
    return {
        "J": {"rtn": values[0], "best": values[best], "se": float(scored.deviation[best])},
        "error": classes,
        "grid": [[alpha, value] for alpha, value in zip(alphas, values, strict=True)],
        "last": [alpha for alpha, last in zip(alphas, scored.last.tolist(), strict=True) if last],
        "tokens": {"scored": scored.seen, "rescored": scored.last_seen, "all": int(counted.sum())},
        "degenerate": len(set(values)) == 1,
    }
