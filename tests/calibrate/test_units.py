"""What a search sees of a block: inputs, outputs, statistics, and tokens that stand for all."""

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.stream import BlockStream
from mbq_export.calibrate import units
from mbq_export.calibrate.units import UnitView, choose_tokens, inspected_path
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
def test_a_sample_is_rows_of_the_whole(unit: str) -> None:
    view = seen(SOME)[unit]
    assert view.sample is not None
    rows, classes = all_rows(view)
    assert [(view.sample.classes == kind).sum() for kind in (VISION, ANSWER)] == [40, 40]
    known = {tuple(row.tolist()): int(kind) for row, kind in zip(rows, classes, strict=True)}
    for row, kind in zip(view.sample.rows, view.sample.classes, strict=True):
        assert known[tuple(row.tolist())] == int(kind)
    torch.testing.assert_close(view.inspected(view.sample.rows), view.sample.output)


def test_attention_needs_all_tokens() -> None:
    assert seen(SOME)["qkv"].sample is None


def test_prompt_tokens_are_sampled_once_they_weigh_something() -> None:
    model = tiny_model()
    inputs = questions(model, 6)
    for options in (
        {"switches": Switches(method="awq", tokens=5), "balanced": False},
        {"switches": Switches(method="mbq", tokens=5, search_prompt_weight="measured")},
    ):
        sample = views(model, inputs, **options)["down"].sample
        assert sample is not None
        assert (sample.classes == PROMPT).sum() == 5


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


def test_chosen_tokens_are_of_the_classes_and_differ() -> None:
    model = tiny_model()
    batches = BlockStream(model).begin(questions(model, 8), batch_tokens=200)
    chosen = choose_tokens(batches, per_class=30, kinds=(VISION, ANSWER), seed=[0, 1])
    kinds = torch.cat(
        [batch.classes.flatten()[places] for batch, places in zip(batches, chosen, strict=True)]
    )
    assert sorted(kinds.tolist()) == [VISION] * 30 + [ANSWER] * 30
    assert all(len(set(places.tolist())) == len(places) for places in chosen)
    assert all(places.tolist() == sorted(places.tolist()) for places in chosen)


def test_the_seed_decides_which_tokens_are_chosen() -> None:
    model = tiny_model()
    batches = BlockStream(model).begin(questions(model, 8))

    def chosen(*seed: int) -> list[list[int]]:
        found = choose_tokens(batches, per_class=30, kinds=(VISION, ANSWER), seed=seed)
        return [places.tolist() for places in found]

    assert chosen(0, 1) == chosen(0, 1)
    assert chosen(0, 1) != chosen(0, 2)


def test_a_class_with_fewer_tokens_gives_all_of_them() -> None:
    model = tiny_model()
    batches = BlockStream(model).begin(questions(model, 2))
    chosen = choose_tokens(batches, per_class=10**6, kinds=(VISION, ANSWER), seed=[0])
    wanted = sum(int(torch.isin(b.classes, torch.tensor([VISION, ANSWER])).sum()) for b in batches)
    assert sum(len(places) for places in chosen) == wanted
