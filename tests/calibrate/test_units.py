"""What a search sees of a block: inputs, outputs, statistics, and tokens that stand for all."""

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.stream import BlockStream
from mbq_export.calibrate import units
from mbq_export.calibrate.units import UnitView, draw_tokens, inspected_path
from mbq_export.channel_scales import Switches
from mbq_export.families.base import ANSWER, PROMPT, SMOOTH, VISION
from tests.calibrate.views import views
from tests.questions import questions, tiny_model
from tests.tiny import Tiny

SOME = Switches(method="mbq", tokens=40)
EVERY = Switches(method="mbq", tokens="all")


def seen(switches: Switches = EVERY, count: int = 6) -> dict[str, UnitView]:
    model = tiny_model()
    return views(model, questions(model, count), switches)


def all_rows(unit: UnitView) -> tuple[Tensor, Tensor]:
    """Inputs (T, K) and classes (T,) of all tokens."""
    calls = list(unit.calls())
    rows = torch.cat([call.rows.flatten(0, -2) for call in calls])
    return rows, torch.cat([call.classes for call in calls])


def test_errors_are_read_where_the_unit_ends() -> None:
    assert [inspected_path(place) for place in SMOOTH] == [
        "self_attn",
        "self_attn.o_proj",
        "mlp",
        "mlp.down_proj",
    ]


def test_weights_are_named_as_the_inspected_module_knows_them() -> None:
    for unit in seen().values():
        for linear in unit.place.into:
            found = unit.inspected.get_parameter(unit.parameter(linear))
            assert found is unit.block.get_parameter(f"{linear}.weight")


@pytest.mark.parametrize("unit", ["qkv", "o", "gate_up", "down"])
def test_calling_the_inspected_module_again_gives_the_noted_output(unit: str) -> None:
    view = seen()[unit]
    for call in view.calls():
        output = view.inspected(call.rows, **call.arguments)
        output = output[0] if isinstance(output, tuple) else output
        assert torch.equal(output, call.output)


@pytest.mark.parametrize("unit", ["qkv", "o", "gate_up", "down"])
def test_statistics_are_means_over_the_tokens_of_a_class(unit: str) -> None:
    view = seen()[unit]
    rows, classes = all_rows(view)
    for kinds in ((VISION,), (ANSWER,), (PROMPT, VISION, ANSWER)):
        chosen = torch.isin(classes, torch.tensor(kinds))
        torch.testing.assert_close(
            view.statistics.mean(*kinds), rows[chosen].abs().double().mean(0), rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("unit", ["o", "gate_up", "down"])
def test_a_draw_is_rows_of_the_whole(unit: str) -> None:
    view = seen(SOME)[unit]
    (drawn,) = view.steps[-1].excerpts
    rows, classes = all_rows(view)
    assert [(drawn.classes == kind).sum() for kind in (VISION, ANSWER)] == [
        80,
        (classes == ANSWER).sum(),
    ]
    known = {tuple(row.tolist()): int(kind) for row, kind in zip(rows, classes, strict=True)}
    for row, kind in zip(drawn.rows, drawn.classes, strict=True):
        assert known[tuple(row.tolist())] == int(kind)
    torch.testing.assert_close(view.inspected(drawn.rows), drawn.output)


@pytest.mark.parametrize("unit", ["qkv", "o", "gate_up", "down"])
def test_each_step_of_a_race_sees_more_tokens(unit: str) -> None:
    sizes = [step.tokens for step in seen(SOME)[unit].steps]
    assert len(sizes) == 3
    assert sizes == sorted(set(sizes))


def test_attention_sees_few_sequences_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "STEPS", ((0.5, 60, 5), (1, 300, 2), (2, 10**6, 1)))
    steps = seen(SOME)["qkv"].steps
    assert [sum(len(each.rows) for each in step.excerpts) for step in steps] == [1, 4, 6]


def test_a_draw_of_everything_makes_one_step() -> None:
    for view in seen(Switches(method="mbq", tokens=10**6)).values():
        assert len(view.steps) == 1


def test_prompt_tokens_are_drawn_once_they_weigh_something() -> None:
    model = tiny_model()
    inputs = questions(model, 6)
    for options in (
        {"switches": Switches(method="awq", tokens=5), "balanced": False},
        {"switches": Switches(method="mbq", tokens=5, search_prompt_weight="measured")},
    ):
        for view in views(model, inputs, **options).values():
            assert (view.steps[-1].classes == PROMPT).sum() == 10


def test_a_block_that_is_run_again_gives_the_same_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = seen()
    monkeypatch.setattr(units, "KEEP_BYTES", 0)
    again = seen()
    for name, view in kept.items():
        for one, other in zip(view.calls(), again[name].calls(), strict=True):
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.output, other.output)


def test_calls_can_be_iterated_over_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (0, units.KEEP_BYTES):
        monkeypatch.setattr(units, "KEEP_BYTES", limit)
        view = seen(count=2)["o"]
        assert len(list(view.calls())) == len(list(view.calls())) > 0


def test_a_model_without_shared_value_heads_has_four_units() -> None:
    model = tiny_model(Tiny(kv_heads=4, seed=1))
    switches = Switches(method="mbq", gqa_o_scale=False)
    assert list(views(model, questions(model, 1), switches)) == ["qkv", "o", "gate_up", "down"]
    grouped = tiny_model()
    assert list(views(grouped, questions(grouped, 1), switches)) == ["qkv", "gate_up", "down"]


def test_tokens_of_a_block_are_the_same_for_the_same_seed() -> None:
    model = tiny_model()
    batches = BlockStream(model).begin(questions(model, 8))

    def drawn(*seed: int) -> list[list[int]]:
        found = draw_tokens(batches, tokens=16, kinds=(VISION, ANSWER), seed=seed)
        sides = [found.rows, *found.spans]
        return [
            each.places.flatten().tolist() for side in sides for each in side if each is not None
        ]

    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(0, 2)
