"""The published page is what its data say, and a dry run says of no time that it was measured."""

import copy
import json
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from mbq_export.errors import FormatError
from mbq_export.evaluate.kernel_plots import file_text, plots
from mbq_kernels.bench.document import TIMES, check_document, failures, json_text
from mbq_kernels.bench.page import page
from mbq_kernels.bench.summary import summary
from tests.kernels.emulated import ROOT

FOLDER = ROOT / "docs" / "benchmarks"
DOCUMENT = json.loads((FOLDER / "kernels.json").read_text())


def test_page_is_made_from_the_data_beside_it() -> None:
    files = {title: file for title, (file, _) in plots(DOCUMENT).items()}
    assert (FOLDER / "kernels.md").read_text() == page(DOCUMENT, files)
    assert all((FOLDER / file).is_file() for file in files.values())


def test_published_data_keep_their_schema_and_hold_no_wrong_answer() -> None:
    check_document(DOCUMENT)
    assert failures(DOCUMENT) == []
    assert (FOLDER / "kernels.json").read_text() == json_text(DOCUMENT)


def test_a_figure_is_published_only_with_the_card_it_was_measured_on() -> None:
    timed = [row for row in DOCUMENT["rows"] if row["timing"] is not None]
    if DOCUMENT["dry_run"]:
        assert not timed
        assert {line["status"] for line in DOCUMENT["targets"]} == {"not measured"}
        assert "Nothing on this page was timed" in (FOLDER / "kernels.md").read_text()
    else:
        assert timed
        assert DOCUMENT["device"]["name"].startswith("NVIDIA")
        assert DOCUMENT["software"]["library_sha256"]


def test_every_row_of_a_dry_run_has_a_reason_and_no_time() -> None:
    document = dry()
    rows = (*document["rows"], *document["rehearsal"]["rows"])
    assert rows
    assert all(row[key] is None for row in rows for key in TIMES)
    assert all(row["timing_why"] for row in rows)


def dry() -> dict[str, Any]:
    """The published data as a dry run has them, whatever they are today."""
    document = copy.deepcopy(DOCUMENT)
    if not document["dry_run"]:
        pytest.skip("the published data were measured")
    return document


def invented() -> dict[str, Any]:
    """The published plan with times that were made up here: what a measured page looks like."""
    document = dry()
    document |= {"dry_run": False}
    document["device"] = {**document["device"], "name": "Invented H100 HBM3"}
    for row in document["rows"]:
        us = 2 * row["predicted_us"]
        row["timing"] = {
            "launches": 50,
            "replays": 50,
            "median_us": us,
            "p10_us": us,
            "p90_us": 1.1 * us,
            "noisy": True,
            "drift_percent": 3.0,
            "drifting": True,
        }
        del row["timing_why"]
        row |= {"gb_s": 1000.0, "read_gb_s": 2000.0, "limit_us": 1.0, "percent_of_read": 50.0}
        row |= {"percent_of_datasheet": 30.0, "speedup": 1.5}
    document["ceilings"]["read"] = [
        {"bytes": size, "gb_s": 2000.0, "timing": None} for size in (5_000_000, 1 << 30)
    ]
    return document


def test_a_measured_page_shows_times_marks_and_plots() -> None:
    document = invented()
    files = {title: file for title, (file, _) in plots(document).items()}
    text = page(document, files)
    assert "Nothing on this page was timed" not in text
    assert "noisy: replays differ by more than 5 %; base drifted 3.0 % (more than 2)" in text
    assert "kernels-bandwidth.svg" in text
    assert len(files) == 1 + len(document["suite"]["shapes"])


def test_plots_are_files_of_their_own() -> None:
    for _, drawn in plots(invented()).values():
        root = ET.fromstring(file_text(drawn))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}style") is not None


def test_nothing_is_plotted_of_a_dry_run() -> None:
    assert plots(dry()) == {}


def test_an_ended_run_says_so() -> None:
    assert "This run ended early" in page({**invented(), "complete": False})


def test_a_summary_names_times_or_predictions_and_who_was_missing() -> None:
    planned, timed = summary(dry()), summary(invented())
    assert "predicted us" in planned[0]
    assert any("nothing was timed" in line for line in planned)
    assert "% read" in timed[0]
    for line in (*planned, *timed):
        assert "None" not in line
    assert any(line.startswith("not measured: hqq") for line in planned) or not DOCUMENT["absent"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: d.update(schema="x"), "another schema"),
        (lambda d: d.pop("rows"), "keys rows are missing or too many"),
        (lambda d: d["rows"][0].pop("config"), "a row lacks config"),
        (lambda d: d["rows"][0].pop("timing_why"), "neither a time nor a reason"),
        (lambda d: d["rows"][0].update(gb_s=1.0), "a dry run holds a time"),
    ],
)
def test_a_result_that_breaks_its_schema_is_refused(spoil: Any, words: str) -> None:
    document = dry()
    spoil(document)
    with pytest.raises(FormatError, match=words):
        check_document(document)


@pytest.mark.parametrize(
    ("why", "fails"),
    [
        ("wrong: 3 of 8", True),
        ("status -10. config illegal", True),
        ("AcceleratorError: illegal access", True),
        ("OutOfMemoryError: 13 GB", False),
    ],
)
def test_ours_must_be_right_everywhere_and_peers_need_not(why: str, fails: bool) -> None:
    document = invented()
    for row in document["rows"]:
        row["correct"] = True
    ours = next(row for row in document["rows"] if row["source"] == "cuda")
    peer = next(row for row in document["rows"] if row["source"] == "peer")
    for row in (ours, peer):
        row |= {"correct": None, "timing": None, "timing_why": why}
    what = f"{ours['entrant']} at {ours['n']}x{ours['k']}, M = {ours['m']}: {why}"
    assert failures(document) == ([what] if fails else [])
