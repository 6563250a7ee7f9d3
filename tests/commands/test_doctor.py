"""`doctor`: a table, a verdict per use, and an error only where one use was asked about."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.backends import BACKENDS
from mbq_export.backends.base import Availability
from mbq_export.evaluate import doctor
from tests.command_line import run, tell

USES = ["build", "build:rtx", "validate", "run", "bench"]


def test_checks_fit_a_table_and_the_last_line_says_what_works() -> None:
    outcome = tell("doctor")
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["check", "status", "found"]
    assert {"python", "packages", "onnxruntime", "disk"} <= {line.split()[0] for line in lines[2:9]}
    assert lines[-1].startswith("OK  doctor  build ")
    assert [word.rpartition(" ")[0] for word in lines[-1].split("  ")[2].split(", ")] == USES


def test_result_has_a_row_per_check_and_a_truth_per_use() -> None:
    result = run("doctor").document["result"]
    assert set(result["can"]) == set(USES)
    assert all(set(row) == {"id", "found", "needed", "status", "fix"} for row in result["checks"])


def test_compiled_plugins_are_a_row_with_their_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBQ_EXPORT_CACHE", str(tmp_path))
    row = next(row for row in run("doctor").document["result"]["checks"] if row["id"] == "plugins")
    assert (row["found"], row["status"]) == ("none", "skip")
    assert row["needed"].endswith("mbq-export plugins build")
    tmp_path.chmod(0o777)
    row = next(row for row in run("doctor").document["result"]["checks"] if row["id"] == "plugins")
    assert (row["status"], row["fix"]) == ("warn", f"chmod 700 {tmp_path}")


@pytest.mark.parametrize(
    ("version", "status", "told"),
    [
        ("10.3.0.26", "ok", "graphs of primitives (opset20), cache that grows"),
        ("10.14.1.48", "ok", "graphs with Attention (opset23-attention), cache that grows"),
        ("11.4.0.106", "ok", "graphs of opset24, cache updated in place"),
        ("8.6.2", "warn", ""),
    ],
)
def test_version_of_tensorrt_says_which_graphs_it_gets(
    version: str, status: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = Availability(ok=True, found=f"trt {version}", needed="", version=version)
    backend = replace(BACKENDS["trt"], available=lambda: installed)
    monkeypatch.setattr(doctor, "BACKENDS", {**BACKENDS.members(), "trt": backend})
    (row,) = (row for row in doctor.examine(output=Path()) if row.id == "trt")
    assert (row.status, row.found) == (status, f"trt {version}" + (f": {told}" if told else ""))
    assert bool(row.fix) == (status == "warn")


def test_unknown_use_lists_the_known() -> None:
    outcome = run("doctor", "--for", "fly")
    assert (outcome.status, outcome.code) == (2, "E2001")
    assert "build:rtx" in outcome.document["error"]["why"]


def test_damaged_bundle_cannot_be_run_and_its_fix_is_shown(bundle: Path, tmp_path: Path) -> None:
    assert run("doctor", "--for", "run", "--bundle", bundle).status == 0
    outcome = tell("doctor", "--for", "run", "--bundle", tmp_path / "no")
    assert outcome.status == 3
    assert "fail  bundle: needed a sealed bundle\n  fix  mbq-export build" in outcome.out
    assert (
        outcome.err.splitlines()[-1] == "FAILED  doctor  MBQ-E3015  run cannot work here: bundle."
    )


def test_place_below_a_file_is_no_place_for_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = run("doctor", "--for", "build", "-o", tmp_path / "file" / "out")
    assert (outcome.status, outcome.code) == (3, "E3015")
    assert "not writable" in outcome.document["error"]["why"]
