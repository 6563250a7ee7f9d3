"""`quantize`: channel scales and a model become a checkpoint."""

import json
from pathlib import Path

import pytest

from mbq_export.checkpoint import QuantCheckpoint
from tests.command_line import run, tell


def test_checkpoint_is_that_of_the_build_with_the_same_scales(
    model: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "checkpoint"
    outcome = tell("quantize", "--model", model, "--scales", bundle / "calibration", "-o", out)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1] == f"OK  quantize  {out}  14 linears"
    assert "w3a16 g64, mbq" in outcome.out, "group size and scheme are those of the calibration"
    files = {path.name: path.read_bytes() for path in (bundle / "weights").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_another_width_can_be_asked_for(model: Path, bundle: Path, tmp_path: Path) -> None:
    line = ("--scales", bundle / "calibration", "--wbits", "4", "--group-size", "32")
    outcome = run("quantize", "--model", model, *line, "-o", tmp_path / "w4")
    assert outcome.document["result"]["scheme"] == "w4a16"
    assert QuantCheckpoint.open(tmp_path / "w4").group_size == 32


def test_scales_of_another_model_are_refused_with_the_place(bundle: Path, tmp_path: Path) -> None:
    scales = bundle / "calibration"
    outcome = run("quantize", "--model", "tiny-llava-ov", "--scales", scales, "-o", tmp_path / "x")
    assert (outcome.status, outcome.code) == (4, "E4314")
    error = outcome.document["error"]
    assert error["where"][0] == "model.language_model.layers.0"
    assert error["fix"] == ["calibrate this model again"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nope", "model"])
def test_folder_without_scales_is_named(model: Path, tmp_path: Path, name: str) -> None:
    scales = model if name == "model" else tmp_path / name
    outcome = run("quantize", "--model", model, "--scales", scales, "-o", tmp_path / "x")
    assert (outcome.status, outcome.code) == (4, "E4314")
    assert outcome.document["error"]["message"] == f"There is no calib.json in {scales}."
    assert list(tmp_path.iterdir()) == []


def test_scales_inside_the_named_folder_are_pointed_out(
    model: Path, bundle: Path, tmp_path: Path
) -> None:
    outcome = run("quantize", "--model", model, "--scales", bundle, "-o", tmp_path / "x")
    assert outcome.document["error"]["fix"] == [f"use {bundle / 'calibration'}"]


def test_edited_scale_is_refused(model: Path, bundle: Path, tmp_path: Path) -> None:
    scales = tmp_path / "scales"
    scales.mkdir()
    for path in (bundle / "calibration").iterdir():
        (scales / path.name).write_bytes(path.read_bytes())
    calib = json.loads((scales / "calib.json").read_text())
    calib["switches"]["loss"] = "guess"
    (scales / "calib.json").write_text(json.dumps(calib))
    outcome = run("quantize", "--model", model, "--scales", scales, "-o", tmp_path / "x")
    assert (outcome.status, outcome.code) == (4, "E4314")
    assert [path.name for path in tmp_path.iterdir()] == ["scales"]
