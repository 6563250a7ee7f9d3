"""Output that cannot be written, or that somebody else writes: said early, and finished work is kept."""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mbq_export.bundle import Bundle
from tests.command_line import PROGRAM, ROOT, run, tell
from tests.conftest import SHORT_BUILD


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def commands(model: Path, bundle: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """A good line of every command that writes, up to its ``-o``."""
    data = ("--data", "builtin:shapes", "--samples", "2", "--group-size", "64")
    scales = ("--scales", bundle / "calibration")
    return {
        "build": ("build", "--model", model, *SHORT_BUILD, "-o", out),
        "calibrate": ("calibrate", "--model", model, *data, "-o", out),
        "quantize": ("quantize", "--model", model, *scales, "-o", out),
        "export": ("export", bundle / "weights", "-o", out),
        "validate": ("validate", bundle, "--tier", "structure", "-o", out),
        "bench": ("bench", bundle, "-r", "1", "-n", "2", "--images", "0", "-o", out),
        "report": ("report", bundle, "--md", out),
    }


WRITERS = sorted(commands(Path(), Path(), Path()))


@pytest.mark.parametrize("name", WRITERS)
def test_place_below_a_file_cannot_be_written(
    model: Path, bundle: Path, tmp_path: Path, name: str
) -> None:
    """Not a matter of permissions, so it holds for root too."""
    (tmp_path / "file").write_text("precious")
    outcome = run(*commands(model, bundle, tmp_path / "file" / "out")[name])
    assert (outcome.status, outcome.code) == (5, "E5008")
    assert "Not a directory" in outcome.document["error"]["message"]
    assert outcome.document["error"]["fix"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_place_without_any_room_is_refused_in_the_plan(model: Path) -> None:
    """The kernel's own file system has none, whoever asks."""
    outcome = run("build", "--model", model, *SHORT_BUILD, "-o", "/proc/mbq-export-out")
    assert (outcome.status, outcome.code) == (5, "E5002")
    assert "0 MiB are free at /proc" in outcome.document["error"]["message"]


@pytest.mark.parametrize(
    ("size", "stage"),
    [
        (0, "lock"),
        (300, "state.json"),
        (3_000, "calibration"),
        (100_000, "weights"),
        (305_000, "onnx"),
    ],
)
def test_full_disk_publishes_nothing_and_the_same_line_goes_on(
    model: Path, bundle: Path, tmp_path: Path, size: int, stage: str
) -> None:
    out = tmp_path / "bundle"
    with largest_file(size):
        outcome = tell("build", "--model", model, *SHORT_BUILD, "-o", out)
    assert outcome.status == 5, outcome.err
    assert "MBQ-E5001  No space left while writing " in outcome.err.splitlines()[-1]
    assert stage in outcome.err
    assert "fix     free space and run the same command again: finished work is kept" in outcome.err
    assert {path.name for path in tmp_path.iterdir()} <= {"bundle.partial"}
    if stage == "onnx":
        again = run("build", "--model", model, *SHORT_BUILD, "-o", out)
        assert again.status == 0, again.err
        assert "finished before, kept" in again.err
        assert again.document["result"]["sha256"] == Bundle.open(bundle).sha256
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["calibrate", "quantize", "export"])
def test_full_disk_leaves_nothing_of_a_stage_that_stands_alone(
    model: Path, bundle: Path, tmp_path: Path, name: str
) -> None:
    with largest_file(2_000):
        outcome = run(*commands(model, bundle, tmp_path / "out")[name])
    assert (outcome.status, outcome.code) == (5, "E5001")
    assert list(tmp_path.iterdir()) == []


def test_second_build_in_the_same_folder_is_refused_while_the_first_runs(
    model: Path, tmp_path: Path
) -> None:
    """The first is a real process that holds the lock."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    hold = (
        "import sys; from pathlib import Path; from mbq_export.lock import Lock; "
        f"Lock.take(Path({str(partial / 'lock')!r})); print('held', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", hold],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        outcome = run("build", "--model", model, *SHORT_BUILD, "-o", tmp_path / "out")
        assert (outcome.status, outcome.code) == (5, "E5007")
        assert f"Process {first.pid} on " in outcome.document["error"]["message"]
        assert "choose another -o" in outcome.document["error"]["fix"]
        assert [path.name for path in partial.iterdir()] == ["lock"]
        assert not (tmp_path / "out").exists()
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize("out", ["model", "model/out", "."])
def test_force_never_destroys_what_it_reads(copy: Path, out: str) -> None:
    before = sorted(path.name for path in copy.iterdir())
    outcome = run("build", "--model", copy, *SHORT_BUILD, "-o", copy.parent / out, "--force")
    assert (outcome.status, outcome.code) == (2, "E2011")
    assert sorted(path.name for path in copy.iterdir()) == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_build_that_is_asked_to_end_says_how_to_go_on(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    line = [*PROGRAM, "build", "--model", str(model), *SHORT_BUILD, "-o", str(out), "--json"]
    child = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    assert child.stderr.readline().startswith("[1/7] plan")
    child.send_signal(number)
    told, warned = child.communicate(timeout=100)
    assert child.returncode == 130, warned
    assert "Traceback" not in warned
    assert f"resume with: mbq-export build --model {model} " in warned
    assert json.loads(told)["error"]["class"] == "interrupted"
    assert not out.exists()
    assert not (tmp_path / "out.partial" / "lock").exists()
    assert run("build", "--model", model, *SHORT_BUILD, "-o", out).status == 0
