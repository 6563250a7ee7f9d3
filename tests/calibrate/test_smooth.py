"""One block: every unit is shown, answered, recorded; the block stays as it was."""

import json
from dataclasses import replace

import pytest
import torch

from mbq_export.blocks.stream import BlockStream
from mbq_export.calibrate import units
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.smooth import smooth_block
from mbq_export.channel_scales import Switches
from mbq_export.errors import GateError
from tests.calibrate.views import RATIOS, first_block, job, views
from tests.questions import questions, tiny_model

MBQ = METHODS["mbq"]


def test_a_block_is_searched_and_not_changed() -> None:
    model = tiny_model()
    block, pairs, found = first_block(job(model, MBQ.switches, MBQ), questions(model, 6))
    assert list(found.scales) == ["qkv", "gate_up", "down"]
    with BlockStream(model).block(0) as fresh:
        for (name, after), before in zip(block.named_parameters(), fresh.parameters(), strict=True):
            assert torch.equal(after, before), name
        for (batch, rows), output in zip(pairs, found.outputs, strict=True):
            torch.testing.assert_close(BlockStream(model).run(fresh, 0, batch, rows), output)


def test_a_unit_that_is_left_alone_is_recorded_too() -> None:
    model = tiny_model()
    _, _, found = first_block(job(model, MBQ.switches, MBQ), questions(model, 3))
    assert [entry["unit"] for entry in found.units] == ["qkv", "o", "gate_up", "down"]
    assert found.units[1] == {
        "layer": 0,
        "unit": "o",
        "absorbed_by": "self_attn.v_proj",
        "alpha": None,
    }


def test_the_switch_scales_attention_outputs_of_shared_heads() -> None:
    model = tiny_model()
    switches = replace(MBQ.switches, gqa_o_scale=True)
    _, _, found = first_block(job(model, switches, MBQ), questions(model, 6))
    assert found.scales["o"].shape == (128,)
    assert found.units[1]["alpha"] is not None


def test_records_are_plain_json_with_the_weight_that_was_used() -> None:
    model = tiny_model()
    _, _, found = first_block(job(model, MBQ.switches, MBQ), questions(model, 6))
    assert json.loads(json.dumps(found.units, allow_nan=False)) == found.units
    assert [entry.get("r") for entry in found.units] == [0.3, None, 0.6, 0.6]


@pytest.mark.parametrize("unit", ["qkv", "down"])
def test_a_given_modality_weight_replaces_every_ratio(unit: str) -> None:
    model = tiny_model()
    switches = Switches(method="mbq", modality_weight=0.1)
    view = views(model, questions(model, 2), switches)[unit]
    assert view.r == 0.1
    assert view.weights is not None
    assert view.weights.vision == 0.1


def test_prompts_weigh_nothing_unless_measured() -> None:
    model = tiny_model()
    inputs = questions(model, 2)
    for choice, prompt in (("0", 0.0), ("measured", 0.5)):
        switches = Switches(method="mbq", search_prompt_weight=choice)
        weights = views(model, inputs, switches)["qkv"].weights
        assert weights is not None
        assert (weights.vision, weights.prompt) == (RATIOS["attn"], prompt)


def test_a_method_that_is_not_balanced_has_no_weights() -> None:
    model = tiny_model()
    found = views(model, questions(model, 2), Switches(method="awq"), balanced=False)
    assert all(view.weights is None for view in found.values())


def test_keeping_calls_or_running_again_gives_the_same_scales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    inputs = questions(model, 6)
    task = job(model, replace(MBQ.switches, tokens=32), MBQ)
    _, _, kept = first_block(task, inputs)
    monkeypatch.setattr(units, "KEEP_BYTES", 0)
    _, _, again = first_block(task, inputs)
    assert kept.units == again.units
    for unit, e in kept.scales.items():
        assert torch.equal(e, again.scales[unit])


def test_an_error_names_block_and_unit() -> None:
    model = tiny_model()
    task = job(model, replace(MBQ.switches, tokens="all"), MBQ)
    pairs = [(batch, batch.hidden) for batch in task.stream.begin(questions(model, 2))]
    pairs[0][1][0, 3] = float("nan")
    with task.stream.block(1) as block, pytest.raises(GateError) as caught:
        smooth_block(task, block, 1, pairs)
    assert caught.value.where == ["block 1", "qkv"]
