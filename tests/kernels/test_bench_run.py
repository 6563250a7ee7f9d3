"""A whole run under a clock whose times are written down, on the emulated kernels: parts, order, what an ended run leaves."""

from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from mbq_kernels.bench import ceilings
from mbq_kernels.bench import run as bench_run
from mbq_kernels.bench.document import check_document
from mbq_kernels.bench.page import page
from mbq_kernels.bench.run import Request, run
from mbq_kernels.bench.shapes import REHEARSAL_BLOCK, Shape, Suite
from tests.kernels.emulated_linear import Emulator
from tests.kernels.fake_clock import FakeClock, fake_rig

SUITE = Suite(name="tiny", shapes=(Shape(n=32, k=128),), rows=(1, 9))
DECODED = {"shape": {}, "rows": []}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Stands in for a GPU: its clock, its rig, and the two parts whose sizes only a GPU holds."""
    clock = FakeClock(repeat(5.0))
    rig = fake_rig(clock, library=Emulator.unbroken().library)
    rig.ceilings.large_bytes = 1 << 12
    monkeypatch.setattr(ceilings, "copies_for", lambda *_: 1)
    monkeypatch.setattr(bench_run, "open_rig", lambda *_, **__: rig)
    monkeypatch.setattr(bench_run, "LLAVA_OV_7B", REHEARSAL_BLOCK)
    monkeypatch.setattr(bench_run, "time_decode", lambda _: DECODED)
    return clock


def test_a_run_measures_ceilings_rows_chain_and_decode_in_this_order(clock: FakeClock) -> None:
    kept: list[tuple[bool, bool, bool]] = []
    result = run(
        Request(suite=SUITE, peers="none"),
        keep=lambda r: kept.append((bool(r["rows"]), bool(r["chain"]), r["decode"] is not None)),
    )
    assert kept == [(True, False, False), (True, True, False), (True, True, True)]
    assert check_document(result)["complete"] is True
    reads = {read["bytes"]: read["gb_s"] for read in result["ceilings"]["read"]}
    assert reads[1 << 12] == pytest.approx((1 << 12) / 5.0 / 1e3)
    assert {line["source"] for line in result["absent"]} == {"triton"}
    assert set(result["sensors"]) == {"before", "after_rows", "after_chain", "after_decode"}
    assert "ended early" not in page(result)


def test_every_row_has_its_limits_and_its_prediction_beside_it(clock: FakeClock) -> None:
    result = run(Request(suite=SUITE, peers="none"))
    ours = [row for row in result["rows"] if row["source"] == "cuda"]
    assert {(row["n"], row["m"]) for row in ours} == {(32, 1), (32, 9)}
    for row in ours:
        assert row["correct"] is True
        # A read of that size took as long; sizes are rounded down to 16 bytes.
        assert row["limit_us"] == pytest.approx(5.0, rel=0.02)
        assert row["percent_of_read"] == pytest.approx(100.0, rel=0.02)
        assert row["speedup"] == pytest.approx(1.0)
        assert row["predicted_us"] > 2.0
        assert row["timing"]["launches"] == 50
    chain = next(row for row in result["chain"] if row["entrant"] == "CUDA w3a16 g128")
    assert chain["token_ms"] == pytest.approx(4 * 5.0 / 1e3)


def test_a_run_that_ends_early_leaves_what_it_measured(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ended(*_: object) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_run, "time_chain", ended)
    kept: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        run(Request(suite=SUITE, peers="none"), keep=kept.append)
    assert kept[-1]["rows"]
    assert kept[-1]["complete"] is False
    assert "This run ended early" in page(kept[-1])
