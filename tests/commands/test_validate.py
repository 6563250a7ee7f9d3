"""`validate`: a table of checks, and exit status 1 where one says no."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.command_line import run, tell


def test_checks_are_listed_and_counted(bundle: Path) -> None:
    outcome = tell("validate", bundle, "--tier", "structure")
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["tier", "gate", "modality", "value", "threshold", "verdict"]
    assert {line.split()[-1] for line in lines[2:-1]} == {"pass"}
    assert lines[-1] == f"OK  validate  {bundle}  4 checks"
    assert "warning[MBQ-W4010]" in outcome.err


def test_result_holds_every_tier_that_was_asked_for(bundle: Path, tmp_path: Path) -> None:
    line = ("--tier", "numeric,tokens", "--samples", "1", "--lowering", "reference")
    outcome = run("validate", bundle, *line, "-o", tmp_path / "results")
    assert outcome.status == 0, outcome.err
    result = outcome.document["result"]
    assert set(result["tiers"]) == {"numeric", "tokens"}
    assert result["first_bad"] is None
    assert (
        json.loads((tmp_path / "results" / "validate.json").read_text())["tiers"] == result["tiers"]
    )


def test_cost_of_a_cache_in_8_bits_is_told_per_class(bundle: Path) -> None:
    outcome = run("validate", bundle, "--tier", "numeric", "--samples", "1", "--kv-bits", "8")
    assert outcome.status == 0, outcome.err
    gates = outcome.document["result"]["tiers"]["numeric"]["gates"]
    told = [(gate["modality"], gate["pass"]) for gate in gates if gate["name"] == "cache.kl"]
    assert told == [(kind, True) for kind in ("vision", "prompt", "answer", "")]


def test_other_widths_of_a_cache_are_refused(bundle: Path) -> None:
    outcome = run("validate", bundle, "--kv-bits", "4")
    assert (outcome.status, outcome.code) == (2, "E2001")


def test_failed_check_exits_1_and_still_gives_the_result(bundle: Path, model: Path) -> None:
    line = ("--tier", "numeric", "--samples", "1", "--model", model)
    outcome = run("validate", bundle, *line)
    assert (outcome.status, outcome.code) == (1, "E1201")
    error = outcome.document["error"]
    failed = [
        gate
        for gate in error["context"]["result"]["tiers"]["numeric"]["gates"]
        if gate["pass"] is False
    ]
    assert failed
    assert failed[0]["name"].startswith("quality.")
    shown = tell("validate", bundle, *line)
    assert "FAIL" in shown.out
    assert shown.err.splitlines()[-1].startswith("FAILED  validate  MBQ-E1201  numeric quality.")


def test_changed_file_is_named(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    graph = copy / "onnx" / "vision_encoder.onnx_data"
    data = bytearray(graph.read_bytes())
    data[100] ^= 1
    graph.write_bytes(data)
    outcome = run("validate", copy, "--tier", "structure")
    assert (outcome.status, outcome.code) == (4, "E4602")
    assert "onnx/vision_encoder.onnx_data: content changed" in outcome.document["error"]["message"]


def test_results_do_not_go_into_the_bundle(bundle: Path) -> None:
    outcome = run("validate", bundle, "--tier", "structure", "-o", bundle / "results")
    assert (outcome.status, outcome.code) == (2, "E2011")
    assert not (bundle / "results").exists()


def test_folder_that_is_no_bundle_is_refused_with_what_would_be_one(
    model: Path, tmp_path: Path
) -> None:
    assert run("validate", tmp_path / "no").document["error"]["message"] == (
        f"There is no bundle {tmp_path / 'no'}."
    )
    (tmp_path / "no.partial").mkdir()
    unfinished = run("validate", tmp_path / "no").document["error"]
    assert unfinished["why"] == f"its build has not finished: {tmp_path / 'no.partial'}"
    outcome = run("validate", model)
    assert (outcome.status, outcome.code) == (4, "E4604")
    assert outcome.document["error"]["fix"] == ["mbq-export build --model MODEL -o DIR"]


def test_tasks_of_lmms_eval_need_its_package(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    outcome = run("validate", bundle, "--tier", "task", "--tasks", "shapes")
    assert (outcome.status, outcome.code) == (3, "E3007")
    assert outcome.document["error"]["message"] == "lmms-eval is not installed."


def test_what_the_task_tier_measured_is_shown(bundle: Path) -> None:
    outcome = tell("validate", bundle, "--tier", "task", "--questions", "2", "--new-tokens", "4")
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["task/questions", "2"] in rows


@pytest.mark.parametrize(
    ("line", "status", "code", "words"),
    [
        (["--tier", "nonsense"], 2, "E2001", "Unknown tier 'nonsense'."),
        (["--tier", ""], 2, "E2001", "Unknown tier ''."),
        (["--backend", "cuda"], 2, "E2001", "Unknown backend 'cuda'."),
        (["--backend", "rtx", "--tier", "tokens"], 2, "E2001", "has no engines of"),
        (["--lowering", "plugin", "--tier", "tokens"], 2, "E2001", "has no fp32 graph"),
        (["--samples", "0"], 2, "E2003", "(got '0')"),
        (["--questions", "none"], 2, "E2003", "(got 'none')"),
        (["--threads", "100000"], 2, "E2003", "100000 threads for"),
        (["--model", "nope", "--tier", "numeric"], 4, "E4001", "There is no config.json in nope."),
        (["--tasks", "shapes"], 2, "E2002", "--tasks is given with --tier structure,numeric"),
        (["--include-path", ".", "--tier", "task"], 2, "E2002", "without --tasks"),
        (["--tier", "task", "--tasks", "a", "--data", "b"], 2, "E2002", "both given"),
        (["--tier", "task", "--tasks", "a,,b"], 2, "E2003", "--tasks has an empty name."),
        (["--tier", "task", "--tasks", ""], 2, "E2003", "--tasks has an empty name."),
        (["--tier", "task", "--tasks", "a", "--include-path", "no"], 2, "E2003", "is no folder."),
        (["--data", "nope", "--tier", "numeric"], 4, "E4301", "There is no file 'nope'"),
    ],
)
def test_wrong_option_is_refused_by_its_value(
    bundle: Path, line: list[str], status: int, code: str, words: str
) -> None:
    outcome = run("validate", bundle, *line)
    assert (outcome.status, outcome.code) == (status, code)
    assert words in outcome.document["error"]["message"]
