"""The vision tower in 8 bits: outliers shared between activations and weights, then codes per channel and token.

    e  = sqrt(max |x| / max |w|)        per input channel of linears that a norm or a linear of its own feeds
    W' = W diag(e),  source / e         folded: the tower computes the same
    W' ──► w8a8, nearest                activations are rounded while the model runs, token by token

SmoothQuant, arXiv 2211.10438, at strength one half. What the family's places name is rounded, nothing else: patch
and position embedding and the projector stay as they are, and a linear behind a non-linear function, which no scale
commutes with, is rounded without one. Per channel because widths like 4304 have no groups.

Maxima are taken over the calibration pictures; what rounding costs is measured on others where there are any:

    error = |projector of the rounded tower - projector| / |projector|        over all rows of all tiles
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from mbq_export.errors import GateError, UsageError, located
from mbq_export.families.tower import scopes_of
from mbq_export.quantize.apply import (
    ERROR_DIGITS,
    check_finite,
    exact,
    note_zeros,
    packed_tensors,
    relative_error,
)
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import Codes, dequantize, quantize, rounded_per_token
from mbq_export.schemes.base import CHANNEL, QuantScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs
    from mbq_export.families.tower import TowerPlace
    from mbq_export.quantize.feedback import Samples

logger = logging.getLogger(__name__)

SCHEME_BY_BITS: Final = {8: "w8a8"}
KEPT_BITS: Final = 16
STRENGTH: Final = 0.5
FLOOR: Final = 1e-5
"""Least of either maximum, as in the published code."""
LIMIT: Final = 0.01
"""Relative error of the projector's output that goes without a warning (METHODS 14)."""
TILES_AT_ONCE: Final = 8


@dataclass(frozen=True, kw_only=True)
class QuantizedTower:
    """What a checkpoint stores of a vision tower.

    Attributes:
        tensors: By full name; everything of a linear that became codes, and what its scale was folded into.
        replaced: Names of float tensors that are no longer stored.
        linears: One row for `mbq.json` per linear, in the order of the tower.
        facts: What `mbq.json` says of the tower as a whole.
    """

    tensors: Mapping[str, NDArray[Any]]
    replaced: frozenset[str]
    linears: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any]


def tower_scheme(bits: int) -> QuantScheme | None:
    """Number format of a tower's linears; None for 16, which keeps them.

    Raises:
        UsageError: E2001 for another width.
    """
    if bits == KEPT_BITS:
        return None
    if bits not in SCHEME_BY_BITS:
        raise UsageError(
            "E2001",
            f"Unknown --vision-bits {bits}.",
            why=f"known: {KEPT_BITS}, {', '.join(map(str, SCHEME_BY_BITS))}",
            fix="--vision-bits 8",
        )
    return SCHEMES[SCHEME_BY_BITS[bits]]


@torch.no_grad()
def quantize_tower(
    model: LoadedModel, scheme: QuantScheme, samples: Samples | None
) -> QuantizedTower:
    """Smooth, round and pack the linears of the family's tower. The model is not changed.

    It is computed anew when a build is resumed: the same from the same pictures.

    Args:
        model: In float32.
        scheme: Rounds weights per channel, and activations.
        samples: Pictures of the calibration; the held-out ones say what rounding costs, else all.

    Raises:
        UsageError: E2018 without pictures, E2007 for too many columns.
        GateError: E1103 for activations that are not finite.
        FormatError: E4110 for weights that are not finite.
    """
    pictures = _tiles(() if samples is None else samples.inputs)
    if not pictures:
        raise UsageError(
            "E2018",
            "--vision-bits 8 has no pictures to look at.",
            why="how far activations reach decides what they share with weights",
            fix=("--data calib.jsonl, with pictures", "--vision-bits 16"),
        )
    tower = model.family.vision_module(model)
    places, scopes = model.family.tower_places(model), scopes_of(model, tower)
    part = copy.deepcopy(tower).float()
    check_finite({name: part.get_parameter(name) for name, _ in part.named_parameters()})
    fold_places(part, places, smoothing(part, places, scopes, pictures), scopes)
    folded = copy.deepcopy(part)
    coded = _coded(part, places, scopes, scheme)
    tensors = {name: array for each, _ in coded for name, array in each.items()}
    rows = tuple(row for _, row in coded)
    kept = _touched(folded, places, scopes)
    judged = _tiles(samples.held_out if samples is not None else ()) or pictures
    error = projector_error(folded, part, judged)
    if error > LIMIT:
        logger.warning(
            "MBQ-W1122: --vision-bits 8 moves the projector's output by %.2g %%, more than %g %%: --vision-bits 16",
            100 * error,
            100 * LIMIT,
        )
    return QuantizedTower(
        tensors={**{name: exact(tensor, model, name) for name, tensor in kept.items()}, **tensors},
        replaced=frozenset(f"{row['name']}.weight" for row in rows),
        linears=rows,
        facts={
            "scheme": scheme.name,
            "group_size": CHANNEL,
            "linears": [row["name"] for row in rows],
            "smoothing": STRENGTH,
            "projector": {
                "error": float(f"{error:.{ERROR_DIGITS}g}"),
                "limit": LIMIT,
                "tiles": sum(len(each) for each in judged),
            },
        },
    )


def _coded(
    tower: nn.Module,
    places: Sequence[TowerPlace],
    scopes: Mapping[str, str],
    scheme: QuantScheme,
) -> list[tuple[dict[str, NDArray[Any]], dict[str, Any]]]:
    """Let a folded tower compute with codes; its linears' tensors and rows for `mbq.json`, in order."""
    found = []
    for path in (path for place in places for path in place.into):
        linear = tower.get_submodule(scopes[path])
        weight = linear.get_parameter("weight")
        with located(path):
            scheme.check_columns(weight.shape[1], CHANNEL)
            codes = quantize(weight, scheme=scheme, group_size=CHANNEL)
            note_zeros(path, weight, codes)
        found.append((packed_tensors(path, codes, scheme), _row(path, linear, codes, scheme)))
        _round(linear, codes, bits=scheme.act_bits)
    return found


def smoothing(
    tower: nn.Module,
    places: Sequence[TowerPlace],
    scopes: Mapping[str, str],
    pictures: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Scales of all places that have a source.

    Args:
        tower: In float32.
        places: The family's.
        scopes: Module path to path inside `tower`.
        pictures: (tiles, 3, h, w) each.

    Returns:
        By the first linear of the place: (K,) e, its largest and its least with product 1.

    Raises:
        GateError: E1103 for activations that are not finite.
    """
    reached: dict[str, Tensor] = {}

    def note(path: str, _module: nn.Module, positional: tuple[Tensor, ...]) -> None:
        here = positional[0].abs().flatten(0, -2).amax(0)
        reached[path] = torch.maximum(reached[path], here) if path in reached else here

    handles = [
        tower.get_submodule(scopes[place.into[0]]).register_forward_pre_hook(
            partial(note, place.into[0])
        )
        for place in places
        if place.source is not None
    ]
    for tiles in pictures:
        tower(tiles)
    for handle in handles:
        handle.remove()
    found = {}
    for place in places:
        if place.source is not None:
            first = place.into[0]
            largest = [
                tower.get_submodule(scopes[path]).get_parameter("weight").abs().amax(0)
                for path in place.into
            ]
            found[first] = _scale(first, reached[first], torch.stack(largest).amax(0))
    return found


def _scale(path: str, x: Tensor, w: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise GateError(
            "E1103",
            f"{int((~torch.isfinite(x)).sum())} input channels of {path} are not finite.",
            why="activations overflow",
            fix="check the weights: mbq-export inspect MODEL",
        )
    e = (x.clamp(min=FLOOR) / w.clamp(min=FLOOR)).pow(STRENGTH)
    e = e / (e.max() * e.min()).sqrt()
    return torch.where(x > 0, e, torch.ones_like(e))


@torch.no_grad()
def fold_places(
    tower: nn.Module,
    places: Sequence[TowerPlace],
    scales: Mapping[str, Tensor],
    scopes: Mapping[str, str],
) -> None:
    """Multiply the columns of linears by their scales and divide what feeds them, in place.

    Args:
        tower: In float32, the caller's own.
        places: The family's; those without a scale are left as they are.
        scales: By the first linear of a place: (K,) e > 0.
        scopes: Module path to path inside `tower`.
    """
    for place in places:
        e = scales.get(place.into[0])
        if e is None or place.source is None:
            continue
        source = tower.get_submodule(scopes[place.source])
        for name, parameter in source.named_parameters(recurse=False):
            columns = (-1,) + (1,) * (parameter.dim() - 1)
            source.get_parameter(name).div_(e.reshape(columns))
        for path in place.into:
            tower.get_submodule(scopes[path]).get_parameter("weight").mul_(e)


@torch.no_grad()
def projector_error(
    exact_tower: nn.Module, rounded: nn.Module, pictures: Sequence[Tensor]
) -> float:
    """Distance of two towers' features, relative to the length of the first's, over all tiles."""
    change = size = 0.0
    for tiles in pictures:
        wanted = exact_tower(tiles).double()
        change += float((rounded(tiles).double() - wanted).square().sum())
        size += float(wanted.square().sum())
    return float((change / size) ** 0.5) if size else 0.0


def _tiles(inputs: Sequence[ModelInputs]) -> list[Tensor]:
    """Tiles of all pictures, some at a time."""
    return [
        torch.from_numpy(each.pixel_values[start : start + TILES_AT_ONCE])
        for each in inputs
        for start in range(0, len(each.pixel_values), TILES_AT_ONCE)
    ]


def _row(path: str, linear: nn.Module, codes: Codes, scheme: QuantScheme) -> dict[str, Any]:
    weight = linear.get_parameter("weight")
    return {
        "name": path,
        "n": weight.shape[0],
        "k": weight.shape[1],
        "scheme": scheme.name,
        "group_size": CHANNEL,
        "bias": getattr(linear, "bias", None) is not None,
        "alpha": None,
        "error": {"weight": relative_error(codes, weight)},
        "clamped_scales": codes.clamped,
    }


def _round(linear: nn.Module, codes: Codes, *, bits: int) -> None:
    """Let a linear compute with its codes and with rounded rows."""
    linear.get_parameter("weight").copy_(dequantize(codes))
    linear.register_forward_pre_hook(partial(_rows, bits))


def _rows(bits: int, _module: nn.Module, positional: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded_per_token(positional[0], bits=bits), *positional[1:])


def _touched(
    tower: nn.Module, places: Sequence[TowerPlace], scopes: Mapping[str, str]
) -> dict[str, Tensor]:
    """What a folded tower has beside codes: sources of scales, biases of linears, by full name."""
    linears = {path for place in places for path in place.into}

    def named() -> Iterator[tuple[str, Tensor]]:
        for path in dict.fromkeys([*(p.source for p in places if p.source), *linears]):
            for name, tensor in tower.get_submodule(scopes[path]).named_parameters(recurse=False):
                if path not in linears or name != "weight":
                    yield f"{path}.{name}", tensor

    return dict(named())
