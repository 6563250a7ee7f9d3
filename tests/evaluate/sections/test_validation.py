"""Gates by modality, maps of errors, and the first bad place."""

import math
from dataclasses import replace

from mbq_export.evaluate.document import (
    BAD,
    GOOD,
    UNSURE,
    Cell,
    Figure,
    Missing,
    Note,
    Section,
    Table,
)
from mbq_export.evaluate.sections.validation import section
from mbq_export.report import Check, Report
from tests.evaluate.reported import found_of, validation


def gates(report: Report) -> dict[str, tuple[object, ...]]:
    table = next(b for b in section(found_of(report)).blocks if isinstance(b, Table))
    return {str(row[0]): row[1:] for row in table.rows}


def figures(found: Section) -> list[Figure]:
    return [block for block in found.blocks if isinstance(block, Figure)]


def test_modalities_of_a_gate_stand_side_by_side() -> None:
    checks = tuple(
        Check(
            name="parity.cosine",
            tier="numeric",
            ok=ok,
            value=value,
            threshold=0.99999,
            modality=kind,
            place="layers.1.hidden",
        )
        for kind, value, ok in (
            ("vision", 0.5, False),
            ("prompt", 1.0, True),
            ("answer", math.nan, False),
        )
    )
    (row,) = gates(replace(validation(), checks=checks)).values()
    assert row == (
        Cell(text="FAIL", tone=BAD),
        "0.99999",
        "",
        "0.5",
        "1",
        "nan",
        "numeric",
        "vision layers.1.hidden; answer layers.1.hidden",
    )


def test_a_gate_that_was_not_run_is_neither_pass_nor_fail() -> None:
    found = gates(validation())
    assert found["parity.logits"][0] == Cell(text="not run", tone=UNSURE)
    assert found["parity.logits"][-1] == "answer no positions"
    assert found["files"][0] == Cell(text="pass", tone=GOOD)


def test_reasons_take_no_room_where_all_is_well() -> None:
    report = replace(validation(), checks=validation().checks[:3])
    assert gates(report)["files"] == (
        Cell(text="pass", tone=GOOD),
        "",
        "21",
        "",
        "",
        "",
        "structure",
    )


def test_the_map_has_a_row_per_modality_and_frames_what_is_beyond_its_gate() -> None:
    stream, linears = figures(section(found_of(validation(worst=0.5))))
    assert stream.numbers is not None
    assert stream.numbers.header == ("", "0", "1", "2")
    assert stream.numbers.rows[0] == ("vision", "1e-6", "1e-6", "0.5")
    assert stream.drawing.svg.count("heat beyond") == 1
    assert "the largest at vision, 2" in stream.drawing.text
    assert linears.numbers is not None
    assert [row[0] for row in linears.numbers.rows] == ["o_proj", "down_proj"]


def test_the_first_bad_place_is_told() -> None:
    first = section(found_of(validation(worst=0.5))).blocks[0]
    assert isinstance(first, Note)
    assert first.tone == BAD
    assert first.text.startswith(
        "First bad place: layer 2 mlp.down_proj column 7, vision positions. cos 0.5, norm_ratio 2, error 0.5."
    )
    good = section(found_of(validation())).blocks[0]
    assert good == Note(text="No layer, linear or modality is beyond its limit.", tone=GOOD)


def test_a_nan_is_a_finding_and_not_a_gap() -> None:
    report = Report.from_json(validation(worst=math.nan).as_json())
    stream = figures(section(found_of(report)))[0]
    assert stream.numbers is not None
    assert stream.numbers.rows[0][-1] == "nan"
    assert stream.drawing.svg.count("heat beyond") == 1


def test_tiers_that_were_not_run_are_said_to_be_missing() -> None:
    report = replace(validation(), checks=validation().checks[:1], details={}, measurements=())
    missing = [b.what for b in section(found_of(report)).blocks if isinstance(b, Missing)]
    assert missing == [
        "First bad layer",
        "Relative error by layer and modality",
        "Error of every linear on its own input",
    ]


def test_numbers_without_a_gate_are_shown() -> None:
    table = section(found_of(validation())).blocks[-1]
    assert isinstance(table, Table)
    assert table.rows == (("tokens/kl_mean", "1e-7"),)
