"""The quality benchmark on a few pictures: cells are measured once, kept, and read back for the page."""

import json
from pathlib import Path

import numpy as np
import pytest

from docs.benchmarks import quality
from docs.benchmarks.quality import WEIGHTS, main, trained
from docs.benchmarks.quality_cells import (
    FORMATS,
    SHIPPED,
    Cell,
    Setting,
    Store,
    all_cells,
    chosen,
    code_of,
    facts_of,
)
from docs.benchmarks.quality_run import Bench

SMALL = ["--images", "6", "--samples", "4", "--draws", "1", "--methods", "mbq"]
ONLY = ["--only", "variant=plain", "format=fp,w3-g128"]


@pytest.fixture(autouse=True)
def few_blind_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "BLIND_SCENES", 100)


def test_a_run_goes_on_where_it_was_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    main([*SMALL, *places, *ONLY, "method=fp,rtn"])
    assert measured(capsys) == ["fp", "rtn"]
    main([*SMALL, *places, *ONLY])
    assert measured(capsys) == ["mbq"]
    main([*SMALL, *places, "--page-only"])
    assert measured(capsys) == []
    document = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert [row["method"] for row in document["rows"]] == ["fp", "rtn", "mbq"]
    assert {(pair["method"], pair["against"]) for pair in document["pairs"]} == {
        ("rtn", "fp"),
        ("mbq", "fp"),
        ("mbq", "rtn"),
    }
    assert document["rows"][0]["kl"]["answer"]["mean"]["value"] == pytest.approx(0, abs=1e-9)
    assert document["rows"][1]["kl"]["answer"]["mean"]["value"] > 1e-5
    assert document["not_measured"]
    assert "not measured" in (tmp_path / "out" / "quality.md").read_text()


def measured(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    return [line.split("_")[3] for line in lines]


def test_no_cell_begins_when_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    main([*SMALL, *places, *ONLY, "--limit-minutes", "0"])
    assert "time is over: 3 cells" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kept_gradients_give_the_weights_that_measured_ones_give(tmp_path: Path) -> None:
    setting = Setting(images=1, seed=6, samples=4)
    bench = Bench({SHIPPED: trained(WEIGHTS)}, setting, work=tmp_path / "work", scratch=tmp_path)
    cell = Cell(model=SHIPPED, variant="plain", format="w3-g128", method="mbq")
    first = bench.quantized(cell).module.state_dict()
    (kept,) = (tmp_path / "work").rglob("*.json")
    changed = kept.stat().st_mtime_ns
    again = bench.quantized(cell).module.state_dict()
    assert kept.stat().st_mtime_ns == changed
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_the_most_telling_cells_come_first() -> None:
    cells = all_cells([SHIPPED, "seed1"], draws=2, methods=["mbq"])
    place = {cell: number for number, cell in enumerate(cells)}

    def at(model: str, variant: str, form: str, draw: int = 0) -> int:
        return place[Cell(model=model, variant=variant, format=form, method="mbq", draw=draw)]

    assert cells[0] == Cell(model=SHIPPED, variant="plain", format="fp", method="fp")
    order = [
        at(SHIPPED, "plain", "w3-g128"),
        at(SHIPPED, "plain", "w3-g64"),
        at(SHIPPED, "stress", "w3-g128"),
        at(SHIPPED, "plain", "w4-g128"),
        at("seed1", "plain", "w3-g128"),
        at(SHIPPED, "plain", "w3-g128", 1),
        at("seed1", "stress", "w4-g128"),
        at(SHIPPED, "stress", "w4-g128", 1),
    ]
    assert order == sorted(order)
    assert len(place) == len(cells)
    assert Cell(model="seed1", variant="plain", format="w3-g128", method="mbq", draw=1) not in place


def test_smoothquant_is_measured_where_activations_are_rounded() -> None:
    cells = all_cells([SHIPPED], draws=1, methods=["smoothquant"])
    formats = {cell.format for cell in cells if cell.method == "smoothquant"}
    assert formats == {name for name in FORMATS if "a8" in name and FORMATS[name].registered}


def test_filters_name_fields_and_values() -> None:
    cells = all_cells([SHIPPED], draws=2, methods=["awq", "mbq"])
    kept = chosen(cells, ["method=mbq,awq", "draw=1", "variant=stress", "format=w3-g64"])
    assert {(cell.method, cell.draw) for cell in kept} == {("mbq", 1), ("awq", 1)}
    with pytest.raises(ValueError, match="no field"):
        chosen(cells, ["colour=red"])


def test_a_cell_depends_on_its_own_method_and_format_only() -> None:
    hashes = {code_of("w3-g128", method) for method in ("rtn", "awq", "mbq", "gptq", "mbq+")}
    assert len(hashes) == 5
    assert code_of("w3-g128", "mbq") == code_of("w3-g64", "mbq") != code_of("w4-g128", "mbq")


def test_cells_of_other_sources_are_taken_on_request_only(tmp_path: Path) -> None:
    setting = Setting(images=2, seed=6, samples=4)
    models = {SHIPPED: trained(WEIGHTS)}
    cell = Cell(model=SHIPPED, variant="plain", format="fp", method="fp")
    facts = facts_of(cell, models[SHIPPED], setting)
    paper = Bench(models, setting, work=tmp_path, scratch=tmp_path).paper(cell)
    Store(tmp_path / "cells").write({**facts, "code": "older"}, paper)
    assert Store(tmp_path / "cells").find(facts) is None
    found = Store(tmp_path / "cells", any_code=True).find(facts)
    assert found is not None
    assert Store.facts(found)["code"] == "older"
    assert np.array_equal(Store.read(found).correct, paper.correct)
    other = facts_of(cell, models[SHIPPED], Setting(images=3, seed=6, samples=4))
    assert Store(tmp_path / "cells", any_code=True).find(other) is None
