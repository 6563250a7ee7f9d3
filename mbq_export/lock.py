"""One worker per place: a lock file that names its owner and does not outlive it.

The kernel's advisory lock decides between processes of one machine and is gone when its owner dies, however
it dies. The record in the file says who it was, and guards places shared between machines, where advisory
locks may not reach.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbq_export.errors import ResourceError
from mbq_export.writing import explained

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_RECORD_LIMIT_BYTES: Final = 4096
_START_FIELD: Final = 22  # of /proc/PID/stat, counted from 1: start in ticks since boot


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: Name of the machine.
        pid: Process there.
        started: When it started, in ticks since boot; tells a reused pid from the owner. None without /proc.
    """

    host: str
    pid: int
    started: int | None

    @property
    def alive(self) -> bool:
        """Whether this very process still runs on this machine."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            return True
        return self.started is None or _start_of(self.pid) in {None, self.started}


class Lock:
    """A held lock; `take` makes one."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Hold an open, locked file."""
        self.path = path
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, path: Path, *, undo: ExitStack | None = None) -> Lock:
        """Take a lock at once, also over from an owner that died.

        Args:
            path: The lock file; its folder must exist.
            undo: Releases the lock when it ends. A request to end cannot come between the lock and this.

        Raises:
            ResourceError: E5007 if somebody else holds it, or a machine does whose processes cannot be seen;
                E5001 or E5008 if the file cannot be written.
        """
        with explained(path), _undisturbed():
            descriptor = _locked(path)
            with ExitStack() as failed:
                failed.callback(os.close, descriptor)
                _refuse_owner(path, _owner_in(descriptor))
                failed.callback(path.unlink, missing_ok=True)  # from here on it is ours
                record = json.dumps(asdict(_myself())).encode()
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, record, 0)
                os.fsync(descriptor)
                failed.pop_all()
            lock = cls(path, descriptor)
            if undo is not None:
                undo.callback(lock.release)
        return lock

    def release(self) -> None:
        """Remove the file and let others in; releasing twice is allowed."""
        if self._descriptor is None:
            return
        # The name goes first: whoever opened the old file finds out that it is no longer this place's.
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let requests to end wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner_in(descriptor)
            os.close(descriptor)
            raise _held(path, owner) from None
        except OSError as error:
            # Some network file systems have no advisory locks; the record must do there.
            logger.debug("no advisory lock on %s: %s", path, error)
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _owner_in(descriptor: int) -> Owner | None:
    """The record in a lock file, or None if there is none that makes sense."""
    try:
        record = json.loads(os.pread(descriptor, _RECORD_LIMIT_BYTES, 0))
        started = record["started"]
        return Owner(
            host=str(record["host"]),
            pid=int(record["pid"]),
            started=None if started is None else int(started),
        )
    except (ValueError, TypeError, KeyError):
        return None


def _refuse_owner(path: Path, owner: Owner | None) -> None:
    if owner is None:
        return
    if owner.host != _myself().host:
        raise ResourceError(
            "E5007",
            f"Process {owner.pid} on {owner.host} holds {path}.",
            why="whether a process of another machine still runs cannot be seen from here",
            fix=("choose another -o", f"if it is dead, delete {path}"),
        )
    if owner.alive and owner != _myself():
        raise _held(path, owner)
    logger.info("taking over %s from process %d, which is dead", path.name, owner.pid)


def _held(path: Path, owner: Owner | None) -> ResourceError:
    who = f"Process {owner.pid} on {owner.host}" if owner else "Another process"
    return ResourceError(
        "E5007",
        f"{who} works in {path.parent}.",
        why="two builds in one place would overwrite each other",
        fix=("wait until it is done", "choose another -o"),
    )


def _myself() -> Owner:
    return Owner(host=os.uname().nodename, pid=os.getpid(), started=_start_of(os.getpid()))


def _start_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses and may hold spaces: count from behind it.
    return int(stat.rpartition(")")[2].split()[_START_FIELD - 3])
