"""`inspect`: what a thing is, and that nothing of it is run or believed."""

import shutil
from pathlib import Path

import pytest

from tests.command_line import run, tell

KINDS = {
    "": "bundle",
    "calibration": "calibration",
    "weights": "checkpoint",
    "onnx/vision_encoder.onnx": "graph",
    "onnx/host_tensors.safetensors": "tensors",
}


@pytest.mark.parametrize("part", KINDS)
def test_every_part_of_a_bundle_can_be_looked_at(bundle: Path, part: str) -> None:
    path = bundle / part
    outcome = tell("inspect", path)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == f"{path}: {KINDS[part]}"
    assert lines[-1] == f"OK  inspect  {path}  {KINDS[part]}"
    assert not any("{" in line or "None" in line for line in lines), "facts are words"
    assert run("inspect", path).document["result"]["kind"] == KINDS[part]


def test_model_folder_can_be_looked_at(model: Path) -> None:
    assert run("inspect", model).document["result"]["kind"] == "model"


def test_long_tables_are_cut_unless_all_is_asked_for(bundle: Path) -> None:
    short, whole = tell("inspect", bundle).out, tell("inspect", bundle, "--all").out
    assert "more, --all shows them" in short
    assert "weights/mbq.json" not in short
    assert "weights/mbq.json" in whole
    assert "--all shows them" not in whole


def test_verify_notices_one_changed_bit(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    assert tell("inspect", copy, "--verify").status == 0
    shard = next((copy / "weights").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    outcome = run("inspect", copy, "--verify")
    assert (outcome.status, outcome.code) == (4, "E4602")
    assert f"weights/{shard.name}: content changed" in outcome.document["error"]["message"]


def test_path_that_is_nothing_known_lists_what_is(tmp_path: Path) -> None:
    missing = run("inspect", tmp_path / "no")
    assert (missing.status, missing.code) == (4, "E4006")
    assert missing.document["error"]["message"] == f"{tmp_path / 'no'} does not exist."
    other = run("inspect", tmp_path).document["error"]
    assert "manifest.json" in other["why"]
    assert other["fix"]
