"""Balanced: an error on a vision token weighs r, on a prompt token nothing."""

from dataclasses import replace

import pytest

from mbq_export.blocks.loss import ClassWeights
from mbq_export.calibrate.methods.mbq import METHOD
from mbq_export.calibrate.units import UnitView
from mbq_export.families.base import ANSWER, PROMPT, VISION
from tests.calibrate.views import moved_on, views
from tests.questions import questions, tiny_model

EVERY = replace(METHOD.switches, tokens="all")


def view(**weights: float) -> UnitView:
    model = tiny_model()
    found = views(model, questions(model, 4), EVERY)["down"]
    return replace(found, weights=ClassWeights(**weights))


def objective(unit: UnitView) -> float:
    assert METHOD.scales is not None
    found = METHOD.scales(unit, EVERY)
    assert found is not None
    return found.record["J"]["rtn"]


def test_the_preset_is_the_papers() -> None:
    found = METHOD.switches
    assert (found.loss, found.grid, found.stat, found.r_floor) == ("mae", "21", "mixed", "median")
    assert (found.rounding, found.clip, found.prefix) == ("nearest", "none", "fp")
    assert METHOD.balanced
    assert not found.gqa_o_scale


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (PROMPT, {"vision": 0.5}),
        (VISION, {"vision": 0.0}),
    ],
    ids=["prompt", "vision at r = 0"],
)
def test_errors_on_a_class_without_weight_do_not_matter(
    kind: int, weights: dict[str, float]
) -> None:
    unit = view(**weights)
    assert objective(moved_on(unit, kind, by=100.0)) == objective(unit)


@pytest.mark.parametrize(
    ("kind", "weight"), [(ANSWER, 1.0), (VISION, 0.25)], ids=["answer", "vision"]
)
def test_errors_matter_by_the_weight_of_their_class(kind: int, weight: float) -> None:
    """Outputs moved by far more than rounding moves them: J is the weighed share of the moved tokens."""
    unit = view(vision=0.25)
    tokens = unit.statistics.tokens
    share = float(weight * tokens[kind] / (tokens[ANSWER] + tokens[VISION]))
    assert objective(moved_on(unit, kind, by=1000.0)) / 1000 == pytest.approx(share, rel=1e-2)


def test_prompts_matter_once_they_have_a_weight() -> None:
    unit = view(vision=0.25, prompt=0.5)
    assert objective(moved_on(unit, PROMPT, by=100.0)) > 2 * objective(unit)
