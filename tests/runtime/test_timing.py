"""The clock of a request and the figures made of it."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from mbq_export.runtime import timing
from mbq_export.runtime.timing import Clock, RequestStatistics, peak_rss_bytes, statistics_of


def cost(itl_ms: tuple[float, ...] = (2.0, 4.0)) -> RequestStatistics:
    return RequestStatistics(
        visual_tokens=78,
        prompt_tokens=12,
        output_tokens=1 + len(itl_ms),
        preprocess_ms=1.0,
        vision_ms=2.0,
        merge_ms=0.5,
        prefill_ms=5.0,
        decode_ms=itl_ms,
        sample_ms=(0.1,) * (1 + len(itl_ms)),
        ttft_ms=9.0,
        itl_ms=itl_ms,
        peak_rss_bytes=1_250_000_000,
    )


def test_rates_follow_from_the_gaps() -> None:
    assert cost().tpot_ms == 3.0
    assert cost().tokens_per_second == pytest.approx(1000 / 3)
    assert cost().e2e_ms == 15.0


def test_one_line_says_it_all() -> None:
    assert cost().line() == (
        "visual 78 · prompt 12 · out 3 · TTFT 9 ms · 333.3 tok/s · peak 1.2 GB"
    )


def test_a_single_token_has_no_rate_and_says_why() -> None:
    single = cost(())
    assert single.line() == "visual 78 · prompt 12 · out 1 · TTFT 9 ms · peak 1.2 GB"
    found = single.as_json()
    assert found["tpot_ms"] is None
    assert found["tpot_ms_why"] == "a single token was generated"
    json.dumps(found, allow_nan=False)


def test_the_first_gap_holds_what_was_spent_on_preparing() -> None:
    clock = Clock(preprocess_ms=250.0)
    clock.token()
    found = statistics_of(clock, visual_tokens=0, prompt_tokens=1)
    assert 250 <= found.ttft_ms < 300
    assert found.preprocess_ms == 250.0


def test_a_lap_lasts_as_long_as_what_it_surrounds() -> None:
    clock = Clock()
    with clock.lap("decode"):
        time.sleep(0.02)
    assert 20 <= clock.laps["decode"][0] < 60


def test_the_peak_follows_a_large_array() -> None:
    before = peak_rss_bytes()
    assert before is not None
    block = np.ones(max(before, 1 << 28) // 8 + (1 << 24), np.float64)
    after = peak_rss_bytes()
    assert after is not None
    assert after >= block.nbytes
    resident = timing.rss_bytes()
    assert resident is not None
    assert resident <= after


def test_without_the_kernels_status_the_peak_is_the_usage_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SELF_STATUS", str(tmp_path / "none"))
    assert timing.rss_bytes() is None
    peak = peak_rss_bytes()
    assert peak is not None
    assert peak > 10e6
