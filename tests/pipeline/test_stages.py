"""The whole path on a tiny random model, and what survives being killed."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mbq_export.bundle import Bundle
from mbq_export.errors import GateError, MbqError
from mbq_export.evaluate.tolerances import PARITY_ROUNDED
from mbq_export.pipeline.request import BuildRequest
from mbq_export.pipeline.stages import build
from mbq_export.progress import Progress, silent
from mbq_export.runtime import lowerings_of
from mbq_export.schemes.base import CHANNEL
from mbq_export.writing import partial_path
from tests.command_line import PROGRAM, ROOT
from tests.tiny import Tiny, write_tiny

KILLED_AT = {"calibration": "calibrate", "weights": "quantize", "onnx": ""}
"""Output of a stage, and the blocks it keeps on the way."""
RESUME_TIMEOUT_S = 400


@dataclass
class Ear:
    """A listener that remembers."""

    notes: list[str] = field(default_factory=list)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        self.notes.append(title)
        yield silent

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"), Tiny(tied=False, walks=True))


def request_for(model: Path, out: Path, **changes: object) -> BuildRequest:
    fixed = {
        "model": str(model),
        "out": out,
        "group_size": 64,
        "data": "builtin:shapes",
        "samples": 4,
    }
    return BuildRequest(**{**fixed, "targets": ("cpu",), **changes})


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "bundle"
    build(request_for(model, out), Ear())
    return out


def test_build_publishes_a_verified_bundle_and_nothing_else(built: Path) -> None:
    bundle = Bundle.open(built, verify=True)
    assert {record["path"].split("/")[0] for record in bundle.manifest["files"]} == {
        "calibration",
        "onnx",
        "weights",
    }
    assert all(gate["pass"] for gate in bundle.manifest["gates"])
    assert bundle.manifest["gates"]
    assert [path.name for path in built.parent.iterdir()] == ["bundle"]


def test_bundle_names_no_place_and_no_time(built: Path) -> None:
    text = (built / "manifest.json").read_text()
    assert str(built.parent) not in text
    assert "seconds" not in text


def test_same_request_gives_the_same_bundle(model: Path, built: Path, tmp_path: Path) -> None:
    again = build(request_for(model, tmp_path / "again"), Ear())
    assert again.sha256 == Bundle.open(built).sha256


def test_baseline_goes_the_same_way(model: Path, tmp_path: Path) -> None:
    build(request_for(model, tmp_path / "fp", weight_bits=16), Ear())
    manifest = Bundle.open(tmp_path / "fp").manifest
    assert manifest["quant"]["scheme"]["name"] == "none"
    assert manifest["calibration"] is None


@pytest.mark.parametrize(
    ("group_size", "lowerings"), [(CHANNEL, ["qdq", "reference"]), (128, ["reference"])]
)
def test_rounded_activations_go_the_same_way(
    model: Path, tmp_path: Path, group_size: int, lowerings: list[str]
) -> None:
    out = tmp_path / "rounded"
    result = build(
        request_for(model, out, weight_bits=None, scheme="w4a8", group_size=group_size), Ear()
    )
    bundle = Bundle.open(out, verify=True)
    assert bundle.manifest["quant"]["scheme"]["activation"]["bits"] == 8
    assert {row["group_size"] for row in bundle.manifest["quant"]["linears"]} == {group_size}
    assert lowerings_of(bundle) == lowerings
    assert result.gates is not None
    assert result.gates.context["lowering"] == lowerings[0]
    gates = {gate["name"]: gate for gate in bundle.manifest["gates"] if gate["tier"] == "numeric"}
    assert gates["parity.linear"]["threshold"] == PARITY_ROUNDED["fp32"].linear_error
    assert gates["parity.linear"]["value"] < 1e-6, "the codes are equal to the bit"
    assert gates["parity.relative_error"]["threshold"] == PARITY_ROUNDED["fp32"].relative_error


def test_failed_gate_publishes_nothing_and_keeps_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    monkeypatch.setattr(
        "mbq_export.pipeline.stages.failure", lambda _: GateError("E1101", "planted")
    )
    with pytest.raises(GateError, match="planted"):
        build(request_for(model, out), Ear())
    assert not out.exists()
    monkeypatch.undo()
    ear = Ear()
    build(request_for(model, out), ear)
    assert sum("finished before, kept" in note for note in ear.notes) == 4


def test_gate_warn_records_the_reason(model: Path, tmp_path: Path) -> None:
    build(request_for(model, tmp_path / "b", gate="off", gate_reason="trying"), Ear())
    assert Bundle.open(tmp_path / "b").manifest["gate_override"] == {
        "gate": "off",
        "reason": "trying",
    }


def test_resuming_with_other_options_lists_what_differs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    monkeypatch.setattr(
        "mbq_export.pipeline.stages.failure", lambda _: GateError("E1101", "planted")
    )
    with pytest.raises(GateError):
        build(request_for(model, out), Ear())
    with pytest.raises(MbqError, match="group_size") as caught:
        build(request_for(model, out, group_size=32), Ear())
    assert caught.value.code == "E2010"
    assert any("--fresh" in fix for fix in caught.value.fix)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", KILLED_AT)
def test_killed_build_goes_on_and_ends_byte_identical(
    model: Path, built: Path, tmp_path: Path, stage: str
) -> None:
    """Kill with SIGKILL inside each stage, run the same line again, compare every deterministic byte."""
    out = tmp_path / "bundle"
    line = [*PROGRAM, "build", "--model", model, "--group-size", "64", "--data", "builtin:shapes"]
    line += ["--samples", "4", "--target", "cpu", "-o", out, "--json"]
    child = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_until(lambda: _inside(partial_path(out), stage), child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, timeout=RESUME_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["sha256"] == Bundle.open(built).sha256
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}


def _inside(partial: Path, stage: str) -> bool:
    """Whether a build is at work in a stage: its first block or file is there, its end is not recorded."""
    state = partial / "state.json"
    if not state.exists() or f"bundle/{stage}" in state.read_text():
        return False
    if KILLED_AT[stage]:
        return any(partial.glob(f"blocks/{KILLED_AT[stage]}/*.json"))
    return "bundle/weights" in state.read_text()


def _wait_until(met, child: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + RESUME_TIMEOUT_S
    while not met():
        assert child.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
