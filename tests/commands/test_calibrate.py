"""`calibrate`: a folder of channel scales, or nothing."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from mbq_export.channel_scales import ChannelScales
from mbq_export.families.base import SMOOTH
from tests.command_line import run, tell

DATA = ("--data", "builtin:shapes", "--samples", "2", "--group-size", "64")


def test_scales_are_written_and_the_ratios_shown(model: Path, tmp_path: Path) -> None:
    outcome = tell("calibrate", "--model", model, *DATA, "-o", tmp_path / "scales")
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert "mlp.down_proj" in lines[8]
    assert lines[-1] == f"OK  calibrate  {tmp_path / 'scales'}  8 units"
    assert [path.name for path in tmp_path.iterdir()] == ["scales"]
    assert len(ChannelScales.read(tmp_path / "scales").scales) == 6


def test_result_says_what_it_was_made_of(model: Path, tmp_path: Path) -> None:
    outcome = run("calibrate", "--model", model, *DATA, "--method", "awq", "-o", tmp_path / "s")
    result = outcome.document["result"]
    assert result["calibration"] == str(tmp_path / "s")
    assert result["data"]["samples"] == 2
    assert {unit["unit"] for unit in result["units"]} == {"qkv", "o", "gate_up", "down"}


def test_published_scales_replace_the_search(model: Path, bundle: Path, tmp_path: Path) -> None:
    ours = {
        name: scale
        for name, scale in ChannelScales.read(bundle / "calibration").scales.items()
        if ".o." not in name
    }
    entries = []
    for name in ours:
        _, layer, unit, _ = name.split(".")
        place = next(place for place in SMOOTH if place.unit == unit)
        block = f"model.layers.{layer}."
        into = [block + linear for linear in place.into]
        entries.append({"tensor": name, "source": block + place.source, "into": into})
    save_file({**ours, "clip.00000": ours[name]}, tmp_path / "theirs.safetensors")
    record = {"schema": "mbq-export/published-scales@1", "entries": entries}
    (tmp_path / "theirs.json").write_text(json.dumps(record))
    line = ("--import-scales", tmp_path / "theirs.safetensors", "--group-size", "64")
    outcome = tell("calibrate", "--model", model, *line, "-o", tmp_path / "scales")
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("scales of others: nothing was searched\nOK  calibrate  ")
    assert "MBQ-W4313" in outcome.err
    found = ChannelScales.read(tmp_path / "scales")
    assert found.scales.keys() == ours.keys()
    assert found.calib["imported"]["clips_not_applied"] == 1
    line = ("--scales", tmp_path / "scales", "-o", tmp_path / "checkpoint")
    assert tell("quantize", "--model", model, *line).status == 0
    record["entries"].pop()
    (tmp_path / "theirs.json").write_text(json.dumps(record))
    line = ("--import-scales", tmp_path / "theirs.safetensors", "-o", tmp_path / "x")
    refused = run("calibrate", "--model", model, "--group-size", "64", *line)
    assert (refused.status, refused.code) == (4, "E4314")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_method_without_gradients_says_so(model: Path, tmp_path: Path, method: str) -> None:
    line = ("--method", method, "-o", tmp_path / "scales")
    outcome = tell("calibrate", "--model", model, *DATA, *line)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith(f"--method {method} asks for no gradients\nOK  calibrate  ")


def test_switches_and_edited_ratios_reach_the_search(model: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    line = ("--stat", "answer", "--loss", "mse", "--grid", "20", "--gqa-o-scale", "--tokens", "64")
    line = (*line, "--r-floor", "none", "--search-prompt-weight", "measured")
    assert run("calibrate", "--model", model, *DATA, *line, "-o", first).status == 0
    found = ChannelScales.read(first)
    chosen = {"stat": "answer", "loss": "mse", "grid": "20", "gqa_o_scale": True, "tokens": 64}
    chosen |= {"r_floor": "none", "search_prompt_weight": "measured"}
    assert chosen.items() <= found.calib["switches"].items()
    assert len(found.scales) == 8
    report = json.loads((first / "sensitivity.json").read_text())
    report["layers"][1]["r"]["mlp"] = 0.75
    (tmp_path / "mine.json").write_text(json.dumps(report))
    line = ("--sensitivity", tmp_path / "mine.json", "-o", again)
    outcome = run("calibrate", "--model", model, *DATA, *line)
    assert outcome.status == 0, outcome.err
    found = ChannelScales.read(again)
    assert (found.calib["ratios"], found.sensitivity["source"]) == ("user", "user")
    assert found.calib["units"][-1]["r"] == 0.75


def test_old_scales_are_replaced_only_when_asked(model: Path, tmp_path: Path) -> None:
    line = ("calibrate", "--model", model, *DATA, "-o", tmp_path / "scales")
    assert run(*line).status == 0
    refused = run(*line, "--seed", "1")
    assert (refused.status, refused.code) == (2, "E2011")
    assert run(*line, "--seed", "1", "--force").status == 0
    assert ChannelScales.read(tmp_path / "scales").calib["seed"] == 1


def test_a_bundle_is_never_taken_for_old_scales(model: Path, bundle: Path) -> None:
    before = sorted(path.name for path in bundle.iterdir())
    outcome = run("calibrate", "--model", model, *DATA, "-o", bundle, "--force")
    assert (outcome.status, outcome.code) == (2, "E2011")
    assert "no output of this command" in outcome.document["error"]["message"]
    assert sorted(path.name for path in bundle.iterdir()) == before


def test_the_work_of_a_build_in_the_same_place_is_kept(model: Path, tmp_path: Path) -> None:
    state = tmp_path / "out.partial" / "state.json"
    state.parent.mkdir()
    state.write_text("{}")
    outcome = run("calibrate", "--model", model, *DATA, "-o", tmp_path / "out")
    assert (outcome.status, outcome.code) == (2, "E2011")
    assert state.exists()


@pytest.mark.parametrize(
    ("line", "status", "code", "words"),
    [
        (["--wbits", "16"], 2, "E2005", "--wbits 16 has nothing to calibrate."),
        (["--group-size", "48"], 2, "E2004", "w3a16 has no groups of 48."),
        (["--method", "qvml"], 2, "E2001", "Unknown method 'qvml'."),
        (["--stat", "median"], 2, "E2001", "Switch stat has the unknown value 'median'."),
        (["--method", "rtn", "--loss", "mse"], 2, "E2002", "--loss decides nothing here."),
        (["--sensitivity", "nope.json"], 4, "E4316", "nope.json"),
        (["--data", "nope.jsonl"], 4, "E4301", "There is no file 'nope.jsonl'"),
    ],
)
def test_wrong_request_leaves_nothing(
    model: Path, tmp_path: Path, line: list[str], status: int, code: str, words: str
) -> None:
    outcome = run("calibrate", "--model", model, *DATA, *line, "-o", tmp_path / "scales")
    assert (outcome.status, outcome.code) == (status, code)
    assert words in outcome.document["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_rounded_activations_go_from_command_to_command(model: Path, tmp_path: Path) -> None:
    scales, checkpoint, graphs = (tmp_path / name for name in ("scales", "checkpoint", "graphs"))
    line = ("--scheme", "w4a8", "--method", "awq", "--clip", "none", "--group-size", "channel")
    outcome = run("calibrate", "--model", model, *DATA, *line, "-o", scales)
    assert outcome.status == 0, outcome.err
    calib = json.loads((scales / "calib.json").read_text())
    assert (calib["scheme"], calib["group_size"]) == ("w4a8", 0)
    outcome = run("quantize", "--model", model, "--scales", scales, "-o", checkpoint)
    assert outcome.status == 0, outcome.err
    assert {linear["group_size"] for linear in outcome.document["result"]["linears"]} == {0}
    outcome = run("export", checkpoint, "--lowering", "reference,qdq", "-o", graphs)
    assert outcome.status == 0, outcome.err
    names = {graph["file"] for graph in outcome.document["result"]["graphs"]}
    assert {"decoder_model_merged_reference.onnx", "decoder_model_merged_qdq_ort.onnx"} <= names


def test_groups_of_rounded_activations_are_refused_as_qdq_and_written_as_reference(
    model: Path, tmp_path: Path
) -> None:
    scales, checkpoint = tmp_path / "scales", tmp_path / "checkpoint"
    line = ("--scheme", "w4a8", "--method", "rtn", "--group-size", "128")
    assert run("calibrate", "--model", model, *DATA, *line, "-o", scales).status == 0
    outcome = run("quantize", "--model", model, "--scales", scales, "-o", checkpoint)
    assert {linear["group_size"] for linear in outcome.document["result"]["linears"]} == {128}
    for runtime in ("ort", "trt"):
        line = ("--lowering", "qdq", "--runtime", runtime)
        outcome = run("export", checkpoint, *line, "-o", tmp_path / "no")
        assert (outcome.status, outcome.code) == (2, "E2006")
        why = outcome.document["error"]["why"]
        assert why.startswith("group-wise W4A8 needs the plugin lowering")
    assert not (tmp_path / "no").exists()
    outcome = run("export", checkpoint, "-o", tmp_path / "graphs")
    graphs = outcome.document["result"]["graphs"]
    assert [graph["form"]["lowering"] for graph in graphs if graph["form"]] == ["reference"]
