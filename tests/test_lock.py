"""One worker per place, whatever happened to the one before."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mbq_export.errors import ResourceError
from mbq_export.lock import Lock

HOLD = """
import sys, time
from pathlib import Path
from mbq_export.lock import Lock
lock = Lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holder(path: Path) -> "subprocess.Popen[str]":
    """A child that holds the lock until it is killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def record(path: Path, **changes: object) -> None:
    """Leave a lock file that names the running process, with changes."""
    lock = Lock.take(path)
    owner = json.loads(path.read_text())
    lock.release()
    path.write_text(json.dumps(owner | changes))


def test_lock_names_host_pid_and_start(tmp_path: Path) -> None:
    lock = Lock.take(tmp_path / "lock")
    owner = json.loads((tmp_path / "lock").read_text())
    assert owner["pid"] == os.getpid()
    assert owner["host"] == os.uname().nodename
    assert owner["started"] == int(Path("/proc/self/stat").read_text().split()[21])
    lock.release()
    assert not (tmp_path / "lock").exists()


def test_releasing_twice_takes_no_other_lock_away(tmp_path: Path) -> None:
    first = Lock.take(tmp_path / "lock")
    first.release()
    second = Lock.take(tmp_path / "lock")
    first.release()
    assert (tmp_path / "lock").exists()
    second.release()


def test_live_lock_of_another_process_is_refused_with_its_pid(tmp_path: Path) -> None:
    with holder(tmp_path / "lock") as child:
        with pytest.raises(ResourceError, match=rf"Process {child.pid} on .+ works in") as caught:
            Lock.take(tmp_path / "lock")
        child.kill()
    assert caught.value.code == "E5007"
    assert caught.value.fix[0] == "wait until it is done"


def test_lock_of_this_process_is_refused_a_second_time(tmp_path: Path) -> None:
    lock = Lock.take(tmp_path / "lock")
    with pytest.raises(ResourceError, match=f"Process {os.getpid()} on"):
        Lock.take(tmp_path / "lock")
    lock.release()


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path / "lock") as child:
        child.send_signal(signal.SIGKILL)
    assert (tmp_path / "lock").exists()
    Lock.take(tmp_path / "lock").release()


def test_reused_pid_is_not_the_owner(tmp_path: Path) -> None:
    record(tmp_path / "lock", pid=os.getppid(), started=1)
    Lock.take(tmp_path / "lock").release()


def test_pid_that_no_system_has_is_dead(tmp_path: Path) -> None:
    record(tmp_path / "lock", pid=10**30)
    Lock.take(tmp_path / "lock").release()


def test_running_pid_without_an_advisory_lock_is_still_the_owner(tmp_path: Path) -> None:
    # As on a network file system, where the kernel's lock does not reach.
    record(tmp_path / "lock", pid=os.getppid(), started=None)
    with pytest.raises(ResourceError, match=f"Process {os.getppid()} on"):
        Lock.take(tmp_path / "lock")


def test_lock_of_another_host_is_refused_and_says_how_to_remove_it(tmp_path: Path) -> None:
    record(tmp_path / "lock", host="elsewhere", pid=7)
    with pytest.raises(ResourceError, match="Process 7 on elsewhere holds") as caught:
        Lock.take(tmp_path / "lock")
    assert caught.value.code == "E5007"
    assert f"if it is dead, delete {tmp_path / 'lock'}" in caught.value.fix
    assert (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 1}', '{"host": "a", "pid": "x", "started": 1}']
)
def test_torn_lock_file_is_nobodys(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    Lock.take(tmp_path / "lock").release()


def test_lock_is_no_link_to_somewhere_else(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(ResourceError, match="Cannot write"):
        Lock.take(tmp_path / "lock")
    assert (tmp_path / "other").read_text() == "precious"


def test_an_interrupt_while_it_is_taken_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Lock.take(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()
    monkeypatch.undo()
    Lock.take(tmp_path / "lock").release()
