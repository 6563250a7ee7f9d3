"""The machine while it is measured."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from mbq_export.evaluate import telemetry
from mbq_export.evaluate.telemetry import Bandwidth, LoadMeter, MemoryMeter


def test_reading_a_buffer_gives_a_rate_of_this_world() -> None:
    found = Bandwidth.measure(8 << 20, threads=1, passes=2)
    assert found.size == 8 << 20
    assert len(found.passes_gb_s) == 2
    assert 0.05 < found.best_gb_s == max(found.passes_gb_s) < 5000


def test_a_tiny_buffer_is_rounded_up_to_what_can_be_timed() -> None:
    found = Bandwidth.measure(1, threads=2, passes=1)
    assert found.size == 2 * telemetry.SMALLEST_SHARE


def test_reading_twice_as_much_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is bytes over time: with the search stubbed to a fixed pause, it follows the size."""
    monkeypatch.setattr(telemetry, "_memchr", lambda: lambda *_: time.sleep(0.02))
    monkeypatch.setattr(telemetry, "PIECE", 1)
    small, large = (Bandwidth.measure(size, threads=1, passes=1) for size in (1 << 20, 2 << 20))
    assert large.best_gb_s == pytest.approx(2 * small.best_gb_s, rel=0.5)


def test_memory_is_read_with_a_buffer_beyond_every_cache() -> None:
    found = telemetry.memory_bandwidth(threads=1)
    assert found.size >= telemetry.SMALLEST_BUFFER
    assert found.size >= telemetry.CACHES * (telemetry.last_cache_bytes() or 0)


def test_the_meter_sees_this_process_work() -> None:
    meter = LoadMeter()
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    found = meter.read()
    assert found.own > 0
    assert found.seconds >= 0.1
    assert found.others is None or found.others >= 0


def test_the_share_of_others_is_what_the_kernel_counts_beyond_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(telemetry, "SYSTEM_STAT", str(stat))
    stat.write_text("cpu  100 0 0 500 0 0 0 0 0 0\ncpu0 100 0 0 500 0 0 0 0 0 0\n")
    meter = LoadMeter()
    time.sleep(0.1)
    stat.write_text("cpu  1100 0 0 500 0 0 0 0 0 0\ncpu0 1100 0 0 500 0 0 0 0 0 0\n")
    found = meter.read()
    assert found.others is not None
    assert found.others > 10  # 10 s of work in a tenth of a second: more than any machine has
    stat.unlink()
    assert meter.read().others is None


def test_memory_that_work_keeps_and_memory_it_only_needs_are_told_apart() -> None:
    meter = MemoryMeter()
    kept = np.ones(8 << 20, np.float64)
    temporary = np.ones(16 << 20, np.float64)
    del temporary
    found = meter.read()
    assert found.kept is not None
    assert kept.nbytes * 0.9 < found.kept < kept.nbytes * 2
    if found.peak is not None:  # a sandbox may not let a process reset its peak
        assert found.peak > 2.5 * kept.nbytes


def test_without_a_reset_there_is_no_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "RESET_PEAK", str(tmp_path / "no" / "such"))
    assert MemoryMeter().read().peak is None


def test_the_largest_cache_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "CACHE_FOLDER", str(tmp_path))
    assert telemetry.last_cache_bytes() is None
    for index, size in enumerate(("32K", "1M", "strange")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert telemetry.last_cache_bytes() == 1 << 20


def test_the_environment_has_a_reason_for_every_null_and_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "FREQUENCY", str(tmp_path / "none"))
    monkeypatch.setattr(telemetry, "CACHE_FOLDER", str(tmp_path / "none"))
    found = telemetry.environment()
    assert found["cpu"]
    assert found["cpus"] >= 1
    assert "onnxruntime" in found["packages"]
    assert all(f"{key}_why" in found for key, value in found.items() if value is None)
    assert "/" not in json.dumps(found).replace("N/A", "")


def test_without_a_cpu_file_python_names_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "CPU_INFO", str(tmp_path / "none"))
    assert telemetry.cpu_name()
