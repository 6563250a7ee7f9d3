"""The search for a scale: by hand, against the published formulas, and its short cuts against the long way."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.loss import (
    class_totals,
    coefficients,
    token_errors,
)
from mbq_export.blocks.stream import BlockStream
from mbq_export.calibrate import search as module
from mbq_export.calibrate.search import (
    exponents,
    rounded,
    scale,
    score,
    search,
    shared_by_heads,
    statistic,
)
from mbq_export.calibrate.units import Statistics, UnitView
from mbq_export.channel_scales import Switches
from mbq_export.errors import GateError
from mbq_export.families.base import ANSWER, VISION
from mbq_export.schemes.affine import dequantize, quantize, rounded_per_token
from mbq_export.schemes.base import CHANNEL, PackedWeight
from mbq_export.schemes.integers import integer_linear
from mbq_export.schemes.layouts.dense import pack
from tests.calibrate.views import RATIOS, views
from tests.questions import questions, sample_model, tiny_model
from tests.reference import published
from tests.tiny import Tiny

MBQ = Switches(method="mbq", stat="mixed", tokens="all")
COMPAT = replace(MBQ, grid="20", gqa_o_scale=False, compat="mbq")
PER_HEAD = Tiny(kv_heads=4, seed=1)
INTEGER_RELATIVE = 1e-5
"""Objectives from float32 products of the same integers and scales: roundings of 6e-8, averaged over tokens."""


def seen(switches: Switches = MBQ, tiny: Tiny | None = None, **options: Any) -> dict[str, UnitView]:
    model = tiny_model(tiny) if tiny else tiny_model()
    return views(model, questions(model, 8), switches, **options)


def with_statistic(unit: UnitView, m: Tensor) -> UnitView:
    """The unit with a mean of |x| of our own making."""
    sums = torch.zeros(4, len(m), dtype=torch.float64)
    sums[ANSWER] = m
    tokens = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    return replace(unit, statistics=Statistics(sums=sums, peaks=sums.float(), tokens=tokens))


def test_a_scale_is_centred_between_its_extremes() -> None:
    assert scale(torch.tensor([1.0, 4, 16]), 0.5).tolist() == [0.5, 1, 2]


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
def test_the_extremes_of_a_scale_multiply_to_one(alpha: float) -> None:
    m = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.01
    e = scale(m, alpha)
    assert float(e.max() * e.min()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("compat", [False, True])
def test_exponent_zero_is_no_scale(compat: bool) -> None:
    assert scale(torch.tensor([0.0, 1, 9]), 0.0, compat=compat).tolist() == [1, 1, 1]


def test_a_dead_channel_keeps_one_and_shifts_no_other() -> None:
    found = scale(torch.tensor([0.0, 1, 4]), 0.5)
    torch.testing.assert_close(found, torch.tensor([1, 2**-0.5, 2**0.5]))


def test_the_published_rule_lets_a_dead_channel_shift_all() -> None:
    found = scale(torch.tensor([0.0, 1, 4]), 0.5, compat=True)
    expected = torch.tensor([0.00707107, 70.7107, 141.421])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_scales_are_never_wider_than_256() -> None:
    found = scale(torch.tensor([1e-4, 1.0, 1e4]), 1.0)
    torch.testing.assert_close(found, torch.tensor([1 / 256, 1, 256]))


def test_a_unit_of_dead_channels_is_left_alone() -> None:
    assert scale(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


def test_the_balanced_statistic_weighs_vision_by_r() -> None:
    unit = seen()["qkv"]
    sums = torch.zeros(4, 2, dtype=torch.float64)
    sums[ANSWER], sums[VISION] = torch.tensor([2.0, 6]), torch.tensor([12.0, 4])
    tokens = torch.tensor([0.0, 0, 4, 2], dtype=torch.float64)
    unit = replace(unit, r=0.5, statistics=Statistics(sums=sums, peaks=sums.float(), tokens=tokens))
    found = statistic(unit, replace(MBQ, stat="balanced"))
    torch.testing.assert_close(found, torch.tensor([5 / 3, 7 / 3], dtype=torch.float64))
    assert statistic(unit, replace(MBQ, stat="answer")).tolist() == [1, 3]
    assert statistic(unit, replace(MBQ, stat="vision")).tolist() == [3, 1]
    assert statistic(unit, MBQ).tolist() == [14 / 6, 10 / 6]


def test_padding_enters_the_published_statistic_alone() -> None:
    unit = seen()["qkv"]
    sums = torch.tensor([[90.0], [1], [1], [1]], dtype=torch.float64)
    tokens = torch.ones(4, dtype=torch.float64)
    unit = replace(unit, statistics=Statistics(sums=sums, peaks=sums.float(), tokens=tokens))
    assert statistic(unit, MBQ).tolist() == [1]
    assert statistic(unit, COMPAT).tolist() == [93 / 4]


def test_channels_that_read_one_value_channel_share_their_statistic() -> None:
    text = replace(tiny_model().text, heads=4, kv_heads=2, head_dim=1)
    found = shared_by_heads(torch.tensor([1.0, 3, 5, 7]), text=text)
    assert found.tolist() == [2, 2, 6, 6]


def test_grids_have_21_and_20_points() -> None:
    assert exponents(MBQ) == tuple(k / 20 for k in range(21))
    assert exponents(COMPAT) == tuple(published.GRID)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("unit", ["qkv", "o", "gate_up", "down"])
def test_without_a_scale_weights_are_plainly_rounded(unit: str, compat: bool) -> None:
    view = seen()[unit]
    ones = scale(statistic(view, MBQ), 0.0)
    found = rounded(view, ones, compat=compat)
    assert set(found) == {view.parameter(linear) for linear in view.place.into}
    for linear in view.place.into:
        weight = view.block.get_parameter(f"{linear}.weight")
        plain = quantize(weight, scheme=view.scheme, group_size=32, compat=compat)
        assert torch.equal(found[view.parameter(linear)], dequantize(plain))


def published_search(
    model: Any, unit: str, *, balanced: bool, loss: str
) -> tuple[float, Tensor, list[float]]:
    """The published search of one unit of block 0, one batch, weights put in and out of the block."""
    linears, reads, half = {
        "qkv": (("q_proj", "k_proj", "v_proj"), "self_attn", "attn"),
        "o": (("o_proj",), "self_attn.o_proj", "attn"),
        "gate_up": (("gate_proj", "up_proj"), "mlp", "mlp"),
        "down": (("down_proj",), "mlp.down_proj", "mlp"),
    }[unit]
    stream = BlockStream(model)
    batches = stream.begin(questions(model, 8))
    noted = []
    with stream.block(0) as block, torch.no_grad():
        inspected = block.get_submodule(reads)
        owner = block.get_submodule(reads.split(".")[0])
        parts = [owner.get_submodule(name) for name in linears]
        originals = [part.weight.clone() for part in parts]
        handle = inspected.register_forward_hook(
            lambda _m, args, named, out: noted.append((args, named, out)), with_kwargs=True
        )
        for batch in batches:
            stream.run(block, 0, batch, batch.hidden)
        handle.remove()
        rows = torch.cat(
            [
                (args[0] if args else named["hidden_states"]).flatten(0, 1)
                for args, named, _ in noted
            ]
        )
        classes = torch.cat([batch.classes.flatten() for batch in batches])

        def losses(tried: list[Tensor]) -> float:
            for part, weight in zip(parts, tried, strict=True):
                part.weight.copy_(weight)
            moved = []
            for args, named, before in noted:
                after = inspected(*args, **named)
                pair = [x[0] if isinstance(x, tuple) else x for x in (before, after)]
                moved.append((pair[0] - pair[1]).flatten(0, 1))
            for part, weight in zip(parts, originals, strict=True):
                part.weight.copy_(weight)
            difference = torch.cat(moved)
            if not balanced:
                return published.unbalanced_mse(difference)
            form = published.balanced_mae if loss == "mae" else published.balanced_mse
            return form(difference, classes == VISION, classes == ANSWER, RATIOS[half])

        return published.search(rows, losses, originals, bits=3, group_size=32)


@pytest.mark.parametrize(
    ("balanced", "loss"), [(True, "mae"), (True, "mse"), (False, "mse")], ids=["mbq", "mse", "awq"]
)
@pytest.mark.parametrize("unit", ["qkv", "o", "gate_up", "down"])
def test_compatible_search_is_the_published_one(unit: str, balanced: bool, loss: Any) -> None:
    switches = replace(COMPAT, loss=loss)
    view = seen(switches, PER_HEAD, balanced=balanced)[unit]
    found = search(view, switches)
    alpha, e, curve = published_search(tiny_model(PER_HEAD), unit, balanced=balanced, loss=loss)
    assert found.alpha == alpha
    torch.testing.assert_close(found.scales, e, rtol=1e-5, atol=0)
    # A scale one float32 step apart can send a weight on a tie to the next code.
    assert [value for _, value in found.record["grid"]] == pytest.approx(curve, rel=5e-3)


@pytest.mark.parametrize("unit", ["qkv", "o", "gate_up", "down"])
def test_the_best_is_never_worse_than_plain_rounding(unit: str) -> None:
    for switches in (MBQ, replace(MBQ, tokens=32), replace(MBQ, loss="mse", stat="balanced")):
        found = search(seen(switches)[unit], switches)
        assert found.record["J"]["best"] <= found.record["J"]["rtn"]
        assert found.record["J"]["best"] == dict(found.record["grid"])[found.alpha]


def test_searching_changes_nothing_and_repeats_itself() -> None:
    view = seen(replace(MBQ, tokens=32))["qkv"]
    before = {name: p.clone() for name, p in view.block.named_parameters()}
    once, again = search(view, MBQ), search(view, MBQ)
    assert torch.equal(once.scales, again.scales)
    assert once.record == again.record
    assert all(torch.equal(p, before[name]) for name, p in view.block.named_parameters())


def test_equal_objectives_leave_the_unit_alone() -> None:
    view = seen()["down"]
    even = with_statistic(view, torch.full((256,), 3.0))
    found = search(even, replace(MBQ, stat="answer"))
    assert found.alpha == 0
    assert found.record["degenerate"]
    assert found.scales.tolist() == [1] * 256


def test_dead_channels_are_counted() -> None:
    m = torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.1
    m[[3, 200]] = 0
    found = search(with_statistic(seen()["down"], m), replace(MBQ, stat="answer"))
    assert found.record["dead_channels"] == 2
    assert found.scales[[3, 200]].tolist() == [1, 1]


def test_a_scale_that_would_not_fit_its_norm_is_passed_over() -> None:
    """Norm weights spread over 2**10 against a scale that spreads over 2**16 the other way at exponent 1."""
    view = seen()["qkv"]
    m = torch.logspace(16, 0, 128, base=2.0, dtype=torch.float64)
    switches = replace(MBQ, stat="answer")
    view = with_statistic(view, m)
    order = search(view, switches).record["grid"]
    wanted = [alpha for alpha, _ in sorted(order, key=lambda pair: (pair[1], pair[0]))]
    view.block.get_parameter("input_layernorm.weight").data = torch.logspace(-10, 0, 128, base=2.0)
    safe = [alpha for alpha in wanted if 2.0 ** (10 + 16 * alpha) <= 2.0**24]
    found = search(view, switches)
    assert found.alpha == safe[0]
    assert found.record["dropped"] == wanted.index(safe[0])
    assert 1.0 not in safe


def test_an_objective_that_is_not_finite_names_its_exponent() -> None:
    view = seen()["o"]
    calls = list(view.calls())
    calls[0].output[0, 0, 0] = float("nan")
    with pytest.raises(GateError, match=r"The objective at exponent 0.0 is not finite") as caught:
        search(replace(view, calls=lambda: iter(calls)), MBQ)
    assert caught.value.code == "E1103"


@pytest.mark.parametrize("unit", ["gate_up", "down"])
def test_scores_of_a_sample_that_is_everything_are_exact(unit: str) -> None:
    every, sampled = seen()[unit], seen(replace(MBQ, tokens=10**6))[unit]
    candidates = [scale(statistic(every, MBQ), alpha) for alpha in exponents(MBQ)]
    exact, estimate = score(every, candidates, MBQ), score(sampled, candidates, MBQ)
    # A candidate that dropped out on the way keeps an estimate.
    last = estimate.last
    assert last.sum() >= 2
    torch.testing.assert_close(estimate.values[last], exact.values[last], rtol=1e-6, atol=0)
    assert estimate.deviation[last].max() < 1e-9
    assert exact.last.all()


@pytest.mark.parametrize("tokens", [48, 128])
def test_a_sample_finds_almost_the_best(tokens: int) -> None:
    model = sample_model()
    inputs = questions(model, 24)
    switches = replace(MBQ, tokens=tokens)
    every = views(model, inputs, MBQ, group_size=128)
    some = views(model, inputs, switches, group_size=128)
    for unit in ("gate_up", "down"):
        best = search(every[unit], MBQ).record
        found = search(some[unit], switches)
        exact = dict(best["grid"])
        assert found.record["J"]["best"] == pytest.approx(exact[found.alpha], rel=0.1)
        assert exact[found.alpha] <= best["J"]["best"] * 1.005
        seen = found.record["tokens"]
        assert seen["scored"] <= tokens / 4 < seen["rescored"] <= 4 * tokens < seen["all"]
        assert 2 <= len(found.record["last"]) < 21


def test_the_number_of_candidates_at_a_time_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = seen()["gate_up"]
    together = search(view, MBQ)
    monkeypatch.setattr(module, "CANDIDATE_BYTES", 1)
    assert search(view, MBQ).record == together.record


def test_shared_value_heads_get_a_scale_that_folds() -> None:
    view = seen()["o"]
    found = search(view, MBQ)
    per_head = found.scales.reshape(2, 2, 32)
    assert torch.equal(per_head[:, 0], per_head[:, 1])
    assert found.alpha > 0


def packed_candidate(view: UnitView, linear: str, e: Tensor) -> PackedWeight:
    weight = view.block.get_parameter(f"{linear}.weight").float() * e
    codes = quantize(weight, scheme=view.scheme, group_size=view.group_size)
    bias = dict(view.block.named_parameters()).get(f"{linear}.bias")
    return PackedWeight(
        words=pack(codes.codes.numpy(), bits=4),
        scales=codes.scales.numpy(),
        zeros=None,
        k=weight.shape[1],
        bits=4,
        group_size=view.group_size,
        bias=None if bias is None else bias.detach().float().numpy(),
    )


@pytest.mark.parametrize("group_size", [CHANNEL, 128])
@pytest.mark.parametrize(("unit", "linear"), [("o", "self_attn.o_proj"), ("down", "mlp.down_proj")])
def test_rounded_activations_are_scored_as_kernels_compute(
    unit: str, linear: str, group_size: int
) -> None:
    """The linear reads x / e in int8 and holds Q(W e), which is not scaled back: the format's own integer oracle."""
    view = seen(scheme="w4a8", group_size=group_size)[unit]
    scales = [scale(statistic(view, MBQ), alpha) for alpha in (0.0, 0.5)]
    found = score(view, scales, MBQ)
    tokens = view.statistics.tokens
    weigh = coefficients(tokens, width=view.text.hidden, loss=MBQ.loss, weights=view.weights)
    for place, e in enumerate(scales):
        packed, totals = packed_candidate(view, linear, e), torch.zeros(4, dtype=torch.float64)
        for call in view.calls():
            rows = (call.rows.float() / e).flatten(0, -2).numpy()
            moved = torch.from_numpy(integer_linear(rows, packed)).reshape(call.output.shape)
            errors = token_errors(call.output.float() - moved, loss=MBQ.loss)
            totals += class_totals(errors.flatten(), call.classes)
        assert float(found.values[place]) == pytest.approx(
            float(totals @ weigh), rel=INTEGER_RELATIVE
        )


@pytest.mark.parametrize("unit", ["qkv", "gate_up"])
def test_all_linears_of_a_unit_read_the_same_rounded_rows(unit: str) -> None:
    view = seen(scheme="w4a8", group_size=CHANNEL)[unit]
    calls = [replace(call, rows=rounded_per_token(call.rows, bits=8)) for call in view.calls()]
    weights_alone = replace(view.scheme, act_bits=16)
    by_hand = replace(view, scheme=weights_alone, calls=lambda: iter(calls))
    ones = [torch.ones(128)]
    found = float(score(view, ones, MBQ).values[0])
    assert found == pytest.approx(float(score(by_hand, ones, MBQ).values[0]), rel=INTEGER_RELATIVE)
    assert found != float(score(replace(view, scheme=weights_alone), ones, MBQ).values[0])


def test_a_search_with_rounded_activations_leaves_no_trace() -> None:
    view = seen(scheme="w4a8", group_size=CHANNEL)["gate_up"]
    once, again = search(view, MBQ), search(view, MBQ)
    assert once.record == again.record
    assert once.record["J"]["best"] <= once.record["J"]["rtn"]
    assert not any(module._forward_pre_hooks for module in view.block.modules())
