"""Children that end in every way a child can end; each is a real process."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mbq_export import native
from mbq_export.native import ChildResult, run_child, start_child

SHORT_S = 0.4
"""Limit of one answer: far more than ``cat`` takes."""


def python(tmp_path: Path, code: str, *, timeout_s: float = 30.0, **options: object) -> ChildResult:
    return run_child(
        [sys.executable, "-c", textwrap.dedent(code)],
        log=tmp_path / "log",
        timeout_s=timeout_s,
        **options,  # type: ignore[arg-type]
    )


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process that was killed ends: on a busy machine it still has to be scheduled for that."""
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def wait_for(path: Path, seconds: float = 20.0) -> str:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


def test_exit_status_is_a_result(tmp_path: Path) -> None:
    result = python(tmp_path, "raise SystemExit(7)")
    assert (result.status, result.signal, result.ok, result.timed_out) == (7, None, False, False)


def test_both_streams_go_to_the_log(tmp_path: Path) -> None:
    result = python(tmp_path, "import sys; print('out', flush=True); print('err', file=sys.stderr)")
    assert result.ok
    assert result.tail() == ["out", "err"]


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGKILL"])
def test_signal_is_reported_by_name(tmp_path: Path, name: str) -> None:
    result = python(tmp_path, f"import os, signal; os.kill(os.getpid(), signal.{name})")
    assert (result.status, result.signal, result.timed_out) == (None, name, False)


def test_time_limit_ends_the_child(tmp_path: Path) -> None:
    result = python(tmp_path, "import time; time.sleep(60)", timeout_s=0.5)
    assert (result.signal, result.timed_out) == ("SIGTERM", True)
    assert 0.5 <= result.seconds < 10


def test_child_that_ignores_the_request_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "GRACE_S", 0.3)
    code = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("deaf", flush=True)
        time.sleep(60)
    """
    result = python(tmp_path, code, timeout_s=2.0)
    assert result.tail() == ["deaf"]
    assert (result.signal, result.timed_out) == ("SIGKILL", True)


def test_grandchildren_end_with_the_child(tmp_path: Path) -> None:
    code = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    """
    assert python(tmp_path, code).ok
    pid = int((tmp_path / "pid").read_text())
    assert gone(pid)


def test_interrupt_ends_the_group_and_is_raised_again(tmp_path: Path) -> None:
    """A parent in its own process, interrupted as by Ctrl-C; its child must not outlive it."""
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from mbq_export.native import run_child
        hang = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
        try:
            run_child([sys.executable, "-c", hang], log=Path({str(tmp_path / "log")!r}), timeout_s=60)
        except KeyboardInterrupt:
            raise SystemExit(130)
        """
    )
    root = str(Path(native.__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root}
    )
    try:
        pid = int(wait_for(tmp_path / "log"))
        parent.send_signal(signal.SIGINT)
        assert parent.wait(20) == 130
    finally:
        parent.kill()
        parent.wait()
    assert gone(pid)


def test_no_core_is_dumped(tmp_path: Path) -> None:
    code = """
        import resource, time
        while resource.getrlimit(resource.RLIMIT_CORE) != (0, 0):
            time.sleep(0.01)  # set from outside, shortly after the start
    """
    assert python(tmp_path, code).ok


def test_address_space_limit_fails_the_allocation_not_the_machine(tmp_path: Path) -> None:
    code = """
        import resource, time
        while resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            time.sleep(0.01)
        try:
            bytearray(1 << 31)
        except MemoryError:
            print("refused")
    """
    result = python(tmp_path, code, address_space_bytes=1 << 30)
    assert result.tail() == ["refused"]


def test_environment_and_folder_are_the_childs_own(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    code = "import os; print(os.getcwd(), sorted(os.environ.get(n, '-') for n in ('A', 'HOME')))"
    result = python(tmp_path, code, env={"A": "1"}, cwd=tmp_path / "sub")
    assert result.tail() == [f"{(tmp_path / 'sub').resolve()} ['-', '1']"]


def test_peak_memory_is_the_childs(tmp_path: Path) -> None:
    small = python(tmp_path, "pass").peak_rss_bytes
    large = python(tmp_path, "import time; x = b'x' * (200 << 20); time.sleep(0.5)").peak_rss_bytes
    assert large - small > 150 << 20


def test_standard_input_is_closed(tmp_path: Path) -> None:
    assert python(tmp_path, "import sys; print(repr(sys.stdin.read()))").tail() == ["''"]


def test_missing_program_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-compiler"):
        run_child(["no-such-compiler"], log=tmp_path / "log", timeout_s=1)


def test_tail_of_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert native.tail(tmp_path / "none") == []


def test_tail_is_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {i}\n" for i in range(100_000)))
    assert native.tail(path, 2) == ["line 99998", "line 99999"]


def test_available_memory_is_below_the_machines() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < native.available_memory() <= total


def fake_tool(folder: Path, output: str, status: int = 0) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    tool.chmod(0o755)


def test_gpu_is_what_the_drivers_tool_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, "NVIDIA H100 80GB HBM3, 9.0, 580.95.05")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = native.local_gpu()
    assert gpu is not None
    assert (gpu.name, gpu.sm, gpu.driver) == ("NVIDIA H100 80GB HBM3", 90, "580.95.05")


@pytest.mark.parametrize(
    ("output", "status"),
    [
        ("NVIDIA-SMI has failed because it could not communicate with the driver", 9),
        ("No devices", 0),
    ],
)
def test_tool_without_a_gpu_means_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, status: int
) -> None:
    fake_tool(tmp_path, output, status)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert native.local_gpu() is None


def test_no_tool_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.local_gpu() is None


def test_answer_that_never_comes_ends_the_child_and_whoever_it_started(tmp_path: Path) -> None:
    script = "sleep 600 & echo $!; cat; sleep 600"
    child = start_child(["sh", "-c", script], log=tmp_path / "log")
    grandchild = int(child.answers.readline())
    with child.limited(SHORT_S):
        assert child.answers.readline() == b""
    result = child.finish()
    assert (result.timed_out, result.signal, child.overdue) == (True, "SIGKILL", True)
    assert gone(grandchild)


def test_answer_in_time_lifts_the_limit(tmp_path: Path) -> None:
    child = start_child(["cat"], log=tmp_path / "log")
    for _ in range(3):
        with child.limited(SHORT_S):
            child.requests.write(b"said\n")
            child.requests.flush()
            assert child.answers.readline() == b"said\n"
        time.sleep(SHORT_S * 1.5)
    result = child.finish()
    assert (result.ok, result.timed_out, child.overdue) == (True, False, False)
