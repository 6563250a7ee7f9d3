"""The search for w4a8 and w8a8 is the slow one: every unit, both losses, per channel, in groups, and as published."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.stream import BlockStream
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.search import exponents, scale, search, statistic
from mbq_export.calibrate.units import UnitView
from mbq_export.errors import UsageError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from tests.calibrate.views import RATIOS, views
from tests.questions import questions, tiny_model
from tests.reference import activation_search, moved_rows
from tests.reference.moved_rows import UNITS
from tests.tiny import Tiny

MBQ = METHODS["mbq"]
PER_HEAD = Tiny(kv_heads=4, seed=1)
SAMPLES = 2
SUMS = 1e-5
"""The same codes and scales: float32 products, summed in another order."""


def by_hand(view: UnitView) -> Tensor:
    """The scale of exponent one half, from the rows themselves."""
    rows = torch.cat([call.rows.flatten(0, -2) for call in view.calls()])
    return moved_rows.scale(rows, 0.5)


@pytest.mark.parametrize("loss", ["mae", "mse"])
@pytest.mark.parametrize("unit", ["qkv", "o", "gate_up", "down"])
@pytest.mark.parametrize(
    ("scheme", "group_size", "compat"),
    [
        ("w4a8", CHANNEL, "mbq"),
        ("w4a8", 128, "none"),
        ("w8a8", CHANNEL, "none"),
    ],
)
def test_every_candidate_has_the_loss_of_the_slow_search(
    scheme: str, group_size: int, compat: str, unit: str, loss: Any
) -> None:
    model = tiny_model(PER_HEAD)
    inputs = questions(model, SAMPLES)
    chosen = {"loss": loss, "tokens": "all"}
    switches = MBQ.resolve(chosen if compat == "none" else {**chosen, "compat": compat})
    view = views(model, inputs, switches, scheme=scheme, group_size=group_size)[unit]
    found = search(view, switches)
    m, published = statistic(view, switches), compat == "mbq"
    scales = [scale(m, alpha, compat=published) for alpha in exponents(switches)]
    torch.testing.assert_close(scales[10], by_hand(view), rtol=SUMS, atol=0)
    stream = BlockStream(model)
    wanted = activation_search.search(
        stream,
        stream.begin(inputs),
        unit,
        scales,
        bits=int(scheme[1]),
        group_size=group_size,
        loss=loss,
        r=RATIOS[UNITS[unit][3]],
    )
    curve = [value for _, value in found.record["grid"]]
    assert curve == pytest.approx(wanted, rel=SUMS)
    assert wanted[round(found.alpha * 20)] == pytest.approx(min(wanted), rel=SUMS)
    assert len({f"{value:.4g}" for value in wanted}) > 10


def test_the_published_code_has_no_groups_where_activations_are_rounded() -> None:
    model = tiny_model()
    recipe = Recipe(scheme=SCHEMES["w4a8"], group_size=128, switches=MBQ.resolve({"compat": "mbq"}))
    with pytest.raises(UsageError, match="--compat mbq contradicts groups of 128") as caught:
        calibrate(model, questions(model, 1), recipe)
    assert caught.value.code == "E2002"
    assert "--group-size channel" in caught.value.fix
    fine = replace(recipe, group_size=CHANNEL, scheme=SCHEMES["w4a8"])
    assert calibrate(model, questions(model, 2), fine).calib["group_size"] == CHANNEL
