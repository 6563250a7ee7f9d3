"""Times of runs whose steps take 4 ms and 2 ms."""

from dataclasses import replace
from typing import Any

import pytest

from mbq_export.evaluate.document import (
    GOOD,
    UNSURE,
    Figure,
    Heading,
    Missing,
    Note,
    Section,
    Table,
)
from mbq_export.evaluate.sections.latency import section, split_name
from tests.evaluate.reported import benchmark, found_of

RUN = "pp10+tg4@1"


def figures(found: Section) -> dict[str, Figure]:
    return {block.title: block for block in found.blocks if isinstance(block, Figure)}


def test_phases_are_stacked_and_decoding_counts_every_step() -> None:
    numbers = figures(section(found_of(benchmark())))["Where the time of a request goes"].numbers
    assert numbers is not None
    # Three steps after the first of four tokens, 4 ms and 2 ms each.
    assert numbers.rows == (
        (f"fp, {RUN}", "1", "3", "0.5", "5", "12", "21.5"),
        (f"w3, {RUN}", "1", "3", "0.5", "5", "6", "15.5"),
    )


def test_a_phase_that_some_run_lacks_keeps_its_place() -> None:
    report = benchmark()
    first, second = report.details["runs"]
    blind = {**first, "phases": {**first["phases"], "vit": None}}
    found = section(found_of(replace(report, details={**report.details, "runs": [blind, second]})))
    numbers = figures(found)["Where the time of a request goes"].numbers
    assert numbers is not None
    assert numbers.header[1:4] == ("preprocess ms", "vit ms", "merge ms")
    assert numbers.rows[0][2] == ""


def test_percentiles_have_a_curve_per_run() -> None:
    drawing = figures(section(found_of(benchmark())))["Gaps between tokens"].drawing
    assert drawing.text == f"fp, {RUN}: 51 values from 4 to 4; w3, {RUN}: 51 values from 2 to 2."


def test_the_table_has_a_row_per_figure_with_its_rate() -> None:
    table = next(b for b in section(found_of(benchmark())).blocks if isinstance(b, Table))
    rows = {row[:3]: row[3:] for row in table.rows}
    p10, p50, p90, p95, p99, cov, count, rate = rows["w3", RUN, "tpot"]
    assert (p10, p50, p90, p95, p99) == ("2", "2", "2", "2", "")
    assert (cov, count, rate) == ("0", "3", "500")
    assert rows["w3", RUN, "prefill"][-1] == "6000"


@pytest.mark.parametrize(
    ("reasons", "start", "tone"),
    [
        ((), "Valid. 3 requests each after 1", GOOD),
        (("busy",), "Noisy, for the reasons below. 3 requests", UNSURE),
    ],
)
def test_validity_stands_first(reasons: tuple[str, ...], start: str, tone: str) -> None:
    note = section(found_of(benchmark(reasons=reasons))).blocks[0]
    assert isinstance(note, Note)
    assert note.text.startswith(start)
    assert note.tone == tone


def test_time_to_the_first_token_is_drawn_where_workloads_differ_in_visual_tokens() -> None:
    report = benchmark(("w3",))
    (run,) = report.details["runs"]
    assert "Time to the first token" not in figures(section(found_of(report)))
    other: dict[str, Any] = {
        **run,
        "workload": {**run["workload"], "visual_tokens": 40},
        "ttft_ms": {"p50_ms": 14.0},
    }
    both = replace(report, details={**report.details, "runs": [other, run]})
    drawing = figures(section(found_of(both)))["Time to the first token"].drawing
    assert drawing.text == "w3: 10 at 20, 14 at 40."


def test_results_of_different_runs_are_kept_apart() -> None:
    blocks = section(found_of(benchmark(), benchmark(("w4", "w3")))).blocks
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    assert headings == ["bench.json", "bench1.json"]


def test_a_benchmark_without_runs_is_said_to_hold_none() -> None:
    report = replace(benchmark(), details={"runs": []})
    assert section(found_of(report)).blocks == (
        Missing(what="Latency", why="bench.json holds no runs"),
    )


def test_one_token_has_no_gaps() -> None:
    report = benchmark()
    kept = tuple(m for m in report.measurements if not m.name.endswith(("itl", "tpot", "decode")))
    missing = [
        block
        for block in section(found_of(replace(report, measurements=kept))).blocks
        if isinstance(block, Missing)
    ]
    assert [block.what for block in missing] == ["Gaps between tokens"]


def test_names_of_bundles_may_hold_slashes() -> None:
    assert split_name("a/b/pp1+tg2@0/itl") == ("a/b", "pp1+tg2@0", "itl")
