"""From a request to a published folder: own checks, real builds, and nothing left behind when one fails."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

import mbq_export
from mbq_export.backends import _tensorrt
from mbq_export.backends._trt_record import UNVERIFIED
from mbq_export.backends.base import EngineGraph, EngineRequest
from mbq_export.errors import MbqError, UsageError
from mbq_export.target import Target
from tests.backends import trt_graphs

SM89 = Target.parse("rtx4090:rtx")


def request(*graphs: EngineGraph, out: Path, target: Target = SM89) -> EngineRequest:
    return EngineRequest(graphs=graphs, target=target, out=out, timeout_s=60)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def dies(code: str = "os.kill(os.getpid(), signal.SIGSEGV)") -> tuple[str, ...]:
    return (sys.executable, "-c", f"import os, signal, time\n{code}")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the engines of two graphs."""
    folder = tmp_path_factory.mktemp("built")
    graphs = trt_graphs.relu(folder), trt_graphs.decoder_block(folder)
    _tensorrt.build("rtx", request(*graphs, out=folder / "sm89"))
    return folder


@pytest.mark.trt
def test_build_publishes_engines_and_records(built: Path) -> None:
    names = sorted(path.name for path in (built / "sm89").iterdir())
    assert names == ["decoder.engine", "engine.json", "layers.json", "vision.engine"]
    assert sorted(path.name for path in built.iterdir()) == ["block.onnx", "sm89", "vision.onnx"]


@pytest.mark.trt
def test_engine_record_says_what_was_built_from_what(built: Path) -> None:
    record = json.loads((built / "sm89" / "engine.json").read_text())
    assert (record["flavour"], record["sm"], record["op_level"]) == ("rtx", ["sm89"], 2)
    assert (record["verified"], record["why"]) == (False, UNVERIFIED)
    decoder = record["engines"]["decoder"]
    hashes = files(built)
    assert decoder["sha256"] == hashes["sm89/decoder.engine"]
    assert decoder["onnx"] == {"block.onnx": hashes["block.onnx"]}
    assert decoder["profiles"][0]["x"] == [[1, 1, 128], [1, 1, 128], [1, 64, 128]]
    assert (decoder["weight_streaming"], decoder["workspace_mib"]) == (False, 1024)
    assert (record["plugin"], decoder["plugin_layers_found"]) == (None, {})
    assert {check["name"]: check["pass"] for check in decoder["checks"]} == {
        f"engine.{rule}": True
        for rule in ("A2", "A3", "A5", "A6.attention", "A6.cache", "A7", "A8")
    }


@pytest.mark.trt
def test_layer_record_holds_the_table_of_every_engine(built: Path) -> None:
    record = json.loads((built / "sm89" / "layers.json").read_text())
    assert record["library"].startswith("rtx 1.")
    assert set(record["engines"]) == {"vision", "decoder"}
    rows = record["engines"]["decoder"]["layers"]
    assert any("layers.0.o_proj" in row["onnx"] for row in rows)


@pytest.mark.trt
def test_records_hold_no_time_no_path_and_no_host(built: Path) -> None:
    for name in ("engine.json", "layers.json"):
        text = (built / "sm89" / name).read_text()
        for word in (str(built), os.uname().nodename, "seconds", "rss", "/"):
            assert word not in text.replace("text/", ""), (name, word)


@pytest.mark.trt
def test_second_build_is_byte_identical(built: Path, tmp_path: Path) -> None:
    """Another folder, another length of path, another environment: the same bytes."""
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    graphs = trt_graphs.relu(folder), trt_graphs.decoder_block(folder)
    _tensorrt.build("rtx", request(*graphs, out=folder / "sm89"))
    assert files(folder / "sm89") == files(built / "sm89")


@pytest.mark.trt
def test_failed_checks_are_reported_and_left_to_the_caller(tmp_path: Path) -> None:
    graph = trt_graphs.decoder_block(tmp_path, group=0)
    record = _tensorrt.build("rtx", request(graph, out=tmp_path / "sm89"))
    assert {check.name for check in record.failed} == {"engine.A2", "engine.A3", "engine.A7"}
    assert (tmp_path / "sm89" / "decoder.engine").is_file()


@pytest.mark.trt
@pytest.mark.parametrize("target", ["sm86:rtx", "sm120:rtx"])
def test_other_devices_are_built_the_same_way(tmp_path: Path, target: str) -> None:
    graph = trt_graphs.decoder_block(tmp_path)
    record = _tensorrt.build("rtx", request(graph, out=tmp_path / "o", target=Target.parse(target)))
    assert record.failed == ()
    assert not record.verified


@pytest.mark.trt
def test_failure_of_the_second_graph_publishes_nothing(tmp_path: Path) -> None:
    good = trt_graphs.relu(tmp_path)
    bad = trt_graphs.relu(tmp_path, op="Nope", name="decoder")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MbqError) as error:
        _tensorrt.build("rtx", request(good, bad, out=tmp_path / "sm89"))
    assert error.value.code == "E6001"
    assert error.value.where == ["engine decoder"]
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "sm89.logs"])


@pytest.mark.trt
def test_crash_keeps_the_old_output_and_the_logs(tmp_path: Path) -> None:
    out = tmp_path / "sm89"
    out.mkdir()
    (out / "decoder.engine").write_bytes(b"old")
    graph = trt_graphs.relu(tmp_path)
    wanted = replace(request(graph, out=out), logs=tmp_path / "logs")
    with pytest.raises(MbqError, match="TensorRT died of SIGSEGV in start"):
        _tensorrt.build("rtx", wanted, worker=dies())
    assert files(out) == {"decoder.engine": sha256(b"old").hexdigest()}
    assert sorted(path.name for path in (tmp_path / "logs" / "vision").iterdir()) == [
        "job.json",
        "native.log",
    ]
    assert not (tmp_path / "sm89.partial").exists()


@pytest.mark.trt
def test_unreadable_layer_table_publishes_nothing_and_keeps_the_log(tmp_path: Path) -> None:
    code = "from mbq_export.backends._trt_job import *; from pathlib import Path\n"
    code += "print('[TRT] [V] Engine generation completed', flush=True); Result().write(Path())"
    with pytest.raises(MbqError, match="0 layers and 0 inputs and outputs") as error:
        _tensorrt.build(
            "rtx", request(trt_graphs.relu(tmp_path), out=tmp_path / "sm89"), worker=dies(code)
        )
    assert error.value.code == "E6012"
    logs = Path(str(error.value.context["logs"]))
    assert "Engine generation" in (logs / "native.log").read_text()
    assert not (tmp_path / "sm89").exists()


@pytest.mark.trt
def test_old_output_is_replaced_by_the_new(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "sm89"
    out.mkdir()
    (out / "stale.engine").write_bytes(b"old")
    _tensorrt.build("rtx", request(trt_graphs.relu(tmp_path), out=out))
    assert "stale.engine" not in files(out)
    assert files(out)["vision.engine"] == files(built / "sm89")["vision.engine"]


@pytest.mark.trt
def test_progress_reaches_the_caller_and_a_reminder_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[int, int, str]] = []
    with caplog.at_level(logging.INFO):
        _tensorrt.build(
            "rtx",
            request(trt_graphs.decoder_block(tmp_path), out=tmp_path / "sm89"),
            lambda done, total, note="": calls.append((done, total, note)),
        )
    assert calls == [(0, 1, "sm89 decoder"), (1, 1, "sm89")]
    assert "decoder.engine: " in caplog.text
    assert _tensorrt.REMINDER in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.trt
def test_interrupted_build_leaves_no_child_and_no_partial_output(tmp_path: Path) -> None:
    """Ctrl-C in a process of its own whose TensorRT child hangs."""
    pid_file = tmp_path / "pid"
    hang = f"open({str(pid_file)!r}, 'w').write(str(os.getpid()) + chr(10)); time.sleep(60)"
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from mbq_export.backends import _tensorrt
        from tests.backends import trt_graphs
        from tests.backends.test__tensorrt import dies, request
        folder = Path({str(tmp_path)!r})
        wanted = request(trt_graphs.relu(folder), out=folder / "sm89")
        try:
            _tensorrt.build("rtx", wanted, worker=dies({hang!r}))
        except KeyboardInterrupt:
            raise SystemExit(130)
        """
    )
    root = str(Path(mbq_export.__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root}
    )
    try:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(30) == 130
    finally:
        parent.kill()
        parent.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pid", "vision.onnx"]


def test_invalid_profile_stops_the_build_before_anything_is_written(tmp_path: Path) -> None:
    graph = trt_graphs.with_sizes(trt_graphs.relu(tmp_path), "rows", 0, 1, 2)
    with pytest.raises(UsageError) as error:
        _tensorrt.build("rtx", request(graph, out=tmp_path / "sm89"))
    assert (error.value.code, error.value.where) == ("E2008", ["vision"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vision.onnx"]


def test_target_of_another_flavour_is_refused(tmp_path: Path) -> None:
    wanted = request(out=tmp_path / "o", target=Target.parse("orin:trt"))
    with pytest.raises(UsageError, match="rtx cannot build for target orin:trt") as error:
        _tensorrt.build("rtx", wanted)
    assert error.value.code == "E2012"
