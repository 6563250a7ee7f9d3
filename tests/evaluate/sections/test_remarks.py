"""Whatever was warned of, skipped or not shown is listed with its reason."""

from pathlib import Path

from mbq_export.evaluate.document import Note, Table
from mbq_export.evaluate.gathering import gather
from mbq_export.evaluate.sections.remarks import section
from tests.evaluate.reported import benchmark, bundle_folder, found_of, validation


def test_everything_that_is_not_shown_has_a_line(tmp_path: Path) -> None:
    folder = bundle_folder(
        tmp_path / "w3",
        facts={"skipped_engines": {"sm86:rtx": "not installed"}},
        report=validation(),
    )
    path = folder / "calibration" / "calib.json"
    path.write_bytes(b"x" * path.stat().st_size)
    benchmark(reasons=("busy",)).write(tmp_path / "bench.json")
    (table,) = section(gather([folder, tmp_path / "bench.json"])).blocks
    assert isinstance(table, Table)
    assert [row[:2] for row in table.rows] == [
        ("w3/reports/validate.json", "MBQ-W1104"),
        ("bench.json", "noise"),
        ("w3/reports/validate.json", "not run"),
        ("w3", "engine skipped"),
        ("w3/calibration/calib.json", "not shown"),
    ]
    assert [row[2] for row in table.rows[1:4]] == [
        "busy",
        "parity.logits answer no positions",
        "sm86:rtx: not installed",
    ]


def test_nothing_to_say_is_said() -> None:
    assert section(found_of(benchmark())).blocks == (Note(text="Nothing to report."),)
