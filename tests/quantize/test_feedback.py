"""Every linear is rounded for what the finished model feeds it, and held-out samples decide what is left open."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mbq_export.backends.torch import fake_quant_model
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import GateError, UsageError
from mbq_export.families.base import LoadedModel
from mbq_export.families.llava_onevision import load
from mbq_export.quantize import quantize
from mbq_export.quantize.feedback import Samples
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.integers import quantize_activations
from mbq_export.schemes.oracle import dequantized
from mbq_export.state import State
from tests.quantize.seen import (
    bytes_of,
    check_resumed,
    class_weights,
    report,
    rounded,
    rows_of,
    samples,
)
from tests.questions import questions, tiny_model
from tests.reference import feedback as reference
from tests.tiny import random_scales, tiny_checkpoint

SAME_WEIGHTS = 0.985
"""Gram matrices are float32 sums of float32 activations: a weight beside the edge of two codes may fall to the other
side, and what that misses moves the columns after it. Rounding for other inputs leaves far fewer the same."""
OTHER_WEIGHTS = 0.95
SAME_BEHIND_ROUNDED = 0.9
"""An activation beside the edge of two 8-bit codes is rounded either way by float and by integer sums before it."""


def scales(model: LoadedModel, *, scaled: bool = True, **switches: Any) -> ChannelScales:
    made = random_scales(model)
    chosen = Switches(method="mbq+", rounding="gptq", **switches)
    return ChannelScales(
        scales=made.scales if scaled else {},
        sensitivity=report(model),
        calib={"switches": chosen.resolved()},
    )


def mixed_model(exact: LoadedModel, quantized: LoadedModel, layer: int) -> LoadedModel:
    """The full-precision model with one quantized block."""
    module = copy.deepcopy(exact.module)
    path = f"{exact.family.blocks}.{layer}"
    block = quantized.module.get_submodule(path)
    parent = module.get_submodule(exact.family.blocks)
    assert isinstance(parent, nn.ModuleList)
    parent[layer] = copy.deepcopy(block)
    return replace(exact, module=module)


def expected(
    weight: Tensor, rows: Tensor, wanted: Tensor, c: Tensor, rho: float, kind: reference.Format
) -> Tensor:
    """The textbook's answer for weighed inputs."""
    root = c.sqrt()[:, None]
    rows, wanted = rows.double() * root, wanted.double() * root
    aim = reference.retargeted(weight, rows, wanted, rho, damp=0.01).float()
    return reference.feed_back(aim, rows.T @ rows, kind)


def shares_equal(
    model: LoadedModel,
    checkpoint: QuantCheckpoint,
    folder: Path,
    *,
    rounds: bool = True,
    **way: Any,
) -> Iterator[tuple[str, float]]:
    """Share of weights per linear that the textbook rounds the same, given what the finished model computes."""
    inputs = list(samples(model).inputs)
    folded = QuantCheckpoint.open(folder)
    exact, quantized = fake_quant_model(folded), fake_quant_model(checkpoint)
    wanted = rows_of(exact, inputs)
    scheme = SCHEMES[checkpoint.scheme_name]
    kind = reference.Format(
        bits=scheme.weight_bits, symmetric=scheme.symmetric, group_size=checkpoint.group_size
    )
    for layer in range(model.text.layers):
        prefix_fp = way.get("gptq_prefix") == "fp"
        source = mixed_model(exact, quantized, layer) if prefix_fp else quantized
        read = rows_of(source, inputs)
        for linear in model.family.linears:
            name = model.family.linear_path(layer, linear)
            rows = read[name]
            if scheme.rounds_activations and rounds:
                codes, steps = quantize_activations(rows.numpy())
                rows = torch.from_numpy(codes.astype(np.float32) * steps[:, None])
            c = class_weights(model, inputs, name, way.get("hessian", "plain"))
            weight = torch.from_numpy(np.array(folded.tensor(f"{name}.weight"), np.float32))
            found = torch.from_numpy(dequantized(checkpoint.packed(name))).float()
            textbook = expected(weight, rows, wanted[name], c, way.get("asym", 0.0), kind)
            # A scale per channel is float32 and follows the moved weight; other codes are an eighth apart or more.
            same = torch.isclose(found, textbook, rtol=1e-3, atol=0.0)
            yield name, float(same.float().mean())


WAYS: list[dict[str, Any]] = [
    {"hessian": "plain", "asym": 0.0},
    {"hessian": "balanced", "asym": 0.0},
    {"hessian": "plain", "asym": 1.0},
    {"hessian": "balanced", "asym": 0.5},
    {"hessian": "plain", "asym": 1.0, "gptq_prefix": "fp"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_every_linear_is_rounded_for_what_the_finished_model_feeds_it(
    way: dict[str, Any], tmp_path: Path
) -> None:
    """All units before one are rounded when its inputs are taken, so they are the inputs of the finished model."""
    model = tiny_model()
    checkpoint = rounded(model, tmp_path / "c", scales(model, **way))
    tiny_checkpoint(tmp_path / "folded", model, scheme=None)
    for name, share in shares_equal(model, checkpoint, tmp_path / "folded", **way):
        assert share > SAME_WEIGHTS, (name, share)


@pytest.mark.parametrize("group_size", SCHEMES["w4a8"].group_sizes)
def test_rounded_activations_are_what_errors_are_weighed_by(
    group_size: int, tmp_path: Path
) -> None:
    model = tiny_model()
    made = scales(model, hessian="plain", asym=0.0)
    checkpoint = rounded(model, tmp_path / "c", made, scheme="w4a8", group_size=group_size)
    tiny_checkpoint(tmp_path / "folded", model, scheme=None)
    shares = dict(shares_equal(model, checkpoint, tmp_path / "folded"))
    first = model.family.linear_path(0, model.family.linears[0])
    assert shares[first] > SAME_WEIGHTS
    assert min(shares.values()) > SAME_BEHIND_ROUNDED, shares
    unrounded = dict(shares_equal(model, checkpoint, tmp_path / "folded", rounds=False))
    assert unrounded[first] < SAME_WEIGHTS


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ({"hessian": "plain"}, {"hessian": "balanced"}),
        ({"hessian": "plain"}, {"asym": 1.0}),
        ({"hessian": "plain"}, {"gptq_prefix": "fp"}),
    ],
    ids=["weights", "target", "prefix"],
)
def test_another_way_of_rounding_leaves_other_weights(
    made: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    """What the tests above would say of a mistake."""
    model = tiny_model()
    checkpoint = rounded(model, tmp_path / "c", scales(model, asym=0.0, **made))
    tiny_checkpoint(tmp_path / "folded", model, scheme=None)
    found = [s for _, s in shares_equal(model, checkpoint, tmp_path / "folded", **asked)]
    assert min(found) < OTHER_WEIGHTS


def test_feedback_lowers_what_it_weighs_in_every_linear(tmp_path: Path) -> None:
    model = tiny_model()
    info = rounded(model, tmp_path / "c", scales(model, hessian="plain", asym=0.0)).info
    for row in info["linears"]:
        error = row["feedback"]["weighted_error"]
        assert row["rounding"] == "gptq"
        assert error["kept"] < error["nearest"]
        assert row["feedback"]["held_out"] is None
        assert (row["feedback"]["hessian"], row["feedback"]["asym"]) == ("plain", 0.0)
        assert row["feedback"]["damp"] == 0.01
    assert info["method"]["rounding"] == "gptq"
    assert info["method"]["damp"] == 0.01


def test_held_out_samples_decide_for_a_block_and_both_values_are_kept(tmp_path: Path) -> None:
    model = tiny_model()
    checkpoint = rounded(model, tmp_path / "c", scales(model))
    for layer in range(model.text.layers):
        rows = [row for row in checkpoint.info["linears"] if f".layers.{layer}." in row["name"]]
        assert len(rows) == 7
        facts = rows[0]["feedback"]
        compared = facts["held_out"]
        assert set(compared) == {"hessian", "asym"}
        if facts["hessian"] == "balanced":
            assert compared["hessian"]["balanced"] < compared["hessian"]["plain"]
        assert compared["asym"]["0"] == compared["hessian"][facts["hessian"]]
        if facts["asym"] == 1.0:
            assert compared["asym"]["1"] < compared["asym"]["0"]
        for row in rows:
            assert row["feedback"]["held_out"] == compared
            assert row["feedback"]["hessian"] == facts["hessian"]


def test_a_choice_gives_the_bytes_of_what_was_chosen(tmp_path: Path) -> None:
    """Nothing of the ways that lost remains."""
    model = tiny_model()
    chosen = rounded(model, tmp_path / "auto", scales(model))
    ways = {(row["feedback"]["hessian"], row["feedback"]["asym"]) for row in chosen.info["linears"]}
    assert len(ways) == 1, "both blocks of this model choose alike"
    ((hessian, asym),) = ways
    fixed = rounded(model, tmp_path / "fixed", scales(model, hessian=hessian, asym=asym))
    for name in chosen.linears:
        np.testing.assert_array_equal(chosen.packed(name).words, fixed.packed(name).words)
        np.testing.assert_array_equal(chosen.packed(name).scales, fixed.packed(name).scales)


@pytest.mark.parametrize("switches", [{}, {"hessian": "plain", "asym": 0.0, "gptq_prefix": "fp"}])
def test_the_same_inputs_give_the_same_bytes(switches: Mapping[str, Any], tmp_path: Path) -> None:
    for name, model in (("a", tiny_model()), ("b", tiny_model(meta_blocks=True))):
        rounded(model, tmp_path / name, scales(model, **switches))
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_half_precision_model_is_rounded_to_about_the_same(tmp_path: Path) -> None:
    exact = tiny_model()
    half = load(exact.folder, dtype="bfloat16")
    way = {"hessian": "plain", "asym": 0.0}
    found = rounded(half, tmp_path / "half", scales(half, **way))
    wanted = rounded(exact, tmp_path / "exact", scales(exact, **way))
    for row, other in zip(found.info["linears"], wanted.info["linears"], strict=True):
        kept, known = (r["feedback"]["weighted_error"]["kept"] for r in (row, other))
        assert kept == pytest.approx(known, rel=0.5)


@pytest.mark.parametrize("scheme", [("w3a16", 64), ("w4a8", 0)], ids=lambda s: s[0])
@pytest.mark.parametrize("prefix", ["quantized", "fp"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    scheme: tuple[str, int], prefix: str, tmp_path: Path
) -> None:
    """What later blocks read is made again from what was stored of the earlier ones."""
    model = tiny_model()
    found = scales(model, gptq_prefix=prefix)
    name, size = scheme
    check_resumed(model, tmp_path, found, scheme=name, group_size=size)


def test_finished_blocks_need_no_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with State.open(tmp_path / "work", {}) as state:
        rounded(model, tmp_path / "one", scales(model), state=state)
        monkeypatch.setattr("mbq_export.quantize.Feedback", None)
        rounded(model, tmp_path / "two", scales(model), state=state)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_weighing_classes_without_ratios_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    found = replace(scales(model, hessian="balanced"), sensitivity={})
    with pytest.raises(UsageError, match="their ratios were not measured") as caught:
        rounded(model, tmp_path / "c", found)
    assert caught.value.code == "E2002"
    assert not (tmp_path / "c").exists()


def test_a_choice_without_ratios_weighs_all_tokens_alike(tmp_path: Path) -> None:
    model = tiny_model()
    found = replace(scales(model, hessian="plain", asym="auto"), sensitivity={})
    row = rounded(model, tmp_path / "c", found).info["linears"][0]
    assert set(row["feedback"]["held_out"]) == {"asym"}


@pytest.mark.parametrize("given", [None, Samples(inputs=[])])
def test_no_samples_are_refused(given: Samples | None, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="has no calibration data to look at") as caught:
        quantize(
            model,
            scales(model),
            scheme=SCHEMES["w3a16"],
            group_size=64,
            out=tmp_path / "c",
            samples=given,
        )
    assert caught.value.code == "E2018"


def test_a_choice_without_held_out_samples_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    seen = Samples(inputs=questions(model, 2))
    for switches, refused in (({}, True), ({"hessian": "plain", "asym": 0.0}, False)):
        made = scales(model, **switches)
        arguments: dict[str, Any] = {"scheme": SCHEMES["w3a16"], "group_size": 64, "samples": seen}
        if refused:
            with pytest.raises(UsageError):
                quantize(model, made, out=tmp_path / "c", **arguments)
        else:
            quantize(model, made, out=tmp_path / "c", **arguments)


def test_activations_that_overflow_are_named_with_their_linear(tmp_path: Path) -> None:
    model = tiny_model()
    broken = replace(model, module=copy.deepcopy(model.module))
    with torch.no_grad():
        norm = f"{model.family.blocks}.0.post_attention_layernorm.weight"
        broken.module.get_parameter(norm).fill_(3e38)
    with pytest.raises(GateError, match="not finite") as caught:
        rounded(broken, tmp_path / "c", scales(model, scaled=False))
    assert caught.value.code == "E1103"
    assert caught.value.where[:2] == [f"{model.family.blocks}.0", "gate_up"]
