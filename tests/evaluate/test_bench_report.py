"""The report of a benchmark, from requests whose times are known and a bundle that is real."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.bundle import Bundle
from mbq_export.evaluate import telemetry
from mbq_export.evaluate.bench_report import bench_report, comparison_rows, noise_error, rows
from mbq_export.evaluate.telemetry import Bandwidth
from mbq_export.report import Report
from tests.evaluate.requests_by_hand import QUIET, run
from tests.runtime.bundles import rounded_bundle
from tests.tiny import load_tiny

STEADY = (2.0, 2.02, 1.98)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    return rounded_bundle(folder / "bundle", load_tiny(folder / "model"))


@pytest.fixture
def report(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Two bundles at 1 GB/s: the machine's own rate would change from run to run."""
    rate = Bandwidth(size=1, threads=1, best_gb_s=1.0, passes_gb_s=(1.0,))
    monkeypatch.setattr(telemetry, "memory_bandwidth", lambda **_: rate)
    runs = [
        run("fp", steps=[2 * step for step in STEADY], bundle=bundle),
        run("w3", steps=STEADY, bundle=bundle),
    ]
    return bench_report(runs, details={"protocol": {"repetitions": 3}}, load=QUIET)


def test_quiet_figures_are_valid(report: Report) -> None:
    assert report.valid
    assert noise_error(report) is None
    assert report.details["noise"]["other_cpu_percent"] == pytest.approx(1.0)


def test_noise_makes_the_report_invalid_and_names_its_remedy(bundle: Bundle) -> None:
    busy = telemetry.Load(seconds=2.0, own=0.3, others=0.6)
    found = bench_report([run(bundle=bundle)], details={}, load=busy)
    assert not found.valid
    error = noise_error(found)
    assert error is not None
    assert error.code == "E1301"
    assert "other programs used 60 % of the CPUs" in error.message
    assert any("--allow-noisy" in fix for fix in error.fix)


def test_tables_hold_medians_rates_and_shares(report: Report) -> None:
    table = {(row[0], row[1]): row[2:] for row in rows(report)}
    assert table["w3", "vit@1"] == ("3", "3", "", "0", "", "")
    assert table["w3", "pp30"] == ("5", "5", "", "0", "6000", "")
    p50, _, p99, cov, rate, share = table["w3", "tg4"]
    assert (p50, p99, cov, rate) == ("2", "", "1", "500")
    step = report.details["runs"][1]["roofline"]["graph"]["bytes_per_token"]
    assert float(share) == pytest.approx(100 * 500 * step / 1e9, rel=0.01)


def test_ratios_are_in_a_table_of_their_own(report: Report) -> None:
    found = {row[1]: row for row in comparison_rows(report)}
    assert found["tpot"] == ("pp10+tg4@1", "tpot", "w3", "2", "4", "2.00x", "2.00 to 2.00")
    assert found["prefill"][5] == "1.00x"


def test_memory_is_what_loading_and_the_first_request_added(report: Report) -> None:
    assert report.details["runs"][0]["memory"] == {
        "kept_bytes": 100,
        "peak_growth_bytes": 150,
        "peak_rss_bytes": 1000,
    }


def test_the_file_of_the_reference_form_is_not_what_is_read(bundle: Bundle) -> None:
    (found,) = bench_report(
        [replace(run(bundle=bundle), lowering="reference")], details={}, load=QUIET
    ).details["runs"]
    assert found["roofline"]["graph"] is None
    assert "folds the functions" in found["roofline"]["graph_why"]
    assert found["roofline"]["packed"]["bytes_per_token"] > 0


def test_the_schema_names_its_keys(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "bench.json")
    found = Report.read(tmp_path / "bench.json")
    assert set(found.details) == {
        "bandwidth", "comparison", "env", "noise", "protocol", "quality",
        "quality_why", "runs"
    }  # fmt: skip
    assert set(found.details["runs"][0]) == {
        "name", "bundle", "workload", "phases", "ttft_ms", "itl_ms", "tpot_ms", "e2e_ms",
        "first_request", "tokens_per_second", "memory", "energy", "roofline", "noise"
    }  # fmt: skip
    assert set(found.details["runs"][0]["phases"]) == {
        "load", "preprocess", "vit", "merge", "prefill", "decode", "sample"
    }  # fmt: skip
