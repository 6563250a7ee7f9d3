"""Which tokens the answer depends on: gradient ratios between token classes, and the paper's r.

    A1    = mean of a1 over the samples that have the class                every sample weighs the same
    ratio = A1(class) / A1(answer), per linear
    rho   = ratio of vision at o_proj (attention half) and down_proj (MLP half)
    r     = max(rho, median of rho over layers)            MBQ, arXiv 2412.19509, section 3.2

The floor is in the published code, not in the paper: in the last layer no vision token's output reaches the
loss, so rho is exactly 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mbq_export.blocks.ratios import MEASURED_AT
from mbq_export.errors import FormatError
from mbq_export.families.base import ANSWER, PROMPT, TOKEN_CLASSES, VISION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from mbq_export.calibrate.gradients import Gradients

RESAMPLES: Final = 200
INTERVAL: Final = (5.0, 95.0)
CLIP: Final = 8.0
SHOWN: Final = (VISION, ANSWER, PROMPT)


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Gradients relative to answer tokens, NaN where undefined.

    Attributes:
        value: (layers, J, classes) float64, A1(class) / A1(answer).
        low: Same shape, lower end of the bootstrap's 90 % interval.
        high: Same shape, upper end.
    """

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def ratios(gradients: Gradients, *, seed: int = 0) -> Ratios:
    """Divide by the answer tokens' mean; resample the samples 200 times for an interval."""
    statistics = gradients.mean_abs
    samples = statistics.shape[-1]
    value = _ratio(statistics, np.ones(samples))
    rng = np.random.default_rng([seed, RESAMPLES])
    draws = rng.integers(0, samples, (RESAMPLES, samples))
    resampled = np.stack(
        [_ratio(statistics, np.bincount(draw, minlength=samples).astype(float)) for draw in draws]
    )
    undefined = np.isnan(value)
    resampled[:, undefined] = 0.0
    low, high = np.nanpercentile(resampled, INTERVAL, axis=0)
    low[undefined] = high[undefined] = np.nan
    return Ratios(value=value, low=low, high=high)


def floored(rho: NDArray[np.float64], *, floor: str | float) -> NDArray[np.float64]:
    """Lift rho to r (METHODS 4.3).

    Args:
        rho: (layers,), NaN where no answer token has a gradient.
        floor: "median" over layers (mean of the middle two for an even number), "none", or a number.

    Returns:
        (layers,) float64, 0 where rho is undefined and nothing lifts it.

    Raises:
        FormatError: E4309 if rho is undefined everywhere.
    """
    if np.isnan(rho).all():
        raise FormatError(
            "E4309",
            "No answer token has a gradient.",
            why="an answer of one token predicts nothing: its end-of-turn token belongs to it",
            fix="give the data longer answers",
        )
    if floor == "none":
        return np.nan_to_num(rho)
    least = float(np.nanmedian(rho)) if floor == "median" else float(floor)
    return np.fmax(rho, least)


def sensitivity(
    gradients: Gradients, *, floor: str | float, seed: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Sum up a measurement as `sensitivity.json` keeps it (METHODS 4.5).

    Args:
        gradients: Per-sample statistics.
        floor: Least r, see `floored`.
        seed: Seeds the bootstrap.
        facts: ``model``, ``data`` and ``dtype``, recorded as they are.

    Raises:
        FormatError: E4309 if no answer token has a gradient.
    """
    found = ratios(gradients, seed=seed)
    rho = {
        half: found.value[:, gradients.linears.index(linear), VISION]
        for half, linear in MEASURED_AT.items()
    }
    has_vision = not np.isnan(gradients.mean_abs[..., VISION, :]).all()
    r = {
        half: floored(values, floor=floor) if has_vision else np.zeros_like(values)
        for half, values in rho.items()
    }
    return {
        **facts,
        "source": "measured",
        "loss_mean": float(gradients.losses.mean()),
        "floor": floor,
        "median": {
            half: float(np.nanmedian(values)) if has_vision else None
            for half, values in rho.items()
        },
        "layers": [
            {
                "layer": layer,
                "r": {half: float(values[layer]) for half, values in r.items()},
                "linears": {
                    name: _linear(gradients, found, layer, place)
                    for place, name in enumerate(gradients.linears)
                },
            }
            for layer in range(len(found.value))
        ],
    }


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A table for people: layer, linear, vision / answer, prompt / answer with intervals, r of its half."""
    return [
        (
            str(entry["layer"]),
            name,
            _interval(values["ratio"]["vision"]),
            _interval(values["ratio"]["prompt"]),
            next((f"{entry['r'][half]:.3g}" for half, at in MEASURED_AT.items() if at == name), ""),
        )
        for entry in report["layers"]
        for name, values in entry["linears"].items()
    ]


def _ratio(statistics: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., classes, samples) to (..., classes): weighted means over samples, relative to answer tokens."""
    present = ~np.isnan(statistics)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (np.nan_to_num(statistics) @ weight) / (present @ weight)
        found: NDArray[np.float64] = means / means[..., ANSWER : ANSWER + 1]
    found[~np.isfinite(found)] = np.nan
    return found


def _linear(gradients: Gradients, found: Ratios, layer: int, place: int) -> dict[str, Any]:
    def means(values: NDArray[np.float64]) -> dict[str, float | None]:
        return {
            TOKEN_CLASSES[kind]: None
            if np.isnan(values[layer, place, kind]).all()
            else float(np.nanmean(values[layer, place, kind]))
            for kind in SHOWN
        }

    relative = (VISION, PROMPT)
    ends = {
        TOKEN_CLASSES[kind]: [
            _number(part[layer, place, kind]) for part in (found.value, found.low, found.high)
        ]
        for kind in relative
    }
    clipped = {
        name: None if value is None else float(np.clip(value, 1 / CLIP, CLIP))
        for name, (value, _, _) in ends.items()
    }
    return {
        "mean_abs": means(gradients.mean_abs),
        "mean_sq": means(gradients.mean_square),
        "ratio": ends,
        "clipped": clipped,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(ends: list[float | None]) -> str:
    value, low, high = ends
    return "-" if value is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"
