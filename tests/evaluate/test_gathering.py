"""What is named must be readable; what lies inside a bundle and is not becomes a remark."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.errors import FormatError, IncompatibleError
from mbq_export.evaluate.gathering import CALIB, gather
from tests.evaluate.reported import benchmark, bundle_folder, quality, validation, write


def test_a_bundle_brings_its_parts_engines_and_results(tmp_path: Path) -> None:
    found = gather([bundle_folder(tmp_path / "w3", report=validation())])
    (subject,) = found.subjects
    assert subject.name == "w3"
    assert subject.part(CALIB, "data", "samples") == 128
    assert subject.part(CALIB, "nothing", 7) is None
    assert [built.folder for built in subject.engines] == ["rtx-1.7.1.116/sm89"]
    assert subject.engines[0].record["verified"] is False
    assert [(r.name, r.subject) for r in found.results] == [("w3/reports/validate.json", "w3")]
    assert found.remarks == ()


def test_files_and_folders_of_results_may_be_mixed(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    validation().write(results / "validate.json")
    write(results / "quality.json", quality())
    write(results / "notes.json", {"mine": True})
    benchmark().write(tmp_path / "bench.json")
    found = gather([tmp_path / "bench.json", results])
    assert [r.name for r in found.results] == ["bench.json", "results/validate.json"]
    assert [q.name for q in found.qualities] == ["results/quality.json"]
    (remark,) = found.remarks
    assert remark.name == "results/notes.json"
    assert "E4805" in remark.why


def test_the_same_result_given_twice_counts_once(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "w3", report=validation())
    found = gather([folder, folder / "reports" / "validate.json"])
    assert len(found.results) == 1


def test_bundles_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [bundle_folder(tmp_path / place / "out") for place in ("a", "b", "c")]
    assert [s.name for s in gather(folders).subjects] == ["out", "out (2)", "out (3)"]


def test_a_later_validation_belongs_to_its_bundle(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "w3", report=validation())
    sha256 = gather([folder]).subjects[0].bundle.sha256
    validation(worst=1.0, sha256=sha256).write(tmp_path / "validate.json")
    replace(validation(), context={"sha256": "f" * 64}).write(tmp_path / "other.json")
    found = gather([folder, tmp_path / "validate.json", tmp_path / "other.json"])
    own = found.validations_of(found.subjects[0])
    assert [result.name for result in own] == ["w3/reports/validate.json", "validate.json"]
    assert found.subject_of(sha256) is found.subjects[0]
    assert found.subject_of("f" * 64) is None


def test_a_damaged_part_of_a_bundle_becomes_a_remark(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "w3", report=validation())
    (folder / "reports" / "validate.json").write_text("{")
    path = folder / "calibration" / "sensitivity.json"
    path.write_bytes(b"x" * path.stat().st_size)
    found = gather([folder])
    assert [remark.name for remark in found.remarks] == [
        "w3/calibration/sensitivity.json",
        "w3/reports/validate.json",
    ]
    assert found.results == ()


def test_a_place_with_nothing_in_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"At .*missing there is nothing\.") as caught:
        gather([tmp_path / "missing"])
    assert caught.value.code == "E4805"
    with pytest.raises(FormatError, match=r"there is neither a manifest nor a result\."):
        gather([tmp_path])


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"mine\.json is not a result of ours") as caught:
        gather([write(tmp_path / "mine.json", {"schema": "other@1"})])
    assert caught.value.code == "E4805"


@pytest.mark.parametrize("kind", ["validate", "quality"])
def test_a_newer_schema_is_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "new.json", {"schema": f"mbq-export/{kind}@9", "rows": []})
    with pytest.raises(IncompatibleError, match=r"new\.json has schema") as caught:
        gather([path])
    assert caught.value.code == "E7004"
