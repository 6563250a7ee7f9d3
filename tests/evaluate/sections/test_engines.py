"""Engines: what they hold, and that nobody ran them."""

from pathlib import Path

from mbq_export.evaluate.document import BAD, GOOD, UNSURE, Cell, Missing, Table
from mbq_export.evaluate.gathering import gather
from mbq_export.evaluate.sections.engines import MEANINGS, constants, section
from mbq_export.report import Check
from tests.evaluate.reported import bundle_folder, engine, layer_table, write


def test_layers_and_int4_constants_are_counted(tmp_path: Path) -> None:
    engines, checks = section(gather([bundle_folder(tmp_path / "w3")])).blocks
    assert isinstance(engines, Table)
    assert engines.rows == (
        (
            "w3 rtx-1.7.1.116/sm89/decoder",
            Cell(text="no", tone=UNSURE),
            "rtx 1.7.1.116",
            "8.9",
            "3 MB",
            "2",
            "2",
            "built without a GPU",
        ),
    )
    assert isinstance(checks, Table)
    assert checks.rows == (
        (
            MEANINGS["engine.A2"],
            Cell(text="pass", tone=GOOD),
            "w3 rtx-1.7.1.116/sm89/decoder",
            "0",
            "0",
            "",
        ),
    )


def test_a_constant_read_by_two_layers_counts_once() -> None:
    assert constants(layer_table(), "decoder") == {"Int4": 2, "Half": 1}
    assert constants({"engines": {"decoder": {"layers": [{"const": 3}]}}}, "decoder") == {}


def test_failed_and_skipped_checks_are_told_apart(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "w3")
    record = engine(verified=True)
    bad = Check(name="engine.A3", tier="engine", ok=False, value=3, why="3 rows")
    skipped = Check(name="engine.A9", tier="engine", ok=None, why="no table")
    record["engines"]["decoder"]["checks"] = [bad.as_json(), skipped.as_json()]
    write(folder / "engines/rtx-2/sm120/engine.json", record)
    engines, checks = section(gather([folder])).blocks
    assert isinstance(engines, Table)
    assert engines.rows[1][1] == Cell(text="yes", tone=GOOD)
    assert isinstance(checks, Table)
    assert [(row[0], row[1]) for row in checks.rows[1:]] == [
        ("weights dequantized to memory", Cell(text="FAIL", tone=BAD)),
        ("engine.A9", Cell(text="not run", tone=UNSURE)),
    ]


def test_a_bundle_without_engines_says_how_to_get_one(tmp_path: Path) -> None:
    (missing,) = section(gather([bundle_folder(tmp_path / "w3", engines=False)])).blocks
    assert isinstance(missing, Missing)
    assert "--target rtx4090:rtx" in missing.why
