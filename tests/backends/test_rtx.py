"""The backend as users meet it: what it can do here, and what it says it cannot."""

from pathlib import Path

import pytest

from mbq_export.backends import BACKENDS, rtx
from mbq_export.backends._trt_record import ENGINE_RECORD
from mbq_export.backends.base import EngineRequest
from mbq_export.progress import silent
from mbq_export.target import Target
from tests.backends import trt_graphs


def test_backend_is_found_by_its_name() -> None:
    backend = BACKENDS["rtx"]
    assert (backend.name, backend.lowerings, backend.isolated) == ("rtx", ("plugin", "qdq"), True)


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
