"""A model whose linears are clipped for what full precision feeds them, with nearest rounding and with feedback."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbq_export.backends.torch import fake_quant_model
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import GateError, UsageError
from mbq_export.families.base import LoadedModel
from mbq_export.quantize import quantize
from mbq_export.quantize.clip import SKIPPED
from mbq_export.quantize.clip_pass import weighing
from mbq_export.quantize.feedback import Samples
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.integers import quantize_activations
from mbq_export.schemes.oracle import dequantized
from tests.quantize.seen import check_resumed, class_weights, report, rounded, rows_of
from tests.quantize.seen import samples as samples_of
from tests.questions import tiny_model
from tests.reference import clip as reference
from tests.reference.feedback import Format
from tests.tiny import random_scales, tiny_checkpoint

SAME_GROUPS = 0.97
"""Gram matrices are float32 sums: of two ranges that cost nearly the same either may be taken."""
OTHER_GROUPS = 0.9
ROWS = 6
"""Rows of each linear that the reference goes through, weight by weight and token by token."""


def scales(model: LoadedModel, *, weighed: bool = True, **switches: Any) -> ChannelScales:
    chosen = Switches(method="mbq", **{"clip": "group", **switches})
    return ChannelScales(
        scales=random_scales(model).scales,
        sensitivity=report(model) if weighed else {},
        calib={"switches": chosen.resolved()},
    )


def shares_equal(
    model: LoadedModel, checkpoint: QuantCheckpoint, folder: Path, *, weighed: str
) -> dict[str, float]:
    """Share of groups per linear that the reference rounds the same, given what full precision computes."""
    inputs = list(samples_of(model).inputs)
    folded = QuantCheckpoint.open(folder)
    read = rows_of(fake_quant_model(folded), inputs)
    scheme, size = SCHEMES[checkpoint.scheme_name], checkpoint.group_size
    kind = Format(bits=scheme.weight_bits, symmetric=scheme.symmetric, group_size=size)
    shares = {}
    for name, rows in read.items():
        seen = rows
        if scheme.rounds_activations:
            codes, steps = quantize_activations(rows.numpy())
            seen = torch.from_numpy(codes.astype(np.float32) * steps[:, None])
        c = class_weights(model, inputs, name, weighed)
        weight = torch.from_numpy(np.array(folded.tensor(f"{name}.weight"), np.float32))[:ROWS]
        found = torch.from_numpy(dequantized(checkpoint.packed(name))).float()[:ROWS]
        # The reference goes through tokens one by one; few that have the same Gram matrix are as good as all.
        few = torch.linalg.cholesky_ex(gram(seen, c))[0].T
        wanted = reference.clipped(weight, few, torch.ones(len(few)), kind)
        if name.endswith(SKIPPED):
            wanted = plain(weight, kind)
        parts = (found == wanted).reshape(ROWS, -1, size or weight.shape[1])
        shares[name] = float(parts.all(-1).float().mean())
    return shares


def gram(rows: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """With next to nothing added, so that it has a factor."""
    found = (rows.double() * c[:, None]).T @ rows.double()
    return found + 1e-9 * found.diagonal().mean() * torch.eye(len(found))


def plain(weight: torch.Tensor, kind: Format) -> torch.Tensor:
    size = kind.group_size or weight.shape[1]
    parts = weight.split(size, dim=1)
    return torch.cat([reference.real(part, 1.0, kind) for part in parts], dim=1)


@pytest.mark.parametrize(
    ("scheme", "group_size", "weighed"),
    [("w3a16", 64, "balanced"), ("w3a16", 32, "plain"), ("w4a8", 0, "balanced")],
)
def test_every_group_is_clipped_for_what_full_precision_feeds_it(
    scheme: str, group_size: int, weighed: str, tmp_path: Path
) -> None:
    model = tiny_model()
    made = scales(model, weighed=weighed == "balanced")
    checkpoint = rounded(model, tmp_path / "c", made, scheme=scheme, group_size=group_size)
    tiny_checkpoint(tmp_path / "folded", model, scheme=None)
    shares = shares_equal(model, checkpoint, tmp_path / "folded", weighed=weighed)
    assert min(shares.values()) > SAME_GROUPS, shares
    if scheme == "w3a16":
        other = "plain" if weighed == "balanced" else "balanced"
        shares = shares_equal(model, checkpoint, tmp_path / "folded", weighed=other)
        assert min(shares.values()) < OTHER_GROUPS, shares


def test_the_record_says_how_far_groups_were_shrunk_and_queries_and_keys_were_not(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    info = rounded(model, tmp_path / "c", scales(model)).info
    assert info["method"]["clip"] == "group"
    for row in info["linears"]:
        if row["name"].endswith(SKIPPED):
            assert "clip" not in row
            continue
        assert row["clip"]["hessian"] == "balanced"
        counts = row["clip"]["groups"]
        assert sum(counts.values()) == row["n"] * row["k"] // 64
        assert len(counts) > 1
        assert "rounding" not in row


def test_queries_and_keys_are_the_bytes_of_plain_rounding(tmp_path: Path) -> None:
    model = tiny_model()
    with_clip = rounded(model, tmp_path / "a", scales(model))
    without = rounded(model, tmp_path / "b", scales(model, clip="none"))
    for name in without.linears:
        same = np.array_equal(with_clip.packed(name).scales, without.packed(name).scales)
        assert same == name.endswith(SKIPPED), name


def test_nothing_of_clipping_is_left_where_it_is_off(tmp_path: Path) -> None:
    model = tiny_model()
    found = rounded(model, tmp_path / "c", scales(model, clip="none"))
    assert found.info["method"]["clip"] == "none"
    assert not any("clip" in row for row in found.info["linears"])


@pytest.mark.parametrize("hessian", ["plain", "balanced"])
def test_feedback_with_clipping_still_lowers_what_it_weighs(hessian: str, tmp_path: Path) -> None:
    model = tiny_model()
    way = {"rounding": "gptq", "hessian": hessian, "asym": 0.0}
    info = rounded(model, tmp_path / "c", scales(model, **way)).info
    for row in info["linears"]:
        assert row["rounding"] == "gptq"
        assert (
            row["feedback"]["weighted_error"]["kept"] < row["feedback"]["weighted_error"]["nearest"]
        )
        assert ("clip" in row) != row["name"].endswith(SKIPPED)
        if "clip" in row:
            assert row["clip"]["hessian"] == hessian
            assert sum(row["clip"]["groups"].values()) == row["n"] * row["k"] // 64


def test_feedback_without_clipping_is_another(tmp_path: Path) -> None:
    model = tiny_model()
    way = {"rounding": "gptq", "hessian": "plain", "asym": 0.0}
    with_clip = rounded(model, tmp_path / "a", scales(model, **way))
    without = rounded(model, tmp_path / "b", scales(model, clip="none", **way))
    assert not any("clip" in row for row in without.info["linears"])
    first, last = (f"{model.family.blocks}.0.{name}" for name in (SKIPPED[0], "mlp.down_proj"))
    for name, same in ((first, True), (last, False)):
        assert np.array_equal(with_clip.packed(name).words, without.packed(name).words) == same


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("scheme", [("w3a16", 64), ("w4a8", 0)], ids=lambda s: s[0])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    scheme: tuple[str, int], rounding: str, tmp_path: Path
) -> None:
    model = tiny_model()
    way = {"hessian": "plain", "asym": 0.0} if rounding == "gptq" else {}
    found, (name, size) = scales(model, rounding=rounding, **way), scheme
    check_resumed(model, tmp_path, found, scheme=name, group_size=size)


def test_classes_weigh_alike_without_ratios_and_with_few_bits(tmp_path: Path) -> None:
    scheme, measured = SCHEMES["w3a16"], report(tiny_model())
    assert weighing(measured, scheme) == "balanced"
    assert weighing({}, scheme) == "plain"
    assert weighing(measured, replace(scheme, weight_bits=2)) == "plain"


@pytest.mark.parametrize("given", [None, Samples(inputs=[])])
def test_no_samples_are_refused(given: Samples | None, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="Clipping has no calibration data") as caught:
        quantize(
            model,
            scales(model),
            scheme=SCHEMES["w3a16"],
            group_size=64,
            out=tmp_path / "c",
            samples=given,
        )
    assert caught.value.code == "E2018"
    assert not (tmp_path / "c").exists()


def test_activations_that_overflow_are_named_with_their_linear(tmp_path: Path) -> None:
    model = tiny_model()
    broken = replace(model, module=copy.deepcopy(model.module))
    with torch.no_grad():
        norm = f"{model.family.blocks}.0.post_attention_layernorm.weight"
        broken.module.get_parameter(norm).fill_(3e38)
    with pytest.raises(GateError, match="not finite") as caught:
        rounded(broken, tmp_path / "c", replace(scales(model), scales={}))
    assert caught.value.code == "E1103"
    where = [f"{model.family.blocks}.0", "gate_up", "mlp.gate_proj"]
    assert caught.value.where[:3] == where
