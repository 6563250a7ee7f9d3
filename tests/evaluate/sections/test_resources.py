"""Shares of the roofline, memory, sizes on disk, energy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mbq_export.evaluate.document import Figure, Missing, Section, Table
from mbq_export.evaluate.gathering import Found, gather
from mbq_export.evaluate.sections.resources import energy, memory, roofline
from mbq_export.report import Report
from tests.evaluate.reported import benchmark, bundle_folder, found_of

RUN = "w3, pp10+tg4@1"


def changed(**keys: Any) -> Found:
    """A benchmark of one bundle with some keys of its run replaced."""
    report: Report = benchmark(("w3",))
    (run,) = report.details["runs"]
    return found_of(replace(report, details={**report.details, "runs": [{**run, **keys}]}))


def numbers(found: Section, title: str) -> Table:
    figure = next(b for b in found.blocks if isinstance(b, Figure) and b.title == title)
    assert figure.numbers is not None
    return figure.numbers


def test_each_counting_is_a_bar_or_a_reason() -> None:
    found = roofline(found_of(benchmark(("w3",))))
    (row,) = numbers(found, "Share of the roofline").rows
    assert row == (RUN, "packed", "2 MB", "", "", "2000", "250", "25")
    assert found.blocks[-1] == Missing(
        what=f"{RUN}, the graph's own constants", why="the torch backend runs no graph"
    )


def test_no_benchmark_means_no_roofline() -> None:
    (missing,) = roofline(found_of()).blocks
    assert isinstance(missing, Missing)
    assert "no benchmark was given" in missing.why


def test_what_loading_adds_is_drawn_and_what_nobody_tells_is_said() -> None:
    rows = numbers(memory(changed()), "Memory that loading adds").rows
    assert rows == (("w3", "10 MB", "15 MB", "the system does not tell"),)


def test_a_bundle_is_loaded_once_for_all_its_workloads() -> None:
    report = benchmark(("w3",))
    (run,) = report.details["runs"]
    twice = replace(report, details={**report.details, "runs": [run, run]})
    assert len(numbers(memory(found_of(twice)), "Memory that loading adds").rows) == 1


def test_memory_that_shrank_is_drawn_as_nothing() -> None:
    found = memory(changed(memory={"kept_bytes": -5, "peak_growth_bytes": -2}))
    rows = numbers(found, "Memory that loading adds").rows
    assert rows == (("w3", "-5 B", "-2 B", "not recorded"),)


def test_memory_nobody_measured_is_a_table_of_reasons() -> None:
    found = memory(changed(memory={}))
    assert isinstance(found.blocks[0], Table)
    assert found.blocks[0].rows == (("w3", "not recorded", "not recorded", "not recorded"),)


def test_sizes_on_disk_are_those_of_the_manifest(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "w3")
    rows = numbers(memory(gather([folder])), "Size on disk").rows
    assert [row[1] for row in rows] == ["calibration", "engines", "onnx", "weights"]
    onnx = (folder / "onnx" / "mbq_export.json").stat().st_size
    assert rows[2] == ("w3", "onnx", f"{onnx} B")


def test_energy_is_a_number_or_a_reason() -> None:
    assert energy(changed()).blocks == (Missing(what="Energy", why="no energy counter is read"),)
    (table,) = energy(changed(energy={"joules_per_token": 0.5})).blocks
    assert isinstance(table, Table)
    assert table.rows == ((RUN, "0.5"),)
