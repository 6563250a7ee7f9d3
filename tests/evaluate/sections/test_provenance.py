"""One column per bundle; different models are marked."""

from pathlib import Path

from mbq_export.evaluate.document import UNSURE, Cell, Missing, Note, Table
from mbq_export.evaluate.gathering import gather
from mbq_export.evaluate.sections.provenance import section
from tests.evaluate.reported import benchmark, bundle_folder, found_of


def test_facts_stand_in_a_column_per_bundle(tmp_path: Path) -> None:
    found = gather([bundle_folder(tmp_path / "a"), bundle_folder(tmp_path / "b", layers=2)])
    (facts,) = section(found).blocks
    assert isinstance(facts, Table)
    assert facts.header == ("", "a", "b")
    rows = {row[0]: row[1:] for row in facts.rows}
    assert rows["model"] == ("tiny-llava-ov",) * 2
    assert rows["model weights"] == ("bbbbbbbbbbbb…",) * 2
    assert rows["number format"] == ("w3a16 g128 mbq",) * 2
    assert rows["command"] == ("mbq-export build --wbits 3",) * 2
    assert rows["finished"] == ("1970-01-01 00:00 UTC",) * 2
    assert "licence" not in rows


def test_a_fact_that_only_one_bundle_has_is_said_to_be_missing_elsewhere(tmp_path: Path) -> None:
    licensed = {"source": {"model": "m", "license": "apache-2.0"}}
    found = gather([bundle_folder(tmp_path / "a", facts=licensed), bundle_folder(tmp_path / "b")])
    facts = section(found).blocks[0]
    assert isinstance(facts, Table)
    assert ("licence", "apache-2.0", "not recorded") in facts.rows


def test_other_models_are_marked(tmp_path: Path) -> None:
    other = bundle_folder(tmp_path / "b", model="other", shards={"model.safetensors": "e" * 64})
    facts, note = section(gather([bundle_folder(tmp_path / "a"), other])).blocks
    assert isinstance(facts, Table)
    assert facts.rows[0] == (
        "model",
        "tiny-llava-ov",
        Cell(text="other (other model)", tone=UNSURE),
    )
    assert isinstance(note, Note)
    assert "no differences between them are computed" in note.text


def test_the_machine_that_measured_is_described() -> None:
    missing, machine = section(found_of(benchmark())).blocks
    assert isinstance(missing, Missing)
    assert isinstance(machine, Table)
    rows = dict(machine.rows)
    assert rows["CPU"] == "Test CPU, 2 CPUs"
    assert rows["GPU"] == "none: none"
    assert rows["memory"] == "8.59 GB"
