"""How output appears: complete, or not at all.

Everything is written beside its final name as ``<name>.partial``, synced, and published by one rename, so
a reader never sees half of it and an interrupted run leaves the old output untouched.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mbq_export.errors import MbqError, ResourceError, UsageError

PARTIAL = ".partial"

RECORDS = ("manifest.json", "mbq.json", "calib.json", "mbq_export.json")
"""The files that describe a bundle, a checkpoint, a calibration and a set of graphs."""
OURS = b'"mbq-export/'
"""How the schema in each of them begins."""


def partial_path(final: Path) -> Path:
    """Where the unfinished form of ``final`` lies: on the same file system, so that a rename publishes it."""
    return final.with_name(final.name + PARTIAL)


def json_bytes(value: object) -> bytes:
    """Serialize deterministically: sorted keys, two spaces, a last newline; NaN is refused."""
    return (
        json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    ).encode()


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, mode 0644 whatever the umask.

    Raises:
        ResourceError: E5001 if the disk is full, E5008 if the place is not writable.
    """
    staged = partial_path(path)
    with explained(path):
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.chmod(0o644)
        staged.replace(path)


def refuse_existing(final: Path, *, force: bool) -> None:
    """Refuse to replace output unless asked to, and what others have made even then.

    An empty folder counts as nothing.

    Raises:
        UsageError: E2011.
    """
    if final.name in {"", ".."}:
        raise _taken(f"{final} is no name for output.", "a folder of that name is made")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not force:
        raise _taken(
            f"{final} exists.",
            "finished output is never overwritten unasked",
            "add --force to replace it after the new one is complete",
        )
    if not _is_ours(final):
        raise _taken(
            f"{final} exists, and is no output of mbq-export.",
            f"--force replaces folders with a {', '.join(RECORDS[:-1])} or {RECORDS[-1]} of ours",
        )


def refuse_inside(final: Path, source: Path) -> None:
    """Refuse output that is, or lies in, what it is made of.

    Raises:
        UsageError: E2011.
    """
    place, taken = final.resolve(), source.resolve()
    if place == taken or taken in place.parents:
        raise _taken(f"{final} lies in {source}.", "what is read is never changed")


def _taken(message: str, why: str, *more: str) -> UsageError:
    return UsageError("E2011", message, why=why, fix=("choose another -o", *more))


def _is_ours(folder: Path) -> bool:
    files = [folder / name for name in RECORDS]
    return any(OURS in file.read_bytes() for file in files if file.is_file())


def publish(staged: Path, final: Path) -> None:
    """Rename a finished folder to its final name, replacing an old one only now.

    Raises:
        ResourceError: E5001 or E5008.
    """
    with explained(final):
        for path in sorted(staged.rglob("*")):
            if path.is_file():
                path.chmod(0o644)
                _sync(path)
        if final.exists():
            retired = final.with_name(final.name + ".replaced")
            final.rename(retired)
            staged.rename(final)
            shutil.rmtree(retired)
        else:
            staged.rename(final)
        _sync(final.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of the file system into ours.

    Raises:
        ResourceError: E5001 for a full disk or quota, E5008 for a missing permission or place.
    """
    try:
        yield
    except MbqError:
        raise
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise ResourceError(
                "E5001",
                f"No space left while writing {path}.",
                why=error.strerror or "",
                fix="free space and run the same command again: finished work is kept",
            ) from error
        raise ResourceError(
            "E5008",
            f"Cannot write {path}: {error.strerror}.",
            why="the folder must exist and be writable",
            fix="choose another -o",
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
