"""Full TensorRT as users meet it where it is not installed, which is every machine of this project.

The builds here are those of a double, `recorded_builder`, in a real child: what the parent lays out and takes back.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from mbq_export.backends import BACKENDS, _tensorrt, trt
from mbq_export.backends._trt_flavour import FLAVOURS, Installed
from mbq_export.backends._trt_layers import LayerTable
from mbq_export.backends.base import BuilderOptions, EngineRequest
from mbq_export.errors import MbqError
from mbq_export.native import LocalGpu
from mbq_export.pipeline.request import BuildRequest, targets_of
from mbq_export.target import Target
from tests.backends import recorded_builder as double
from tests.backends import trt_graphs

ORIN = LocalGpu(name="Orin", sm=87, driver="580.95")
DOUBLE = (sys.executable, "-m", "tests.backends.recorded_builder", "11")


def test_backend_is_found_by_its_name() -> None:
    backend = BACKENDS["trt"]
    assert (backend.name, backend.lowerings, backend.isolated) == ("trt", ("plugin", "qdq"), True)


def test_missing_tensorrt_is_told_with_the_command_that_installs_it() -> None:
    if trt.available().ok:
        pytest.skip("TensorRT is installed")
    assert trt.available().fix == 'pip install "mbq-export[trt]"'
    with pytest.raises(MbqError) as error:
        targets_of(BuildRequest(model="m", out=Path("out"), targets=("orin:trt",)))
    assert (error.value.code, error.value.exit_status) == ("E3003", 3)
    assert "orin:trt" in error.value.message


def test_log_without_a_table_that_is_known_costs_a_warning_and_no_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has seen what full TensorRT prints."""
    monkeypatch.setattr(_tensorrt, "LayerTable", Unread)
    out = build(tmp_path, times=None, monkeypatch=monkeypatch)
    record = json.loads((out / "engine.json").read_text())["engines"]["decoder"]
    assert [check["name"] for check in record["checks"]] == ["engine.table"]
    assert record["layers"] == 0
    assert "Nothing is checked in it; the log is kept: " in caplog.text
    assert (tmp_path / "sm87.logs" / "decoder" / "native.log").is_file()


class Unread(LayerTable):
    """A table in a form that this release does not know."""

    @classmethod
    def parse(cls, lines: Iterable[str]) -> LayerTable:
        return LayerTable.parse(line.replace("LayerType:", "Kind:") for line in lines)


def build(folder: Path, *, times: Path | None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build two engines with the double on a machine that looks like an Orin."""
    installed = Installed(
        flavour=FLAVOURS["trt"], module="tensorrt", version="11.4.0.106", library=None
    )
    monkeypatch.setattr(_tensorrt, "installed_flavour", lambda _: installed)
    monkeypatch.setattr(_tensorrt, "local_gpu", lambda: ORIN)
    graphs = trt_graphs.relu(folder), trt_graphs.relu(folder, name="decoder")
    request = EngineRequest(
        graphs=graphs,
        target=Target.parse("orin:trt"),
        out=folder / "sm87",
        options=BuilderOptions(timing_cache=times),
        timeout_s=60,
    )
    _tensorrt.build("trt", request, worker=DOUBLE)
    return folder / "sm87"


def test_build_without_a_timing_cache_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = build(tmp_path, times=None, monkeypatch=monkeypatch)
    assert sorted(path.name for path in out.iterdir()) == [
        "decoder.engine", "engine.json", "layers.json", "vision.engine",
    ]  # fmt: skip
    assert (out / "decoder.engine").read_bytes() == b"plan"


@pytest.mark.parametrize("times", [None, b"earlier;"])
def test_times_lie_beside_each_engine_and_the_users_file_stays(
    times: bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A file that does not exist yet is a first build; one that exists is read and never written."""
    given = tmp_path / "my.times"
    if times is not None:
        given.write_bytes(times)
        given.chmod(0o444)
    out = build(tmp_path, times=given, monkeypatch=monkeypatch)
    for name in ("vision", "decoder"):
        assert (out / f"{name}.timing").read_bytes() == (times or b"") + b"measured;"
    assert (given.read_bytes() if given.exists() else None) == times
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".times") == (
        ["my.times"] if times else []
    )
    record = json.loads((out / "engine.json").read_text())
    assert [engine["timed"] for engine in record["engines"].values()] == [True, True]
    assert "timing cache" not in caplog.text


@pytest.mark.parametrize(
    ("times", "why"),
    [(double.DAMAGED, "it is damaged"), (double.FOREIGN, "it is of another version or device")],
)
def test_times_that_do_not_fit_cost_a_warning_and_no_build(
    times: bytes,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = tmp_path / "my.times"
    given.write_bytes(times)
    out = build(tmp_path, times=given, monkeypatch=monkeypatch)
    assert (out / "decoder.timing").read_bytes() == b"measured;"
    assert given.read_bytes() == times
    for name in ("vision", "decoder"):
        assert f"engine {name}: The timing cache is not used: {why}." in caplog.text


def test_build_that_dies_while_it_keeps_its_times_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "my.times"
    given.write_bytes(double.DEADLY)
    with pytest.raises(MbqError, match="was killed"):
        build(tmp_path, times=given, monkeypatch=monkeypatch)
    assert given.read_bytes() == double.DEADLY
    assert not (tmp_path / "sm87").exists()
    assert not (tmp_path / "sm87.partial").exists()
