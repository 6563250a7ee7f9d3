"""The backend as users meet it: what it can do here, and what it says it cannot."""

from pathlib import Path

import pytest

from mbq_export.backends import BACKENDS, rtx
from mbq_export.backends._trt_record import ENGINE_RECORD
from mbq_export.backends.base import EngineRequest
from mbq_export.errors import MbqError
from mbq_export.progress import silent
from mbq_export.target import Target
from tests.backends import trt_graphs

ENGINE = Path("decoder.engine")


def machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, gpu: bool = False, driver: bool = False
) -> None:
    """Make this machine one with or without a GPU and the driver's tool."""
    for device, vendor in (("0000:00:01.0", "0x1234"), ("0000:00:02.0", "0x10de")):
        if gpu or vendor != rtx.NVIDIA:
            (tmp_path / "pci" / device).mkdir(parents=True)
            (tmp_path / "pci" / device / "vendor").write_text(f"{vendor}\n")
    (tmp_path / "bin").mkdir()
    if driver:
        (tmp_path / "bin" / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setattr(rtx, "PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def refusal() -> MbqError:
    with pytest.raises(MbqError) as error:
        rtx.BACKEND.open(ENGINE)
    assert rtx.RUNS_HERE in error.value.fix
    return error.value


def test_backend_is_found_by_its_name() -> None:
    backend = BACKENDS["rtx"]
    assert (backend.name, backend.lowerings, backend.isolated) == ("rtx", ("plugin", "qdq"), True)


def test_engine_without_a_gpu_names_what_works_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch)
    error = refusal()
    assert (error.code, error.exit_status) == ("E3001", 3)
    assert error.message == "decoder.engine cannot run: this machine has no NVIDIA GPU."


def test_gpu_without_a_driver_is_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, gpu=True)
    error = refusal()
    assert error.code == "E3002"
    assert "the NVIDIA driver is not installed" in error.message


def test_gpu_with_a_driver_learns_that_engines_are_not_run_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, gpu=True, driver=True)
    error = refusal()
    assert error.code == "E2015"
    assert "is not run yet" in error.message


@pytest.mark.trt
def test_availability_names_the_version() -> None:
    found = rtx.available()
    assert found.ok
    assert found.found == f"rtx {found.version}"
    assert found.fix == ""


@pytest.mark.trt
def test_backend_builds_through_its_record(tmp_path: Path) -> None:
    assert rtx.BACKEND.build is not None
    graph = trt_graphs.relu(tmp_path)
    target = Target.parse("rtx4090:rtx")
    record = rtx.BACKEND.build(
        EngineRequest(graphs=(graph,), target=target, out=tmp_path / "sm89"), silent
    )
    assert record.library == rtx.available().found
    assert record.engines["vision"].path == tmp_path / "sm89" / "vision.engine"
    assert (record.folder / ENGINE_RECORD).is_file()
    assert record.reason
