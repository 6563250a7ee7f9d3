"""Progress is a bar for people and few whole lines for logs."""

import re
import time
from types import SimpleNamespace

import pytest

from mbq_export.commands import bars
from mbq_export.commands.bars import open_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [time.monotonic()]
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_lines_come_each_10_percent_but_not_within_10_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with open_progress("quantize", mode="plain") as report:
        for done in range(1, 101):
            clock[0] += 2.0
            report(done, 100, "loss 0.1")
    lines = capsys.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 10
    assert re.fullmatch(r"quantize  [56]/100  ETA 1(88|90) s  loss 0\.1", lines[0])


def test_short_work_is_not_worth_a_line(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with open_progress("quantize", mode="plain") as report:
        for done in range(1, 101):
            clock[0] += 0.05
            report(done, 100)
    assert capsys.readouterr().err == ""


def test_no_terminal_gets_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress("export", mode="auto") as report:
        report(1, 2)
    with open_progress("export", mode="none") as report:
        report(1, 2)
    assert capsys.readouterr().err == ""


def test_bar_shows_what_and_how_much(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to the library that draws
    with open_progress("export", mode="bar") as report:
        report(0, 2)
        report(1, 2, "decoder")
    assert "export" in capsys.readouterr().err
