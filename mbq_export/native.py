"""Programs of others, run so that their death is an ordinary result; and the native sources they compile.

The only user of ``subprocess``. A child gets its own process group, no core dump, a log file for both
streams and a time limit; when it ends, by itself or not, nothing of its group is left behind.
"""

import contextlib
import hashlib
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

logger = logging.getLogger(__name__)

GRACE_S: Final = 10.0
"""Between asking a group to end and ending it."""

CALL_SECONDS: Final = 600.0
"""Usual limit of one answer of an engine's process, the load included; none should take minutes."""

POLL_S: Final = 0.02
WATCH_S: Final = 0.1
TAIL_BYTES: Final = 64 << 10
PROBE_TIMEOUT_S: Final = 10.0

SOURCE_FOLDERS: Final = ("kernels/include", "kernels/src", "plugins")
"""What a plugin library is compiled from, below `source_root`."""
SOURCE_SUFFIXES: Final = frozenset({".h", ".cuh", ".inc", ".cu", ".cpp", ".map", ".cmake", ".txt"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildResult:
    """How a child ended.

    Attributes:
        status: Exit status; None if a signal ended it.
        signal: Name of that signal, for example ``SIGSEGV``; None if it exited.
        timed_out: Whether the time limit ended it.
        seconds: Wall time.
        peak_rss_bytes: Largest resident memory of the child, looked at every `POLL_S`; 0 if it ended before.
        log: Both of its streams.
    """

    status: int | None
    signal: str | None
    timed_out: bool
    seconds: float
    peak_rss_bytes: int
    log: Path

    @property
    def ok(self) -> bool:
        """Whether it exited with status 0."""
        return self.status == 0

    def tail(self, lines: int = 20) -> list[str]:
        """Return the last lines of the log."""
        return tail(self.log, lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalGpu:
    """The first GPU of this machine, as the driver names it."""

    name: str
    sm: int
    driver: str


def run_child(
    argv: Sequence[str],
    *,
    log: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    address_space_bytes: int | None = None,
) -> ChildResult:
    """Run a program to its end, whatever that end is.

    Args:
        argv: Program and arguments; no shell reads them.
        log: File that receives both streams; replaced.
        timeout_s: After it the group gets SIGTERM, and `GRACE_S` later SIGKILL.
        env: Whole environment of the child; None for ours.
        cwd: Its working folder; None for ours.
        address_space_bytes: Limit on its address space, so that an allocation fails inside the child
            before the machine runs out of memory. Not for children that use a GPU, which reserve far more
            than they touch.

    Returns:
        How it ended. An exit status other than 0 is a result, not an error.

    Raises:
        FileNotFoundError: If the program does not exist.
        KeyboardInterrupt: After the group has ended.
    """
    started = time.monotonic()
    with log.open("wb") as streams:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=streams,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    ended, peak = False, 0
    try:
        _limit(process.pid, address_space_bytes)
        ended, peak = _watched(process.pid, timeout_s)
        if not ended:
            logger.warning("%s has run for %.0f s and is ended", argv[0], timeout_s)
    finally:
        # Also on an interrupt: nothing of the group outlives this call.
        try:
            if not ended:
                _end_group(process.pid)
        finally:
            status = _reap(process)
    return ChildResult(
        status=status if status >= 0 else None,
        signal=signal.Signals(-status).name if status < 0 else None,
        timed_out=not ended,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak,
        log=log,
    )


@dataclass(frozen=True, kw_only=True)
class RunningChild:
    """A program that answers through pipes until it is told to end.

    Attributes:
        requests: Its standard input.
        answers: Its standard output; its errors go to the log.
        log: That log.
    """

    requests: BinaryIO
    answers: BinaryIO
    log: Path
    _process: subprocess.Popen[bytes]
    _started: float
    _watchdog: "_Watchdog"

    @property
    def overdue(self) -> bool:
        """Whether `limited` ended it."""
        return self._watchdog.bit

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Kill its group if what is done meanwhile takes longer: a read then finds the end of the pipe."""
        self._watchdog.due = time.monotonic() + seconds
        try:
            yield
        finally:
            self._watchdog.due = math.inf

    def finish(self) -> ChildResult:
        """Close its input, give it `GRACE_S`, end its group, and say how it ended."""
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        ended, peak = _watched(self._process.pid, GRACE_S)
        self._watchdog.close()
        status = _reap(self._process)
        self.answers.close()
        return ChildResult(
            status=status if status >= 0 else None,
            signal=signal.Signals(-status).name if status < 0 else None,
            timed_out=self.overdue or not ended,
            seconds=time.monotonic() - self._started,
            peak_rss_bytes=peak,
            log=self.log,
        )


class _Watchdog(threading.Thread):
    """Kills a group when `due` has passed.

    One thread for all limits of a child: a token takes milliseconds, so its limit may cost no more than an assignment.
    """

    def __init__(self, group: int) -> None:
        """Watch a group."""
        super().__init__(daemon=True)
        self.due = math.inf
        self.bit = False
        self._group = group
        self._closed = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._closed.wait(WATCH_S):
            if time.monotonic() > self.due:
                self.bit = True
                _kill_group(self._group)
                return

    def close(self) -> None:
        """Stop watching; after this the group's number may belong to others."""
        self._closed.set()
        self.join()


def start_child(
    argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> RunningChild:
    """Start a program that answers through pipes.

    Args:
        argv: Program and arguments; no shell reads them.
        log: File that receives its errors; replaced.
        env: Whole environment of the child; None for ours.
        cwd: Its working folder; None for ours.
    """
    with log.open("wb") as errors:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    _limit(process.pid, None)
    return RunningChild(
        requests=cast("BinaryIO", process.stdin),
        answers=cast("BinaryIO", process.stdout),
        log=log,
        _process=process,
        _started=time.monotonic(),
        _watchdog=_Watchdog(process.pid),
    )


def tail(path: Path, lines: int = 20) -> list[str]:
    """Return the last lines of a text file; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-lines:]


def source_root() -> Path:
    """Folder that holds ``kernels/`` and ``plugins/``: inside an installed package, else the checkout."""
    packaged = Path(__file__).resolve().parent / "_native"
    return packaged if packaged.is_dir() else packaged.parents[1]


def source_files(root: Path) -> list[Path]:
    """Every file that a plugin library is compiled from, sorted."""
    return sorted(
        path
        for folder in SOURCE_FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix in SOURCE_SUFFIXES
    )


def sources_sha256(root: Path) -> str:
    """SHA-256 over names and bytes of `source_files`; a changed comment is another library."""
    digest = hashlib.sha256()
    for path in source_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def available_memory() -> int:
    """Bytes of memory a new process can use before the machine swaps or its cgroup kills it."""
    facts = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    free = int(facts["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(free, 0)


def peak_memory(pid: int) -> int:
    """Return the largest resident memory of a process so far, in bytes; 0 if it has ended.

    ``getrusage`` would not do: there a child begins with the peak of the parent that forked it.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(sizes[0]) * 1024 if sizes else 0


def local_gpu() -> LocalGpu | None:
    """Ask the driver's own tool for this machine's first GPU; None without a driver or a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    with tempfile.TemporaryDirectory(prefix="mbq-") as folder:
        query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
        result = run_child(query, log=Path(folder, "log"), timeout_s=PROBE_TIMEOUT_S)
        lines = result.tail() if result.ok else []
    fields = [field.strip() for field in lines[0].split(",")] if lines else []
    capability = fields[1].replace(".", "") if len(fields) == 3 else ""
    if not capability.isdigit():
        return None
    return LocalGpu(name=fields[0], sm=int(capability), driver=fields[2])


def _limit(pid: int, address_space_bytes: int | None) -> None:
    """Set the child's limits from outside: code run between fork and exec may deadlock under threads."""
    with contextlib.suppress(ProcessLookupError):  # it ended already
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        if address_space_bytes is not None:
            limits = (address_space_bytes, address_space_bytes)
            resource.prlimit(pid, resource.RLIMIT_AS, limits)


def _watched(pid: int, timeout_s: float) -> tuple[bool, int]:
    """Wait for a child without reaping it, so that its group keeps its number.

    Returns:
        Whether it ended in time, and its largest memory.
    """
    deadline, peak = time.monotonic() + timeout_s, 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        peak = max(peak, peak_memory(pid))
        if time.monotonic() >= deadline:
            return False, peak
        time.sleep(POLL_S)
    return True, peak


def _end_group(group: int) -> None:
    """SIGTERM, a grace period, SIGKILL. A second interrupt shortens the grace period."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
    try:
        _watched(group, GRACE_S)
    finally:
        _kill_group(group)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _reap(process: subprocess.Popen[bytes]) -> int:
    """End whatever the child left in its group, then collect its exit code."""
    _kill_group(process.pid)
    return process.wait()
