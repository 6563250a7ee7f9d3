"""Ratios of bundles timed in turn; never of different models or different runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbq_export.bundle import Bundle
from mbq_export.evaluate.document import BAD, GOOD, UNSURE, Cell, Figure, Missing, Note, Table
from mbq_export.evaluate.gathering import gather
from mbq_export.evaluate.sections.comparison import section
from mbq_export.report import Report
from tests.evaluate.reported import benchmark, bundle_folder, found_of


def rows(report: Report) -> dict[str, dict[str, object]]:
    """Figure to column name to cell."""
    table = next(b for b in section(found_of(report)).blocks if isinstance(b, Table))
    return {str(row[1]): dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_a_ratio_says_how_many_times_as_fast() -> None:
    found = rows(benchmark())
    assert found["tpot"] == {
        "bundle": "w3",
        "figure": "tpot",
        "speedup": "2.00x",
        "beyond noise": Cell(text="faster", tone=GOOD),
        "p10": "2",
        "p90": "2",
        "p50 ms": "2",
        "baseline": "fp",
        "its p50 ms": "4",
        "workload": "pp10+tg4@1",
    }
    assert found["vit"]["beyond noise"] == Cell(text="no", tone=UNSURE)


def with_ratio(**ends: float) -> Report:
    report = benchmark()
    row = {**report.details["comparison"][0], **ends}
    return replace(report, details={**report.details, "comparison": [row]})


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.1, 1.3, Cell(text="faster", tone=GOOD)),
        (0.7, 0.9, Cell(text="slower", tone=BAD)),
        (0.9, 1.1, Cell(text="no", tone=UNSURE)),
    ],
)
def test_a_ratio_counts_where_most_turns_agree(low: float, high: float, verdict: Cell) -> None:
    (row,) = rows(with_ratio(ratio=1.0, ratio_p10=low, ratio_p90=high)).values()
    assert row["beyond noise"] == verdict


def test_ratios_are_drawn_on_a_figure_per_workload() -> None:
    figures = [b for b in section(found_of(benchmark())).blocks if isinstance(b, Figure)]
    assert [figure.title for figure in figures] == ["Speedup over fp, pp10+tg4@1"]
    assert "w3 tpot: 2, from 2 to 2" in figures[0].drawing.text


def compared(tmp_path: Path, **other: Any) -> list[object]:
    """Blocks of a benchmark of two bundles that are both given."""
    folders = {
        "fp": bundle_folder(tmp_path / "fp", facts={"seed": 1}),
        "w3": bundle_folder(tmp_path / "w3", **other),
    }
    bundles = {name: Bundle.open(folder) for name, folder in folders.items()}
    benchmark(bundles=bundles).write(tmp_path / "bench.json")
    return list(section(gather([*folders.values(), tmp_path / "bench.json"])).blocks)


def test_bundles_of_one_model_are_compared(tmp_path: Path) -> None:
    figure, table = compared(tmp_path)
    assert isinstance(figure, Figure)
    assert isinstance(table, Table)
    assert "2.00x" in {row[2] for row in table.rows}


def test_bundles_of_different_models_are_marked_and_not_divided(tmp_path: Path) -> None:
    (table,) = compared(tmp_path, shards={"model.safetensors": "e" * 64})
    assert isinstance(table, Table)
    for row in table.rows:
        assert row[2:6] == ("", Cell(text="other model", tone=UNSURE), "", "")
        assert row[6] != ""


def test_noisy_timings_are_called_noisy_beside_their_ratios() -> None:
    note = section(found_of(benchmark(reasons=("busy",)))).blocks[0]
    assert note == Note(text="The timings of bench.json are noisy.", tone=UNSURE)


def test_different_runs_are_not_divided() -> None:
    *_, note = section(found_of(benchmark(), benchmark(("fp",)))).blocks
    assert isinstance(note, Note)
    assert "not divided" in note.text


def test_one_bundle_alone_is_compared_with_nothing() -> None:
    (missing,) = section(found_of(benchmark(("w3",)))).blocks
    assert isinstance(missing, Missing)
    assert "mbq-export bench BASELINE BUNDLE" in missing.why
