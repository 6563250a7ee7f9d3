"""`quantize`: channel scales and a model become a checkpoint."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mbq_export.checkpoint import QuantCheckpoint
from tests.command_line import run, tell
from tests.conftest import SHORT_BUILD


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


DATA = ("--data", "builtin:shapes")


@pytest.fixture(scope="module")
def scales_of(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Channel scales of four samples by method, made when first asked for."""

    @functools.cache
    def made(*line: str) -> Path:
        out = tmp_path_factory.mktemp("scales") / "scales"
        fixed = (*DATA, "--samples", "4", "--group-size", "64")
        outcome = run("calibrate", "--model", model, *fixed, "--method", *line, "-o", out)
        assert outcome.status == 0, outcome.err
        return out

    return made


def test_error_feedback_of_the_stage_alone_is_that_of_the_build(
    model: Path, tmp_path: Path
) -> None:
    built = run("build", "--model", model, *SHORT_BUILD, "--method", "mbq+", "-o", tmp_path / "b")
    assert built.status == 0, built.err
    scales = tmp_path / "b" / "calibration"
    line = ("--scales", scales, *DATA, "-o", tmp_path / "c")
    outcome = run("quantize", "--model", model, *line)
    assert outcome.status == 0, outcome.err
    files = {path.name: path.read_bytes() for path in (tmp_path / "b" / "weights").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == files
    info = QuantCheckpoint.open(tmp_path / "c").info
    assert {row["rounding"] for row in info["linears"]} == {"gptq"}
    assert (info["method"]["hessian"], info["method"]["asym"]) == ("auto", "auto")


def test_an_option_may_fit_the_scales_and_not_their_preset(
    model: Path, scales_of: Callable[..., Path], tmp_path: Path
) -> None:
    scales = scales_of("mbq", "--rounding", "gptq", "--hessian", "plain", "--asym", "0")
    line = ("--scales", scales, *DATA, "--damp", "0.05", "-o", tmp_path / "fed")
    outcome = run("quantize", "--model", model, *line)
    assert outcome.status == 0, outcome.err
    rows = outcome.document["result"]["linears"]
    assert {row["feedback"]["damp"] for row in rows} == {0.05}


def test_options_replace_what_the_scales_say_of_rounding(
    model: Path, scales_of: Callable[..., Path], tmp_path: Path
) -> None:
    fixed = ("quantize", "--model", model, "--scales", scales_of("mbq"), *DATA)
    line = ("--rounding", "gptq", "--asym", "0.5", "--damp", "0.05", "--gptq-prefix", "fp")
    outcome = run(*fixed, *line, "--hessian", "balanced", "-o", tmp_path / "fed")
    assert outcome.status == 0, outcome.err
    row = outcome.document["result"]["linears"][0]
    assert row["rounding"] == "gptq"
    assert (row["feedback"]["asym"], row["feedback"]["damp"]) == (0.5, 0.05)
    assert row["feedback"]["hessian"] == "balanced"
    method = QuantCheckpoint.open(tmp_path / "fed").info["method"]
    assert (method["name"], method["rounding"], method["gptq_prefix"]) == ("mbq", "gptq", "fp")


def test_clipping_of_the_stage_alone_is_that_of_the_build(model: Path, tmp_path: Path) -> None:
    line = ("--method", "rtn", "--clip", "group", "-o", tmp_path / "b")
    built = run("build", "--model", model, *SHORT_BUILD, *line)
    assert built.status == 0, built.err
    scales = ("--scales", tmp_path / "b" / "calibration")
    outcome = run("quantize", "--model", model, *scales, *DATA, "-o", tmp_path / "c")
    assert outcome.status == 0, outcome.err
    files = {path.name: path.read_bytes() for path in (tmp_path / "b" / "weights").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == files
    info = QuantCheckpoint.open(tmp_path / "c").info
    assert info["method"]["clip"] == "group"
    assert sum("clip" in row for row in info["linears"]) == 5 * len(info["linears"]) // 7
    plain = run("quantize", "--model", model, *scales, "--clip", "none", "-o", tmp_path / "d")
    assert plain.status == 0, plain.err
    assert not any("clip" in row for row in plain.document["result"]["linears"])


def test_ranges_are_searched_together_for_scales_of_any_method(
    model: Path, scales_of: Callable[..., Path], tmp_path: Path
) -> None:
    fixed = ("quantize", "--model", model, "--scales", scales_of("mbq"), *DATA)
    line = ("--search-scope", "block", "--qvlm-measure", "mutual-info", "-o", tmp_path / "c")
    outcome = run(*fixed, *line)
    assert outcome.status == 0, outcome.err
    assert "evaluations on" in outcome.err
    info = QuantCheckpoint.open(tmp_path / "c").info
    assert all(row["joint"]["J"]["best"] <= row["joint"]["J"]["plain"] for row in info["linears"])
    method = info["method"]
    assert (method["name"], method["search_scope"]) == ("mbq", "block")
    assert (method["qvlm_measure"], method["search_alpha"]) == ("mutual-info", False)


def test_feedback_can_be_left_out_and_then_needs_no_data(
    model: Path, scales_of: Callable[..., Path], tmp_path: Path
) -> None:
    line = ("--scales", scales_of("gptq"), "--rounding", "nearest", "-o", tmp_path / "c")
    outcome = run("quantize", "--model", model, *line)
    assert outcome.status == 0, outcome.err
    assert "rounding" not in outcome.document["result"]["linears"][0]


def test_gradients_are_measured_for_feedback_that_weighs_classes(
    scales_of: Callable[..., Path],
) -> None:
    plain = json.loads((scales_of("gptq") / "sensitivity.json").read_text())
    folder = scales_of("gptq", "--hessian", "auto")
    weighed = json.loads((folder / "sensitivity.json").read_text())
    assert "layers" not in plain
    assert len(weighed["layers"]) == 2
    assert json.loads((folder / "calib.json").read_text())["units"] == []


@pytest.mark.parametrize(
    ("method", "line", "status", "code", "words", "fix"),
    [
        ("gptq", (), 2, "E2018", "--method gptq needs calibration data", "--data calib.jsonl"),
        (
            "gptq",
            ("--data", "builtin:shapes-captions"),
            4,
            "E4315",
            "builtin:shapes-captions, 4 samples drawn with seed 0, is not the data of the scales.",
            "--data with the file that calibrate read",
        ),
        (
            "awq",
            (*DATA, "--rounding", "gptq", "--hessian", "balanced"),
            2,
            "E2002",
            "their ratios were not measured",
            "--hessian plain",
        ),
        ("mbq", ("--damp", "0.1"), 2, "E2002", "--damp decides nothing here.", "--rounding gptq"),
        ("gptq", (*DATA, "--hessian", "some"), 2, "E2001", "Switch hessian", "--hessian with"),
        ("gptq", (*DATA, "--asym", "2"), 2, "E2001", "Switch asym", "--asym with"),
        ("gptq", (*DATA, "--asym", "half"), 2, "E2003", "neither a number nor auto", ""),
        (
            "mbq",
            ("--qvlm-measure", "mutual-info"),
            2,
            "E2002",
            "--qvlm-measure decides",
            "--search",
        ),
        (
            "mbq",
            ("--search-scope", "all"),
            2,
            "E2001",
            "Switch search_scope",
            "--search-scope with",
        ),
        ("mbq", (*DATA, "--clip", "row"), 2, "E2001", "Switch clip", "--clip with"),
        ("rtn", ("--clip", "group"), 2, "E2018", "--method rtn needs calibration data", "--data"),
        ("awq", (), 2, "E2018", "--method awq needs calibration data", "--data"),
    ],
)
def test_feedback_that_cannot_be_is_refused_with_what_mends_it(
    model: Path,
    scales_of: Callable[..., Path],
    tmp_path: Path,
    method: str,
    line: tuple[str, ...],
    status: int,
    code: str,
    words: str,
    fix: str,
) -> None:
    scales = scales_of(method)
    outcome = run("quantize", "--model", model, "--scales", scales, *line, "-o", tmp_path / "x")
    assert (outcome.status, outcome.code) == (status, code)
    error = outcome.document["error"]
    assert words in error["message"]
    assert not fix or any(fix in text for text in error["fix"])
    assert list(tmp_path.iterdir()) == []
