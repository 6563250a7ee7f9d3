"""Optional libraries that are not installed: the program runs in an environment that really lacks them."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import ROOT
from tests.conftest import SHORT_BUILD

SCRIPT = """
import json, sys
from tests.command_line import run
lines = json.loads(sys.stdin.read())
found = [run(*line) for line in lines]
print(json.dumps([{**outcome.document, "told": outcome.err} for outcome in found]))
"""


def without(prefix: str, folder: Path, *lines: tuple[object, ...]) -> list[dict[str, Any]]:
    """Run commands where no installed package begins with a prefix: neither its code nor its record.

    Every other entry of site-packages is linked into a folder that takes its place.
    """
    site = folder / "site"
    site.mkdir()
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            if not entry.name.lower().startswith(prefix) and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT],
        input=json.dumps([[str(word) for word in line] for line in lines]),
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_without_onnx_runtime_what_needs_it_says_how_to_install_it(
    model: Path, bundle: Path, tmp_path: Path
) -> None:
    gated = [word for word in SHORT_BUILD if word not in SHORT_BUILD[-4:]]
    built, ran, timed, checked, asked = without(
        "onnxruntime",
        tmp_path,
        ("build", "--model", model, *gated, "-o", tmp_path / "out"),
        ("run", bundle, "-p", "x"),
        ("bench", bundle, "-r", "1"),
        ("validate", bundle),
        ("doctor", "--for", "run"),
    )
    for document in (built, ran, timed, checked):
        error = document["error"]
        assert (document["exit"], error["code"]) == (3, "MBQ-E3003"), error
        assert error["message"] == "ONNX Runtime is not installed."
        assert error["fix"][0] == 'pip install "mbq-export[cpu]"'
    assert asked["error"]["code"] == "MBQ-E3015"
    assert asked["error"]["fix"] == ['pip install "mbq-export[cpu]"']
    assert [path.name for path in tmp_path.iterdir()] == ["site"], "a build stops in its plan"


@pytest.mark.slow
def test_without_tensorrt_the_engine_is_skipped_or_required(model: Path, tmp_path: Path) -> None:
    line = (
        "build",
        "--model",
        model,
        *SHORT_BUILD,
        "--target",
        "rtx4090:rtx",
        "-o",
        tmp_path / "out",
    )
    required, skipped = without("tensorrt", tmp_path, (*line, "--require-engine"), line)
    assert (required["exit"], required["error"]["code"]) == (3, "MBQ-E3003")
    assert required["error"]["message"] == "No engine for rtx4090:rtx can be built here."
    assert any('pip install "mbq-export[rtx]"' in fix for fix in required["error"]["fix"])
    assert (skipped["exit"], skipped["ok"]) == (0, True)
    [warning] = [each for each in skipped["warnings"] if each["code"] == "MBQ-W3016"]
    assert 'pip install "mbq-export[rtx]"' in warning["text"]
    assert set(skipped["result"]["skipped_engines"]) == {"rtx4090:rtx"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["skipped_engines"]) == {"rtx4090:rtx"}
    assert (manifest["targets"], manifest["engines"]) == (["rtx4090:rtx"], [])
    assert any("merged_plugin" in record["path"] for record in manifest["files"]), "for a device"
