"""From per-sample gradients to the paper's r, on numbers made by hand."""

import json
from typing import Any

import numpy as np
import pytest

from mbq_export.blocks.ratios import prompt_weight_of, r_of
from mbq_export.calibrate.gradients import Gradients
from mbq_export.calibrate.sensitivity import floored, ratios, rows, sensitivity
from mbq_export.errors import FormatError
from mbq_export.families.base import ANSWER, LINEARS, PROMPT, VISION
from tests.reference.published import lifted, ratio


def gradients(seed: int = 0, *, layers: int = 4, samples: int = 12) -> Gradients:
    rng = np.random.default_rng(seed)
    shape = (layers, len(LINEARS), 4, samples)
    values = rng.gamma(2.0, 1e-7, shape)
    values[:, :, 0] = np.nan
    return Gradients(
        linears=LINEARS, mean_abs=values, mean_square=values**2, losses=rng.random(samples)
    )


def report(found: Gradients, **options: Any) -> dict[str, Any]:
    return sensitivity(found, **{"floor": "median", "seed": 0, "facts": {}, **options})


def taken(found: Gradients, samples: Any) -> Gradients:
    return Gradients(
        linears=LINEARS,
        mean_abs=found.mean_abs[..., samples],
        mean_square=found.mean_square[..., samples],
        losses=found.losses[samples],
    )


def test_the_median_is_the_least_ratio() -> None:
    assert floored(np.array([0.8, 0.6, 0.2, 0.0]), floor="median").tolist() == [0.8, 0.6, 0.4, 0.4]


def test_an_odd_number_of_layers_has_a_middle_one() -> None:
    assert floored(np.array([0.1, 0.5, 0.3]), floor="median").tolist() == [0.3, 0.5, 0.3]


def test_the_floor_can_be_a_number_or_none() -> None:
    rho = np.array([0.8, np.nan, 0.0])
    assert floored(rho, floor=0.25).tolist() == [0.8, 0.25, 0.25]
    assert floored(rho, floor="none").tolist() == [0.8, 0.0, 0.0]


def test_ratios_that_are_undefined_everywhere_are_refused() -> None:
    with pytest.raises(FormatError, match="No answer token has a gradient") as caught:
        floored(np.full(3, np.nan), floor="median")
    assert caught.value.code == "E4309"


@pytest.mark.parametrize("layers", [1, 4, 5])
def test_r_is_the_published_one(layers: int) -> None:
    found = gradients(layers=layers)
    made = report(found)
    for half, linear in (("attn", 3), ("mlp", 6)):
        expected = lifted(
            [
                ratio(found.mean_abs[layer, linear, VISION], found.mean_abs[layer, linear, ANSWER])
                for layer in range(layers)
            ]
        )
        assert [entry["r"][half] for entry in made["layers"]] == pytest.approx(expected, rel=1e-12)


def test_units_use_the_r_of_their_half() -> None:
    made = report(gradients())
    for layer in range(4):
        r = made["layers"][layer]["r"]
        assert r_of(made, layer, "qkv") == r_of(made, layer, "o") == r["attn"]
        assert r_of(made, layer, "gate_up") == r_of(made, layer, "down") == r["mlp"]


def test_the_order_of_samples_does_not_matter() -> None:
    found = gradients()
    shuffled = taken(found, np.random.default_rng(3).permutation(12))
    for once, again in zip(report(found)["layers"], report(shuffled)["layers"], strict=True):
        assert once["r"] == pytest.approx(again["r"], rel=1e-6)


def test_repeating_every_sample_does_not_matter() -> None:
    found = gradients()
    twice = taken(found, np.tile(np.arange(12), 2))
    for once, again in zip(report(found)["layers"], report(twice)["layers"], strict=True):
        assert once["r"] == pytest.approx(again["r"], rel=1e-6)


def test_a_sample_without_a_class_is_left_out_of_its_mean() -> None:
    found = gradients()
    found.mean_abs[..., VISION, :6] = np.nan
    kept = taken(found, slice(6, 12)).mean_abs[..., VISION, :].mean(-1)
    expected = kept / found.mean_abs[..., ANSWER, :].mean(-1)
    np.testing.assert_allclose(ratios(found).value[..., VISION], expected)


def test_intervals_hold_the_ratio_and_shrink_with_samples() -> None:
    few, many = ratios(gradients(samples=8)), ratios(gradients(samples=512))
    for found in (few, many):
        for kind in (VISION, PROMPT):
            assert (found.low[..., kind] <= found.value[..., kind]).all()
            assert (found.value[..., kind] <= found.high[..., kind]).all()
    width = [np.mean((r.high - r.low)[..., VISION]) for r in (few, many)]
    assert width[1] < width[0] / 4


def test_intervals_hold_the_truth_nine_times_in_ten() -> None:
    """Vision and answer gradients are drawn alike, so the true ratio is 1."""
    found = ratios(gradients(layers=60, samples=40))
    inside = (found.low[..., VISION] <= 1) & (found.high[..., VISION] >= 1)
    assert 0.8 < inside.mean() < 0.97


def test_the_same_seed_gives_the_same_interval() -> None:
    found = gradients()
    assert (ratios(found, seed=1).low[..., 1:] == ratios(found, seed=1).low[..., 1:]).all()
    assert (ratios(found, seed=1).low[..., 1:] != ratios(found, seed=2).low[..., 1:]).any()


def test_an_answer_without_gradient_in_one_layer_leaves_that_ratio_undefined() -> None:
    found = gradients()
    found.mean_abs[3, 6, ANSWER] = 0
    made = report(found)
    assert made["layers"][3]["linears"]["mlp.down_proj"]["ratio"]["vision"] == [None, None, None]
    assert made["layers"][3]["linears"]["mlp.down_proj"]["clipped"]["vision"] is None
    assert made["layers"][3]["r"]["mlp"] == made["median"]["mlp"]


def test_text_alone_gives_vision_no_weight() -> None:
    found = gradients()
    found.mean_abs[:, :, VISION] = found.mean_square[:, :, VISION] = np.nan
    made = report(found)
    assert made["median"] == {"attn": None, "mlp": None}
    assert r_of(made, 2, "down") == 0.0


def test_weights_for_prompts_are_clipped() -> None:
    found = gradients()
    found.mean_abs[0, 3, PROMPT] *= 1e3
    found.mean_abs[1, 3, PROMPT] /= 1e3
    made = report(found)
    assert prompt_weight_of(made, 0, "qkv") == 8.0
    assert prompt_weight_of(made, 1, "o") == 0.125


def test_the_report_is_plain_json() -> None:
    made = report(gradients(), facts={"dtype": "float32"})
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["dtype"] == "float32"
    assert made["source"] == "measured"
    entry = made["layers"][1]["linears"]["mlp.up_proj"]
    assert set(entry["mean_abs"]) == {"vision", "answer", "prompt"}


def test_the_table_has_a_row_per_linear_and_r_where_it_is_measured() -> None:
    made = report(gradients())
    table = rows(made)
    assert len(table) == 4 * 7
    assert [row[1] for row in table[:7]] == list(LINEARS)
    r = made["layers"][0]["r"]
    assert [row[4] for row in table[:7]] == [
        "",
        "",
        "",
        f"{r['attn']:.3g}",
        "",
        "",
        f"{r['mlp']:.3g}",
    ]
    value, low, high = made["layers"][0]["linears"]["self_attn.q_proj"]["ratio"]["vision"]
    assert table[0][2] == f"{value:.3g} [{low:.3g}, {high:.3g}]"
