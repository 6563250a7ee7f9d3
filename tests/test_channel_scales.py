"""The three files of a calibration: what is written is read, and nothing else is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.errors import FormatError, IncompatibleError, UsageError
from mbq_export.tensor_file import write_tensors

SWITCHES = Switches(method="mbq", r_floor=0.1, tokens=256, modality_weight=0.5)
SCALES = {
    "layers.0.qkv.e": np.array([0.5, 1.0, 2.0], np.float32),
    "layers.10.down.e": np.array([1.0, 1.0], np.float32),
    "layers.1.o.e": np.array([4.0, 0.25], np.float32),
}
CALIB = {"switches": SWITCHES.resolved(), "units": [{"layer": 0, "unit": "qkv", "alpha": 0.5}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scales = ChannelScales(scales=SCALES, sensitivity={"median": {"attn": 0.5}}, calib=CALIB)
    scales.write(tmp_path / "scales")
    return tmp_path / "scales"


def test_scales_come_back_as_they_were_written(folder: Path) -> None:
    found = ChannelScales.read(folder)
    assert found.scales.keys() == SCALES.keys()
    for name, scale in SCALES.items():
        np.testing.assert_array_equal(found.scales[name], scale)
    assert found.switches == SWITCHES
    assert found.sensitivity == {"median": {"attn": 0.5}, "schema": "mbq-export/sensitivity@1"}
    assert found.calib == {**CALIB, "schema": "mbq-export/calib@1"}


def test_writing_what_was_read_changes_no_byte(folder: Path, tmp_path: Path) -> None:
    ChannelScales.read(folder).write(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["calib.json", "scales.safetensors", "sensitivity.json"]
    assert all((folder / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_block_has_its_own_scales_only(folder: Path) -> None:
    found = ChannelScales.read(folder)
    assert {unit: e.tolist() for unit, e in found.of_block(1).items()} == {"o": [4.0, 0.25]}
    assert found.of_block(2) == {}
    assert found.blocks == 11


def test_switches_of_a_joint_search_are_stored_where_it_is_made(tmp_path: Path) -> None:
    scoped = {"search_scope", "qvlm_measure", "search_alpha"}
    assert not scoped & set(SWITCHES.resolved())
    switches = Switches(method="qvlm", search_scope="block", qvlm_measure="mutual-info")
    assert scoped < set(switches.resolved())
    calib = {"switches": switches.resolved()}
    ChannelScales(scales={}, sensitivity={}, calib=calib).write(tmp_path)
    assert ChannelScales.read(tmp_path).switches == switches
    with pytest.raises(FormatError, match="missing or unknown: qvlm_measure, search_alpha"):
        Switches.restored({**SWITCHES.resolved(), "search_scope": "block"})


def test_method_without_scales_has_none(tmp_path: Path) -> None:
    calib = {"switches": Switches(method="rtn").resolved()}
    ChannelScales(scales={}, sensitivity={}, calib=calib).write(tmp_path)
    assert ChannelScales.read(tmp_path).scales == {}
    assert ChannelScales.read(tmp_path).blocks == 0


def rewrite(name: str, **changes: Any) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | changes))

    return act


def retensor(**tensors: Any) -> Callable[[Path], object]:
    return lambda folder: write_tensors(folder / "scales.safetensors", tensors)


def scale(value: float) -> Callable[[Path], object]:
    array = np.array([1.0, value], np.float32)
    return lambda folder: write_tensors(folder / "scales.safetensors", {"layers.0.qkv.e": array})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "calib.json").unlink(), r"no calib\.json"),
        (lambda f: (f / "sensitivity.json").unlink(), r"no file 'sensitivity\.json'"),
        (lambda f: (f / "scales.safetensors").unlink(), r"There is no scales\.safetensors"),
        (lambda f: (f / "calib.json").write_text('{"a": 1, "a": 2}'), "there twice"),
        (rewrite("calib.json", schema="mbq-export/bundle@1"), "has schema 'mbq-export/bundle@1'"),
        (rewrite("sensitivity.json", schema=None), "has schema None"),
        (
            rewrite("calib.json", switches={"loss": "mae"}),
            "Switches are missing or unknown: clip, ",
        ),
        (rewrite("calib.json", switches=[]), "Switches are missing or unknown"),
        (
            rewrite("calib.json", switches={**SWITCHES.resolved(), "loss": "huber"}),
            "Switch loss has the unknown value 'huber'",
        ),
        (retensor(**{"layers.0.qkv.e": np.ones(2, np.float16)}), "is float16 of shape"),
        (retensor(**{"layers.0.qkv.e": np.ones((2, 1), np.float32)}), r"of shape \(2, 1\)"),
        (retensor(**{"layers.00.qkv.e": np.ones(2, np.float32)}), "is no name of a scale"),
        (retensor(**{"model.norm": np.ones(2, np.float32)}), "'model.norm' is no name"),
        (scale(0.0), "1 of 2 scales are not positive"),
        (scale(-1.0), "1 of 2 scales are not positive"),
        (scale(float("nan")), "1 of 2 scales are not positive"),
        (scale(float("inf")), "1 of 2 scales are not positive"),
    ],
)
def test_malformed_result_is_refused(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(FormatError, match=message) as caught:
        ChannelScales.read(folder)
    assert caught.value.code == "E4314"


def test_bad_scale_is_named(folder: Path) -> None:
    scale(-1.0)(folder)
    with pytest.raises(FormatError) as caught:
        ChannelScales.read(folder)
    assert caught.value.where == ["layers.0.qkv.e"]


def test_newer_schema_is_another_release_s(folder: Path) -> None:
    rewrite("calib.json", schema="mbq-export/calib@2")(folder)
    with pytest.raises(IncompatibleError, match="calib@2") as caught:
        ChannelScales.read(folder)
    assert caught.value.code == "E7004"


@pytest.mark.parametrize(
    "changes",
    [
        {"r_floor": "none"}, {"r_floor": 0}, {"r_floor": 0.25}, {"tokens": "all"}, {"tokens": 1},
        {"modality_weight": None}, {"modality_weight": 0.1}, {"compat": "mbq", "grid": "20"},
        {"search_prompt_weight": "measured"}, {"gqa_o_scale": False}, {"rounding": "gptq"}, {"clip": "group"},
        {"rounding": "gptq", "hessian": "plain", "gptq_prefix": "fp", "asym": 0.5, "damp": 0},
    ],
)  # fmt: skip
def test_known_switches_survive_the_artifact(changes: dict[str, Any]) -> None:
    switches = Switches(method="mbq", **changes)
    assert Switches.restored(json.loads(json.dumps(switches.resolved()))) == switches


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", "huber"), ("grid", 21), ("stat", ""), ("rounding", "feedback"), ("clip", "all"),
        ("gqa_o_scale", 1), ("r_floor", "mean"), ("r_floor", -0.1), ("r_floor", float("nan")),
        ("r_floor", True), ("prefix", "folded"), ("compat", "awq"), ("tokens", 0.5),
        ("tokens", 0), ("tokens", True), ("tokens", "some"), ("modality_weight", "0.1"),
        ("search_prompt_weight", 0), ("method", None), ("hessian", "full"), ("asym", 1.5),
        ("asym", "half"), ("gptq_prefix", "none"), ("damp", -0.01),
    ],
)  # fmt: skip
def test_unknown_switch_values_are_refused_with_the_known_ones(name: str, value: object) -> None:
    values: dict[str, Any] = {"method": "mbq", name: value}
    with pytest.raises(UsageError, match=f"Switch {name} has the unknown value") as caught:
        Switches(**values)
    assert caught.value.code == "E2001"
    assert caught.value.why.startswith("known: ")


def test_refusal_spells_every_known_value() -> None:
    values: dict[str, Any] = {"method": "mbq", "r_floor": "mean"}
    with pytest.raises(UsageError) as caught:
        Switches(**values)
    assert caught.value.why == "known: median, none, a number from 0"
    assert caught.value.fix == ("--r-floor with a known value",)


@pytest.mark.parametrize(
    ("changes", "looks"),
    [({}, False), ({"rounding": "gptq"}, True), ({"clip": "group"}, True)],
)
def test_error_feedback_and_clipping_look_at_data(changes: dict[str, Any], looks: bool) -> None:
    assert Switches(method="rtn", **changes).looks_at_data is looks


def test_switches_of_error_feedback_are_stored_only_where_it_is_used() -> None:
    names = {"hessian", "gptq_prefix", "asym", "damp"}
    assert names & Switches(method="mbq").resolved().keys() == set()
    stored = Switches(method="mbq", rounding="gptq").resolved()
    assert names <= stored.keys()
    with pytest.raises(FormatError, match="Switches are missing or unknown: damp"):
        Switches.restored({name: value for name, value in stored.items() if name != "damp"})
    with pytest.raises(FormatError, match="Switches are missing or unknown: asym, damp"):
        Switches.restored({**stored, "rounding": "nearest"})


def test_units_of_a_block_come_in_the_order_of_a_file(tmp_path: Path) -> None:
    """Folding one unit before another rounds differently."""
    scales = {f"layers.0.{unit}.e": np.ones(2, np.float32) for unit in ("qkv", "o", "down")}
    made = ChannelScales(scales=scales, sensitivity={}, calib=CALIB)
    made.write(tmp_path / "scales")
    read = ChannelScales.read(tmp_path / "scales")
    assert list(made.of_block(0)) == list(read.of_block(0)) == ["down", "o", "qkv"]
