"""`build`: what it prints, what it refuses, and that refusing writes nothing."""

import json
from pathlib import Path

import pytest

from tests.command_line import Outcome, run, tell

STAGES = ["plan", "calibration", "weights", "onnx", "engines", "validate", "seal"]


def test_result_names_the_bundle_its_hash_and_the_time_of_each_stage(
    built: tuple[Path, Outcome],
) -> None:
    folder, outcome = built
    document = outcome.document
    assert (document["schema"], document["command"]) == ("mbq-export/result@1", "build")
    assert (document["ok"], document["exit"], document["error"]) == (True, 0, None)
    result = document["result"]
    assert result["bundle"] == str(folder)
    assert len(result["sha256"]) == 64
    assert set(result["seconds"]) == {"calibration", "weights", "onnx", "engines"}
    assert (result["engines"], result["skipped_engines"]) == ([], {})


def test_progress_is_told_on_stderr_only(built: tuple[Path, Outcome]) -> None:
    _, outcome = built
    assert len(outcome.out.splitlines()) == 1
    assert "[1/7] plan" in outcome.err
    assert "vision 84 % · prompt 8 % · answer 9 %" in outcome.err


@pytest.mark.slow
def test_gates_run_and_every_stage_is_told(model: Path, tmp_path: Path) -> None:
    line = ("--group-size", "64", "--data", "builtin:shapes", "--samples", "4", "--target", "cpu")
    outcome = tell("build", "--model", model, *line, "-o", tmp_path / "bundle")
    assert outcome.status == 0, outcome.err
    told = [text.split()[1] for text in outcome.err.splitlines() if text.startswith("[")]
    assert list(dict.fromkeys(told)) == STAGES
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert all(gate["pass"] for gate in manifest["gates"])
    assert outcome.out.startswith(f"OK  build  {tmp_path / 'bundle'}  sha256 ")


def test_dry_run_shows_what_would_be_quantized_and_writes_nothing(
    model: Path, tmp_path: Path
) -> None:
    line = ("--data", "builtin:shapes", "--wbits", "4", "--group-size", "32", "--target", "cpu")
    outcome = tell("build", "--model", model, *line, "-o", tmp_path / "x", "--dry-run")
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["module", "group", "count", "bits", "reason"]
    assert lines[2].endswith("w4a16 g32, mbq")
    assert lines[-1] == f"OK  build  plan for {tmp_path / 'x'}, nothing written"
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_fingerprint_for_machines(model: Path, tmp_path: Path) -> None:
    line = ("--data", "builtin:shapes", "--group-size", "64", "--target", "cpu", "--dry-run")
    plan = run("build", "--model", model, *line, "-o", tmp_path / "x").document["result"]["plan"]
    assert plan["quant"]["scheme"] == "w3a16"
    assert set(plan["model"]["shards"]) == {"model.safetensors"}


def test_a_finished_bundle_is_not_replaced_unasked(model: Path, bundle: Path) -> None:
    before = (bundle / "manifest.json").stat()
    outcome = tell("build", "--model", model, "--data", "builtin:shapes", "-o", bundle)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == f"FAILED  build  MBQ-E2011  {bundle} exists."
    assert "  fix     add --force to replace it after the new one is complete" in outcome.err
    assert (bundle / "manifest.json").stat() == before
    assert not bundle.with_name("bundle.partial").exists()


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["--wbits", "5"], "E2005", "--wbits 5 is not a width of any scheme."),
        (["--wbits", "three"], "E2003", "(got 'three')"),
        (["--scheme", "w3a16", "--wbits", "4"], "E2002", "contradict each other"),
        (["--scheme", "w4"], "E2001", "Unknown scheme 'w4'."),
        (["--group-size", "100"], "E2004", "w3a16 has no groups of 100."),
        (["--method", "mqb"], "E2001", "Unknown method 'mqb'."),
        (["--compat", "yes"], "E2003", "'yes' is not one of none, mbq"),
        (["--samples", "0"], "E2003", "(got '0')"),
        (["--skip-bad", "-1"], "E2003", "(got '-1')"),
        (["--target", "rtx9090"], "E2001", "Unknown target 'rtx9090'."),
        (["--target", "rtx4090:foo"], "E2001", "Unknown flavour 'foo'"),
        (["--max-context", "8"], "E2009", "A context of 8 tokens holds no picture."),
        (["--gate", "off"], "E2002", "--gate off has no reason."),
        (["--engine-timeout", "0"], "E2003", "(got '0')"),
        (["--seed", "-1"], "E2003", "(got '-1')"),
        (["--ignore-extra", "("], "E2003", "is no regular expression"),
        (["--data", "builtin:nope"], "E2001", "Unknown data set 'builtin:nope'."),
        (["--nonsense"], "E2003", "No such option: --nonsense"),
        (["stray"], "E2003", "unexpected extra argument"),
    ],
)
def test_wrong_option_is_refused_by_its_value_and_nothing_is_written(
    model: Path, tmp_path: Path, line: list[str], code: str, words: str
) -> None:
    data = [] if "--data" in line else ["--data", "builtin:shapes"]
    outcome = run("build", "--model", model, *data, *line, "-o", tmp_path / "out")
    assert (outcome.status, outcome.code) == (2, code)
    assert words in outcome.document["error"]["message"]
    assert outcome.document["error"]["fix"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["--model", "--out"])
def test_missing_option_is_named_with_the_help(model: Path, tmp_path: Path, missing: str) -> None:
    given = {"--model": model, "--out": tmp_path / "out"}
    line = [word for name, value in given.items() if name != missing for word in (name, value)]
    outcome = tell("build", *line)
    assert outcome.status == 2
    assert missing in outcome.err
    assert "  fix     mbq-export build --help" in outcome.err


def test_another_model_needs_data(model: Path, tmp_path: Path) -> None:
    outcome = run("build", "--model", model, "-o", tmp_path / "out")
    assert (outcome.status, outcome.code) == (2, "E2018")
    assert "--data calib.jsonl" in outcome.document["error"]["fix"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--model", "tiny-llava-ov"], "--model does not go with --from."),
        (["--wbits", "3"], "--wbits does not go with --from."),
        (["--method", "rtn"], "--method does not go with --from."),
        (["--data", "builtin:shapes"], "--data does not go with --from."),
        (["--max-context", "128"], "--max-context does not go with --from."),
        (["--engine-dtype", "bf16"], "--engine-dtype does not go with --from."),
        (["--stages", "engine..export"], "Unknown stages 'engine..export'."),
    ],
)
def test_bundle_to_go_on_from_takes_no_option_of_the_stages_before(
    bundle: Path, tmp_path: Path, line: list[str], words: str
) -> None:
    outcome = run("build", "--from", bundle, *line, "-o", tmp_path / "out")
    assert outcome.status == 2
    assert words in outcome.document["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_context_may_change_where_graphs_are_written_anew(bundle: Path, tmp_path: Path) -> None:
    line = ("--stages", "export..", "--max-context", "128", "--target", "cpu", "--dry-run")
    outcome = run("build", "--from", bundle, *line, "-o", tmp_path / "out")
    assert outcome.document["error"]["message"] == "There is no engine to build."


def test_stages_need_a_bundle(model: Path, tmp_path: Path) -> None:
    outcome = run("build", "--model", model, "--stages", "engine..", "-o", tmp_path / "out")
    assert (outcome.status, outcome.code) == (2, "E2002")
    assert outcome.document["error"]["fix"] == ["--from BUNDLE"]
