"""``report``: forms on request, Markdown otherwise, and nothing half-written."""

from pathlib import Path

import pytest

from tests.command_line import run, tell
from tests.evaluate.reported import benchmark, bundle_folder, validation


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    folder = bundle_folder(tmp_path / "w3", report=validation())
    benchmark().write(tmp_path / "bench.json")
    return [folder, tmp_path / "bench.json"]


def test_every_form_that_is_asked_for_is_written(inputs: list[Path], tmp_path: Path) -> None:
    files = {form: tmp_path / f"report.{form}" for form in ("html", "md", "csv")}
    options = [word for form, path in files.items() for word in (f"--{form}", path)]
    ended = run("report", *inputs, *options, "--title", "Nightly")
    assert ended.status == 0
    assert ended.document["result"]["written"] == [str(path) for path in files.values()]
    assert ended.document["result"]["verdicts"] == [
        {"name": "w3", "headline": "All 3 checks passed, 1 not run", "tone": "good"},
        {"name": "bench.json", "headline": "Timings are valid", "tone": "good"},
    ]
    assert "<h1>Nightly</h1>" in files["html"].read_text()
    assert files["md"].read_text().startswith("# Nightly\n")
    assert files["csv"].read_text().startswith("source,subject,test,")


def test_without_a_form_markdown_goes_to_stdout(inputs: list[Path]) -> None:
    ended = tell("report", *inputs)
    assert ended.out.startswith("# mbq-export report\n")
    assert ended.out.endswith("OK  report  stdout\n")


def test_json_mode_prints_a_document_and_no_markdown(inputs: list[Path]) -> None:
    assert run("report", *inputs).document["result"]["written"] == []


@pytest.mark.parametrize("kind", ["missing", "folder of others", "text"])
def test_an_input_that_is_no_result_ends_with_4_and_writes_nothing(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "folder of others").mkdir()
    (tmp_path / "text").write_text("not json")
    ended = run("report", tmp_path / kind, "--html", tmp_path / "report.html")
    assert (ended.status, ended.code) == (4, "E4805")
    assert kind in ended.document["error"]["message"]
    assert not (tmp_path / "report.html").exists()


def test_a_report_of_nothing_is_a_wrong_call() -> None:
    assert run("report").code == "E2003"


def test_a_place_that_cannot_be_written_ends_with_5(inputs: list[Path], tmp_path: Path) -> None:
    ended = run("report", *inputs, "--html", tmp_path / "nowhere" / "report.html")
    assert (ended.status, ended.code) == (5, "E5008")
