"""Statistics, measurements, checks and reports, with numbers a pencil can check."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbq_export.errors import FormatError, IncompatibleError
from mbq_export.report import (
    Check,
    Measurement,
    Report,
    Statistics,
    diagnostic,
    nullable,
    plain_json,
    shown,
)


def report() -> Report:
    return Report(
        kind="validate",
        measurements=(
            Measurement.of_samples("w3/decode", [4.0, 1.0, 2.0], unit="ms"),
            Measurement(name="energy", value=None, unit="j", why="no counter"),
        ),
        checks=(
            Check(name="parity.cosine", ok=True, tier="numeric", value=1.0, threshold=0.9999),
            Check(name="parity.norm", ok=False, value=math.nan, threshold=1e-3, why="layer 2"),
            Check(name="quality.kl", ok=None, why="no full-precision model"),
        ),
        context={"bundle": "w3"},
        details={"first_bad": {"layer": 2}},
    )


def test_statistics_of_five_numbers() -> None:
    found = Statistics.of([1, 2, 3, 4, 10])
    assert (found.count, found.mean, found.median) == (5, 4.0, 3.0)
    assert (found.lowest, found.highest) == (1.0, 10.0)
    assert found.stdev == pytest.approx(math.sqrt(50 / 4))
    assert found.cov_percent == pytest.approx(100 * math.sqrt(50 / 4) / 4)
    assert found.percentiles[90] == pytest.approx(4 + 0.6 * 6)  # linear between ranks 3 and 4


def test_the_99th_percentile_needs_100_samples() -> None:
    few = Statistics.of([1.0] * 99).as_json("ms")
    assert few["p99_ms"] is None
    assert few["p99_ms_why"] == "99 samples, needs 100"
    many = Statistics.of([1.0] * 100).as_json("ms")
    assert many["p99_ms"] == 1.0
    assert "p99_ms_why" not in many


def test_one_sample_has_no_spread_and_says_so() -> None:
    found = Statistics.of([7.0]).as_json("ms")
    assert (found["mean_ms"], found["min_ms"], found["p50_ms"]) == (7.0, 7.0, 7.0)
    assert found["stdev_ms"] is None
    assert found["stdev_ms_why"] == "one sample has no spread"
    assert found["cov_percent"] is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=150))
def test_percentiles_are_ordered_and_within_the_samples(samples: list[float]) -> None:
    found = Statistics.of(samples)
    ladder = [value for value in found.percentiles.values() if value is not None]
    assert ladder == sorted(ladder)
    assert found.lowest <= ladder[0]
    assert ladder[-1] <= found.highest


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_what_cannot_be_summarised_is_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot summarise"):
        Statistics.of(samples)


def test_a_measurement_needs_a_value_or_a_reason() -> None:
    with pytest.raises(ValueError, match="neither a value nor a reason"):
        Measurement(name="x", value=None)
    with pytest.raises(ValueError, match="x is nan"):
        Measurement(name="x", value=math.nan)
    with pytest.raises(ValueError, match="x has a sample that is not finite"):
        Measurement(name="x", value=1.0, samples=(1.0, math.inf))
    assert Measurement.of_samples("x", [], unit="ms", why="nothing ran").entry() == {
        "x_ms": None,
        "x_ms_why": "nothing ran",
    }


def test_the_unit_ends_the_key_and_the_median_stands_for_samples() -> None:
    found = Measurement.of_samples("w3/tg32/decode", [9, 1, 2], unit="ms")
    assert found.entry() == {"decode_ms": 2.0}
    assert Measurement(name="ratio", value=2).entry() == {"ratio": 2}


def test_a_check_that_was_not_run_says_why_and_fails_nothing() -> None:
    with pytest.raises(ValueError, match="does not say why"):
        Check(name="x", ok=None)
    skipped = Report(kind="validate", checks=(Check(name="x", ok=None, why="no data"),))
    assert skipped.passed
    entry = skipped.as_json()["checks"][0]
    assert (entry["pass"], entry["run"], entry["why"]) == (False, False, "no data")


def test_one_failed_check_fails_the_report() -> None:
    assert not report().passed
    assert report().check_rows() == [
        ("numeric", "parity.cosine", "", "1", "0.9999", "pass"),
        ("", "parity.norm", "", "nan", "0.001", "FAIL"),
        ("", "quality.kl", "", "", "", "not run"),
    ]


def test_measurements_are_found_by_name() -> None:
    assert report()["w3/decode"].value == 2.0
    with pytest.raises(KeyError):
        report()["w4/decode"]


def test_a_written_report_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "validate.json"
    report().write(path)
    found = Report.read(path)
    assert found.as_json() == json.loads(path.read_text()) == report().as_json()
    assert found["w3/decode"] == report()["w3/decode"]
    assert math.isnan(found.checks[1].value or 0)


def test_json_holds_the_schema_and_what_the_kind_adds() -> None:
    found = report().as_json()
    assert found["schema"] == "mbq-export/validate@1"
    assert found["first_bad"] == {"layer": 2}
    assert (found["valid"], found["pass"]) == (True, False)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"schema": "other/thing@1"}',
        '{"schema": "mbq-export/bench@1"}',
        '{"schema": "mbq-export/bench@1", "valid": true, "context": {}, "measurements": [3], "checks": []}',
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "strange.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"strange.json is not a result of ours") as caught:
        Report.read(path)
    assert caught.value.code == "E4805"


@pytest.mark.parametrize("samples", [["fast"], [[1]], [1e999], 7, None], ids=str)
def test_samples_that_are_no_numbers_make_a_damaged_result(samples: object) -> None:
    found = report().as_json()
    found["measurements"][0]["samples"] = samples
    with pytest.raises(FormatError) as caught:
        Report.from_json(found)
    assert caught.value.code == "E4805"


def test_a_newer_schema_is_left_to_the_release_that_knows_it(tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    path.write_text(json.dumps(report().as_json() | {"schema": "mbq-export/validate@2"}))
    with pytest.raises(IncompatibleError, match=r"schema mbq-export/validate@2") as caught:
        Report.read(path)
    assert caught.value.code == "E7004"


def test_nan_and_numpy_values_become_plain() -> None:
    found = plain_json({"a": (np.float32(0.5), np.int64(3)), 7: np.array([1.0, np.nan])})
    assert found == {"a": [0.5, 3], "7": [1.0, "nan"]}
    assert [diagnostic(x) for x in (math.inf, -math.inf, 2.0, None)] == ["inf", "-inf", 2.0, None]


def test_missing_numbers_are_empty_cells_and_explained_nulls() -> None:
    assert (shown(None), shown(0.123456), shown(1234567)) == ("", "0.1235", "1.235e+06")
    assert nullable("x_ms", 0, why="-") == {"x_ms": 0}
