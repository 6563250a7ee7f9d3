"""Right answers with their intervals, of a validation and of a table of task quality."""

from dataclasses import replace
from typing import Any

from mbq_export.evaluate.document import Figure, Heading, Missing, Note, Table
from mbq_export.evaluate.sections.accuracy import section
from mbq_export.report import Measurement
from tests.evaluate.reported import found_of, quality, validation


def test_a_task_is_a_share_with_its_interval() -> None:
    values = {"": 0.9, "_low": 0.8, "_high": 0.95, "/color": 1.0}
    measured = tuple(Measurement(name=f"task/accuracy{k}", value=v) for k, v in values.items())
    counts = (
        Measurement(name="task/questions", value=500),
        Measurement(name="task/pictures", value=100),
    )
    (figure,) = section(found_of(replace(validation(), measurements=measured + counts))).blocks
    assert isinstance(figure, Figure)
    assert figure.title == "Exact match, w3"
    assert figure.numbers is not None
    assert figure.numbers.rows == (("all", "90.0 %", "80.0 to 95.0 %"), ("color", "100.0 %", ""))
    assert figure.note.startswith("500 questions about 100 pictures")
    assert figure.drawing.text == "In %. all: 90, from 80 to 95."


def test_quality_is_drawn_per_variant_with_full_precision_as_the_reference() -> None:
    note, heading, accuracy, distance, rows, pairs = section(found_of(quality=quality())).blocks
    assert isinstance(note, Note)
    assert "5000 questions about 900 pictures" in note.text
    assert "without looking gives 30.0 %" in note.text
    assert heading == Heading(text="sample model")
    assert isinstance(accuracy, Figure)
    assert accuracy.drawing.text == (
        "In %. full precision: 90, from 89 to 91; rtn W3 g128: 89, from 88 to 90."
    )
    assert 'class="reference"' in accuracy.drawing.svg
    assert isinstance(distance, Figure)
    assert distance.drawing.text == "In nats. rtn W3 g128: 0.02, from 0.018 to 0.022."
    assert isinstance(rows, Table)
    assert rows.rows[1] == ("rtn W3 g128", "89.0 %", "88.0 to 90.0 %", *("0.02",) * 3, "89.0 %")
    assert isinstance(pairs, Table)
    assert pairs.rows == (
        (
            "rtn W3 g128 against full precision",
            "-1",
            "-2",
            "-0.1",
            "-0.01",
            "-0.02",
            "-0.001",
            "0.03",
        ),
    )


def test_the_stress_variant_is_called_synthetic() -> None:
    table: dict[str, Any] = quality()
    table["rows"] = [{**row, "variant": "stress"} for row in table["rows"]]
    figures = [b for b in section(found_of(quality=table)).blocks if isinstance(b, Figure)]
    assert all("synthetic outliers" in figure.title for figure in figures)


def test_other_seeds_and_draws_are_left_to_the_file() -> None:
    table: dict[str, Any] = quality()
    table["rows"].append({**table["rows"][1], "draw": 1})
    table["rows"].append({**table["rows"][1], "model": "seed1"})
    shown = [b for b in section(found_of(quality=table)).blocks if isinstance(b, Table)]
    assert len(shown[0].rows) == 2


def test_nothing_asked_is_nothing_measured() -> None:
    (missing,) = section(found_of(validation())).blocks
    assert isinstance(missing, Missing)
    assert "--tier task" in missing.why
    (empty,) = section(found_of(quality={"rows": []})).blocks
    assert empty == Missing(what="Accuracy", why="quality.json holds no rows")
