"""Figures from requests whose times are known."""

from dataclasses import replace

import pytest

from mbq_export.evaluate import telemetry
from mbq_export.evaluate.figures import comparison, decode_cov, noise_reasons, percent
from tests.evaluate.requests_by_hand import QUIET, request, run


def test_phases_have_one_sample_per_request_or_per_token() -> None:
    one = run(steps=(2.0, 2.0, 4.0))
    counts = {
        name: len(one.measurement(name).samples)
        for name in ("vit", "prefill", "decode", "sample", "ttft", "itl", "tpot")
    }
    assert counts == {
        "vit": 3, "prefill": 3, "decode": 9, "sample": 12, "ttft": 3, "itl": 9, "tpot": 3
    }  # fmt: skip
    assert one.measurement("tpot").samples == (2.0, 2.0, 4.0)
    assert one.measurement("decode").name == "w3/pp10+tg4@1/decode"


def test_what_the_workload_lacks_says_so() -> None:
    blind = run(visual=0)
    assert blind.measurement("vit").value is None
    assert blind.measurement("vit").why == "the workload has no picture"
    single = run(output=1)
    assert single.measurement("tpot").why == "a single token was generated"
    assert single.rates()["decode"] is None
    assert single.rates()["decode_why"] == "a single token was generated"


def test_rates_are_tokens_through_medians() -> None:
    rates = run(steps=(2.0, 2.0, 4.0)).rates()
    assert rates["prefill"] == pytest.approx(1000 * 30 / 5)
    assert rates["decode"] == pytest.approx(500)
    assert rates["e2e"] == pytest.approx(1000 * 4 / (10 + 3 * 2))


def test_the_context_of_a_step_is_the_mean_over_all_steps() -> None:
    assert run().context == 10 + 20 + 4 / 2


def test_ratios_are_taken_turn_by_turn() -> None:
    base, other = run("fp", steps=(4.0, 8.0, 100.0)), run("w3", steps=(2.0, 4.0, 50.0))
    (tpot,) = [row for row in comparison([base, other]) if row["figure"] == "tpot"]
    assert tpot["ratio"] == pytest.approx(2.0)
    assert (tpot["ratio_p10"], tpot["ratio_p90"]) == (pytest.approx(2.0), pytest.approx(2.0))
    assert (tpot["baseline_p50_ms"], tpot["bundle_p50_ms"]) == (8.0, 4.0)
    assert (tpot["baseline"], tpot["bundle"]) == ("fp", "w3")


def test_every_workload_is_compared_within_itself() -> None:
    runs = [run("fp"), run("w3"), run("fp", visual=0), run("w3", visual=0)]
    rows = comparison(runs)
    assert {row["workload"] for row in rows} == {"pp10+tg4@1", "pp10+tg4@0"}
    assert not [r for r in rows if r["workload"].endswith("@0") and r["figure"] == "vit"]


def test_one_bundle_is_compared_with_nothing() -> None:
    assert comparison([run()]) == []


def test_quiet_figures_have_no_reason_against_them() -> None:
    assert noise_reasons([run(steps=(2.0, 2.02, 1.98))], QUIET) == []


def test_a_spread_beyond_the_limit_is_named_with_its_bundle() -> None:
    (reason,) = noise_reasons([run(steps=(2.0, 2.0, 3.0))], QUIET)
    assert reason == "w3 pp10+tg4@1: decode times of requests vary by 24.7 % (limit 5 %)"


def test_other_programs_are_named_as_a_reason() -> None:
    busy = telemetry.Load(seconds=1.0, own=0.4, others=0.25)
    (reason,) = noise_reasons([run()], busy)
    assert reason == "other programs used 25 % of the CPUs (limit 10 %)"
    assert noise_reasons([run()], replace(busy, others=None)) == []


def test_one_request_has_no_spread() -> None:
    assert decode_cov(replace(run(), requests=(request(),))) is None
    assert (percent(None), percent(0.5)) == (None, 50.0)
