"""`report`: which file gets which form, and what it cannot be made of."""

from pathlib import Path

import pytest

from tests.command_line import run, tell


def test_without_an_option_markdown_goes_to_standard_output(bundle: Path) -> None:
    outcome = tell("report", bundle, "--title", "My bundle")
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == "# My bundle"
    assert lines[-1] == "OK  report  stdout"


def test_each_option_writes_its_own_form(bundle: Path, tmp_path: Path) -> None:
    names = {"--html": "r.html", "--md": "r.md", "--csv": "r.csv"}
    line = [word for option, name in names.items() for word in (option, tmp_path / name)]
    outcome = run("report", bundle, *line)
    assert outcome.status == 0, outcome.err
    assert outcome.document["result"]["written"] == [
        str(tmp_path / name) for name in names.values()
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.html", "r.md"]
    assert "<html" in (tmp_path / "r.html").read_text()[:200]
    assert "#" in (tmp_path / "r.md").read_text()[:2]


def test_json_mode_prints_a_document_and_no_markdown(bundle: Path) -> None:
    assert run("report", bundle).document["result"]["written"] == []


@pytest.mark.parametrize("kind", ["missing", "folder of others", "text"])
def test_input_that_is_no_result_is_named(model: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "notes.txt").write_text("not json")
    path = {"missing": tmp_path / "no", "folder of others": model, "text": tmp_path / "notes.txt"}
    outcome = run("report", path[kind], "--md", tmp_path / "r.md")
    assert (outcome.status, outcome.code) == (4, "E4805")
    assert path[kind].name in outcome.document["error"]["message"]
    assert not (tmp_path / "r.md").exists()


def test_place_that_cannot_be_written_is_named(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = tell("report", bundle, "--html", tmp_path / "file" / "r.html")
    assert outcome.status == 5
    assert outcome.err.splitlines()[-1].startswith("FAILED  report  MBQ-E5008  Cannot write ")


def test_report_of_nothing_is_a_usage_error() -> None:
    assert run("report").code == "E2003"
