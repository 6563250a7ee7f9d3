"""What is expensive to make and can be made again: kept in the user's cache, under a hash of what it was made from.

    $MBQ_EXPORT_CACHE, else $XDG_CACHE_HOME/mbq-export, else ~/.cache/mbq-export      mode 0700
      <kind>/<key>/          one entry: files and entry.json with the size and SHA-256 of each
      <kind>/<key>.lock      held by the process that makes it

An entry appears by one rename and is hashed whenever it is used; a bad one is deleted and made again. Keys come from
contents, never from paths or times.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from mbq_export.errors import FormatError, ResourceError
from mbq_export.lock import Lock
from mbq_export.reading import read_json, sha256_of
from mbq_export.writing import explained, json_bytes, publish, staging, write_file

logger = logging.getLogger(__name__)

SCHEMA: Final = "mbq-export/cache-entry@1"
ENTRY: Final = "entry.json"
POLL_S: Final = 0.2


def folder(kind: str) -> Path:
    """Folder of one kind of entries; need not exist.

    Raises:
        FormatError: E4803 if the cache belongs to another user, or others may write to it.
    """
    named = os.environ.get("MBQ_EXPORT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME")
    root = Path(named) if named else Path(home or Path.home() / ".cache") / "mbq-export"
    if root.exists():
        status = root.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise FormatError(
                "E4803",
                f"The cache {root} is not safe to load libraries from.",
                why=f"it belongs to user {status.st_uid} with mode {status.st_mode & 0o777:o}; yours with 0700 is wanted",
                fix=(f"chmod 700 {root}", "set MBQ_EXPORT_CACHE to a folder of yours"),
            )
    return root.absolute() / kind


def entries(kind: str) -> list[Path]:
    """Every finished entry of a kind that is whole, sorted by key. Bad ones are deleted on the way."""
    place = folder(kind)
    found = sorted(place.iterdir()) if place.is_dir() else []
    return [path for path in found if path.is_dir() and (path / ENTRY).is_file() and _whole(path)]


def lookup(kind: str, key: str) -> Path | None:
    """The entry of a key if there is one and it is whole."""
    path = folder(kind) / key
    return path if (path / ENTRY).is_file() and _whole(path) else None


@contextmanager
def making(kind: str, key: str, *, wait_s: float) -> Iterator[Path | None]:
    """Make an entry, one process at a time.

    Yields an empty folder to fill, published when the block ends without an error; or None if another process made
    the entry meanwhile. Look the entry up afterwards in either case.

    Args:
        kind: What is made, for example ``plugins``.
        key: Hash of everything it depends on.
        wait_s: How long to wait for another process that makes it.

    Raises:
        FormatError: E4803, see `folder`.
        ResourceError: E5007 if the other process is not done in time, E5001 or E5008 if the place is not writable.
    """
    final = folder(kind) / key
    with explained(final):
        final.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        final.parent.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as undo:
        _take_lock_of(final, wait_s, undo)
        if lookup(kind, key) is not None:
            yield None
            return
        with staging(final) as staged:
            yield staged
            _seal(staged)
            publish(staged, final)


def _take_lock_of(final: Path, wait_s: float, undo: ExitStack) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            Lock.take(final.with_name(f"{final.name}.lock"), undo=undo)
        except ResourceError as error:
            if error.code != "E5007" or time.monotonic() >= deadline:
                raise
        else:
            return
        time.sleep(POLL_S)


def _seal(staged: Path) -> None:
    files = {
        path.relative_to(staged).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    write_file(staged / ENTRY, json_bytes({"schema": SCHEMA, "files": files}))


def _whole(path: Path) -> bool:
    """Hash an entry; delete it unless it is what was published."""
    try:
        record = read_json(path / ENTRY)
        good = record.get("schema") == SCHEMA and all(
            _same(path / name, facts) for name, facts in record["files"].items()
        )
    except (FormatError, OSError, KeyError, AttributeError, TypeError):
        good = False
    if not good:
        logger.warning("MBQ-W4804: deleting %s from the cache: it is damaged", path)
        shutil.rmtree(path, ignore_errors=True)
    return good


def _same(path: Path, facts: dict[str, Any]) -> bool:
    return bool(path.stat().st_size == facts["bytes"] and sha256_of(path) == facts["sha256"])
