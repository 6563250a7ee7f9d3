"""What all backends share."""

from pathlib import Path

from mbq_export.backends import BACKENDS
from mbq_export.backends.base import Backend, EngineFile, EngineRecord
from mbq_export.report import Check


def test_every_file_is_a_backend_and_offers_its_lowerings() -> None:
    members = BACKENDS.members()
    assert {"ort", "rtx", "torch"} <= set(members)
    for name, backend in members.items():
        assert isinstance(backend, Backend)
        assert backend.name == name
        assert set(backend.lowerings) <= {"reference", "qdq", "plugin"}


def test_every_backend_says_whether_it_works_here() -> None:
    for backend in BACKENDS.members().values():
        found = backend.available()
        assert found.needed
        assert found.ok or found.fix


def test_record_collects_the_checks_that_failed() -> None:
    checks = (
        Check(name="engine.A2", ok=True),
        Check(name="engine.A3", ok=False),
        Check(name="engine.A7", ok=None, why="no count"),
    )
    engine = EngineFile(
        path=Path("e"),
        sha256="",
        size=0,
        layers=1,
        checks=checks,
        seconds=0.0,
        peak_rss_bytes=0,
        plugin_layers={},
    )
    record = EngineRecord(
        folder=Path(), library="rtx 1", engines={"vision": engine}, verified=False, reason="r"
    )
    assert [check.name for check in record.failed] == ["engine.A3"]
