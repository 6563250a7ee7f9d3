"""From finished cells to quality.json: summaries, paired comparisons, training seeds together, targets by rule."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from docs.benchmarks.quality_cells import FIRST, FORMATS, FULL, ROUNDED, VARIANTS, Cell
from mbq_export.evaluate.quality import ANSWER, Paper, comparison, summary

PAIRS: Final = (
    ("awq", "mbq"),
    ("smoothquant", "mbq"),
    ("mbq", "gptq"),
    ("mbq", "mbq+"),
    ("gptq", "mbq+"),
    ("mbq", "qvlm"),
    ("qvlm", "mbq+"),
)
"""Compared beside full precision and plain rounding."""
KL_TARGET: Final = 1 / 4
KL_STRETCH: Final = 1 / 8
POINTS: Final = 0.01
WITHIN: Final = (("w3-g128", "mbq+"), ("w4a8-g128", "mbq"), ("w4a8-g128", "mbq+"))
"""Where exact match may be a point below full precision at most."""


def row_of(cell: Cell, paper: Paper, code: str) -> dict[str, Any]:
    """What the table shows of a cell.

    Args:
        cell: Which.
        paper: What its model made of the exam.
        code: Hash of the sources that computed it.
    """
    return {**asdict(cell), "title": cell.title, "code": code, **summary(paper)}


def against(cell: Cell) -> Iterator[tuple[str, Cell]]:
    """Yield what a cell is compared with, by method."""
    if cell.method == FULL:
        return
    yield FULL, cell.full
    if cell.method != ROUNDED:
        yield ROUNDED, Cell(**{**asdict(cell), "method": ROUNDED, "draw": 0})
    for first, second in PAIRS:
        if second == cell.method:
            yield first, Cell(**{**asdict(cell), "method": first})


def pair_of(cell: Cell, first: str, before: Paper, after: Paper) -> dict[str, Any]:
    """Compare a cell with another on the same questions: differences are the cell's minus the other's."""
    return {
        **asdict(cell),
        "title": cell.title,
        "against": first,
        **comparison(before, after),
    }


def seeds_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put the training seeds of a method together, draw 0.

    Returns:
        Per variant, format and method: ``models`` (name to accuracy, difference to full precision and KL at answers)
        and ``kl_geometric_mean``.
    """
    full = {(row["model"], row["variant"]): row for row in rows if row["method"] == FULL}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        if row["draw"] or row["method"] == FULL:
            continue
        entry = found.setdefault((row["variant"], row["format"], row["method"]), {})
        accuracy = row["accuracy"]["value"]
        base = full.get((row["model"], row["variant"]))
        entry[row["model"]] = {
            "accuracy": accuracy,
            "lost": None if base is None else base["accuracy"]["value"] - accuracy,
            "kl": row["kl"][ANSWER]["mean"]["value"],
        }
    return [
        {
            "variant": variant,
            "format": name,
            "method": method,
            "models": models,
            "kl_geometric_mean": geometric_mean([one["kl"] for one in models.values()]),
        }
        for (variant, name, method), models in found.items()
    ]


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that suits numbers of different sizes; none may be negative."""
    least = np.finfo(np.float64).tiny
    return float(np.exp(np.mean(np.log(np.maximum(values, least)))))


def targets(seeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Judge what the project set out to reach, by rule; None where a cell is missing.

    Returns:
        Per target, variant and format: ``rule`` in words, ``values`` per training seed, ``value``, ``limit``, ``met``.
    """
    by_name = {(one["variant"], one["format"], one["method"]): one for one in seeds}
    found = []
    for variant in VARIANTS:
        for name in FIRST:
            before = by_name.get((variant, name, "mbq"))
            after = by_name.get((variant, name, "mbq+"))
            for limit, title in ((KL_TARGET, "target"), (KL_STRETCH, "stretch")):
                found.append({**_ratio(before, after, limit), "kind": title, **_at(variant, name)})
        for name, method in WITHIN:
            one = by_name.get((variant, name, method))
            found.append({**_lost(one, method), "kind": "target", **_at(variant, name)})
    return found


def _at(variant: str, name: str) -> dict[str, str]:
    return {"variant": variant, "format": FORMATS[name].title}


def _ratio(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, limit: float
) -> dict[str, Any]:
    """KL of mbq+ over that of mbq: geometric mean over the training seeds that have both."""
    values = {}
    if before is not None and after is not None:
        values = {
            model: one["kl"] / before["models"][model]["kl"]
            for model, one in after["models"].items()
            if model in before["models"]
        }
    value = geometric_mean([*values.values()]) if values else None
    return {
        "rule": f"KL of mbq+ is at most 1/{round(1 / limit)} of mbq's, geometric mean over training seeds",
        "values": values,
        "value": value,
        "limit": limit,
        "met": None if value is None else value <= limit,
    }


def _lost(one: Mapping[str, Any] | None, method: str) -> dict[str, Any]:
    """Exact match that a method costs: the largest over training seeds."""
    models = {} if one is None else one["models"]
    values = {model: each["lost"] for model, each in models.items() if each["lost"] is not None}
    value = max(values.values(), default=None)
    return {
        "rule": f"{method} loses at most one point of exact match, on every training seed",
        "values": values,
        "value": value,
        "limit": POINTS,
        "met": None if value is None else value <= POINTS,
    }
