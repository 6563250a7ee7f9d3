"""Scales take another power of their statistic where several halves together are better off."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbq_export.blocks.fold import fold
from mbq_export.blocks.halves import KINDS, Half
from mbq_export.blocks.stream import BlockStream
from mbq_export.calibrate.search import scale
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.errors import UsageError
from mbq_export.families.base import LoadedModel
from mbq_export.quantize import joint
from mbq_export.quantize.apply import Rounding
from mbq_export.quantize.exponents import descend, factor, neighbours, refold, searched_exponents
from mbq_export.quantize.joint import Joint
from mbq_export.quantize.streams import Streams
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.oracle import dequantized
from tests.quantize.seen import check_resumed, report, rounded
from tests.questions import questions, tiny_model
from tests.reference.clip import real
from tests.reference.feedback import Format
from tests.tiny import random_scales

POWERS = 2e-6
"""Powers in float32."""
SAME_WEIGHTS = 0.999
"""A weight beside the edge of two codes may fall to either side: folded twice, or once."""


def scales(model: LoadedModel, alpha: float = 0.5, **switches: Any) -> ChannelScales:
    chosen = {"search_scope": "block", "tokens": "all", "search_alpha": True, **switches}
    made = random_scales(model)
    units = [
        {"layer": layer, "unit": place.unit, "alpha": alpha}
        for layer in range(model.text.layers)
        for place in model.family.smooth
    ]
    resolved = Switches(method="qvlm", **chosen).resolved()
    calib = {"switches": resolved, "units": units}
    return ChannelScales(scales=made.scales, sensitivity=report(model), calib=calib)


@pytest.mark.parametrize(("alpha", "moved"), [(0.5, 0.55), (0.05, 0.0), (1.0, 0.95)])
def test_another_power_is_the_scale_of_another_exponent(alpha: float, moved: float) -> None:
    m = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 9
    m[3] = 0  # a channel that never sees a value keeps 1
    e = scale(m, alpha)
    torch.testing.assert_close(e * factor(e, alpha, moved), scale(m, moved), atol=0, rtol=POWERS)


def test_neighbours_stay_on_the_grid() -> None:
    assert neighbours(0.55) == [0.5, 0.6]
    assert neighbours(1.0) == [0.95]
    assert neighbours(0.05) == [0.0, 0.1]


def test_only_scales_of_a_search_with_an_exponent_can_move() -> None:
    model = tiny_model()
    found = scales(model)
    assert len(searched_exponents(found)) == 4 * model.text.layers
    assert searched_exponents(scales(model, alpha=0.0)) == {}
    assert searched_exponents(replace(found, scales={})) == {}
    none = [{**row, "alpha": None} for row in found.calib["units"]]
    assert searched_exponents(replace(found, calib={**found.calib, "units": none})) == {}


def searched(model: LoadedModel, made: ChannelScales) -> tuple[Joint, Streams]:
    stream = BlockStream(model)
    streams = Streams.begin(stream, questions(model, 4), exact=True, moved=False)
    with stream.block(0) as block:
        fold(block.float(), made.of_block(0), smooth=model.family.smooth, text=model.text)
        halves = tuple(
            Half(index=0, kind=kind, block=block, smooth=model.family.smooth) for kind in KINDS
        )
    rounding = Rounding(scheme=SCHEMES["w3a16"], group_size=64)
    return Joint(halves=halves, stream=stream, rounding=rounding, loss="mae", weights=None), streams


def test_no_single_step_is_better_than_what_was_found() -> None:
    model = tiny_model()
    made = scales(model)
    task, streams = searched(model, made)
    before = copy.deepcopy(task.halves[0].block.state_dict())
    rows, ratios = streams.before, (1.0, 0.98)
    plain = float(task.objectives([ratios], rows, of=rows).sum())
    found = descend(task, ratios, rows, made, text=model.text)
    assert found.exponents
    assert found.error < plain
    after = task.halves[0].block.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    errors = []
    for unit in ("qkv", "o", "gate_up", "down"):
        for alpha in (0.45, 0.5, 0.55):
            moved = {**found.exponents, (0, unit): alpha}
            again, _ = searched(model, made)
            for half in again.halves:
                refold(half, made, moved, text=model.text)
            value = float(again.objectives([ratios], rows, of=rows).sum())
            errors.append(value)
    assert min(errors) == pytest.approx(found.error, rel=1e-6)
    assert set(found.exponents.values()) <= {0.45, 0.55}


@pytest.fixture
def two_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 8 combinations."""
    monkeypatch.setattr(joint, "RATIOS", (1.0, 0.98))


@pytest.mark.usefixtures("two_ratios")
def test_the_checkpoint_has_what_was_moved(tmp_path: Path) -> None:
    model = tiny_model()
    made = scales(model)
    found = rounded(model, tmp_path / "c", made)
    assert found.info["method"]["search_alpha"] is True
    for facts in (row["joint"] for row in found.info["linears"]):
        assert facts["J"]["moved"] <= facts["J"]["best"] <= facts["J"]["plain"]
    moved = {k: a for row in found.info["linears"] for k, a in row["joint"]["exponents"].items()}
    assert moved
    new = dict(made.scales)
    for name, alpha in moved.items():
        e = torch.from_numpy(made.scales[f"layers.{name}.e"])
        new[f"layers.{name}.e"] = (e * factor(e, 0.5, alpha)).numpy()
    block = copy.deepcopy(model.module.get_submodule(f"{model.family.blocks}.1"))
    of_block = replace(made, scales=new).of_block(1)
    fold(block, of_block, smooth=model.family.smooth, text=model.text)
    kind = Format(bits=3, symmetric=False, group_size=64)
    units = {linear: place.unit for place in model.family.smooth for linear in place.into}
    for row in found.info["linears"]:
        layer, linear = row["name"].removeprefix(f"{model.family.blocks}.").split(".", 1)
        assert row["alpha"] == moved.get(f"{layer}.{units[linear]}", 0.5)
        if layer == "1":
            parts = torch.split(block.get_parameter(f"{linear}.weight"), 64, dim=1)
            wanted = torch.cat([real(part, row["joint"]["ratio"], kind) for part in parts], dim=1)
            same = torch.isclose(
                torch.from_numpy(dequantized(found.packed(row["name"]))).float(), wanted, rtol=2e-3
            )
            assert float(same.float().mean()) > SAME_WEIGHTS
    norm = f"{model.family.blocks}.1.input_layernorm.weight"
    kept = np.asarray(found.tensor(norm))
    np.testing.assert_allclose(
        kept, block.get_parameter("input_layernorm.weight").detach(), rtol=1e-3
    )


@pytest.mark.usefixtures("two_ratios")
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model()
    check_resumed(model, tmp_path, scales(model))


def test_nothing_to_move_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="--search-alpha has no exponent to move") as caught:
        rounded(model, tmp_path / "c", scales(model, alpha=0.0))
    assert caught.value.code == "E2002"
