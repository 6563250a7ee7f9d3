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

OURS = b'"mbq-export/'
"""How the schema begins in every file that describes an output folder."""


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


def refuse_existing(final: Path, *, record: str, force: bool) -> None:
    """Refuse to replace output unless asked to, and anything but the same kind of output even then.

    Args:
        final: The output; an empty folder counts as nothing.
        record: File in it that says what it is, with a schema of ours.
        force: It was asked for.

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
    if not (final / record).is_file() or OURS not in (final / record).read_bytes():
        raise _taken(
            f"{final} exists, and is no output of this command.",
            f"--force replaces a folder with a {record} of ours, and nothing else",
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


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``final`` that is gone afterwards unless it was published.

    Raises:
        ResourceError: E5001 or E5008.
    """
    folder = partial_path(final)
    with explained(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
