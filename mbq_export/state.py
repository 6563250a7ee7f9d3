"""Work that survives being killed: finished stages and blocks, kept beside the output until it is complete.

::

    <out>.partial/
      state.json    fingerprint; finished stages with the hashes of their files
      blocks/<stage>/NNNN.safetensors  NNNN.json    a finished block; the record holds the tensors' hash
      lock          host, pid and start of the build that works here
      <stage>/      output of a stage

Every file appears by a rename after its bytes are on the disk, records after what they describe, so a run
killed at any moment leaves finished work and nothing that looks finished. Damage is found by hash and done
again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from mbq_export.errors import FormatError, MbqError, UsageError
from mbq_export.lock import Lock
from mbq_export.reading import read_json, sha256_of
from mbq_export.tensor_file import TensorFile, write_tensors
from mbq_export.writing import explained, json_bytes, write_file

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

SCHEMA: Final = "mbq-export/state@1"
STATE_FILE: Final = "state.json"
BLOCKS: Final = "blocks"
LOCK_FILE: Final = "lock"
JSON_LIMIT_BYTES: Final = 64 << 20
_ABSENT: Final = "(absent)"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBlock:
    """A finished block.

    Attributes:
        tensors: By name, read-only, mapped from the file.
        record: What was saved beside them.
    """

    tensors: Mapping[str, NDArray[Any]]
    record: Mapping[str, Any]


class State:
    """The resumable state of one output, held under a lock until `close`."""

    def __init__(self, folder: Path, lock: Lock, finished: dict[str, Any], mark: Any) -> None:
        """Hold what `open` found; use `open`."""
        self.folder = folder
        self._lock = lock
        self._finished = finished
        self._fingerprint = mark

    @classmethod
    def open(
        cls, partial: Path, fingerprint: Mapping[str, object], *, fresh: bool = False
    ) -> State:
        """Take the lock, then start or go on.

        Args:
            partial: The work folder, usually `writing.partial_path` of the output; made if missing.
            fingerprint: Everything that decides the result: resolved options, input hashes, code revision.
                Nested mappings are compared key by key. No paths, times or thread counts.
            fresh: Forget what is there.

        Raises:
            ResourceError: E5007 if another build works here, E5001 or E5008 if the folder cannot be written.
            UsageError: E2010, listing each differing key, if the state belongs to other arguments.
            FormatError: E4802 if the state cannot be read.
        """
        with explained(partial):
            partial.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            lock = Lock.take(partial / LOCK_FILE, undo=undo)
            if fresh:
                _clear(partial)
            mark = json.loads(json_bytes(dict(fingerprint)))
            state = cls(partial, lock, _finished_stages(partial, mark), mark)
            state._save()
            undo.pop_all()
        return state

    def stage(self, name: str) -> Path:
        """Where the output of a stage belongs; made by whoever writes it."""
        return self.folder / name

    def done(self, name: str) -> bool:
        """Whether a stage is finished and its files are still what they were; damage is logged (W4801)."""
        files: dict[str, str] | None = self._finished.get(name)
        if files is None:
            return False
        folder = self.stage(name)
        damaged = [path for path in files if _hash_or_none(folder / path) != files[path]]
        if damaged:
            logger.warning(
                "MBQ-W4801: %d files of stage %s changed (%s); it is done again",
                len(damaged), name, damaged[0],
            )  # fmt: skip
            del self._finished[name]
            self._save()
        return not damaged

    def finish(self, name: str) -> None:
        """Mark a stage as finished, remembering the hash of every file in its folder."""
        folder = self.stage(name)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self._finished[name] = {
            path.relative_to(folder).as_posix(): sha256_of(path) for path in files
        }
        self._save()

    def save_block(
        self,
        stage: str,
        index: int,
        tensors: Mapping[str, NDArray[Any]],
        record: Mapping[str, object],
    ) -> None:
        """Keep a finished block: tensors first, then the record that makes them count, both synced.

        Raises:
            ResourceError: E5001 or E5008; what was saved before stays.
        """
        path = self._block(stage, index)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        written = write_tensors(path, tensors)
        found = {"schema": SCHEMA, "sha256": written.sha256, "record": dict(record)}
        write_file(path.with_suffix(".json"), json_bytes(found))

    def load_block(self, stage: str, index: int) -> SavedBlock | None:
        """Return a finished block, or None if it is missing or damaged (W4801): then do it again."""
        path = self._block(stage, index)
        if not path.with_suffix(".json").exists():
            return None
        try:
            kept = read_json(path.with_suffix(".json"), limit=JSON_LIMIT_BYTES, code="E4802")
            if _hash_or_none(path) == kept.get("sha256") and isinstance(kept.get("record"), dict):
                file = TensorFile(path)
                tensors = {name: file.array(name) for name in file.entries}
                return SavedBlock(tensors=tensors, record=kept["record"])
        except FormatError as error:
            logger.debug("%s", error)
        logger.warning(
            "MBQ-W4801: finished block %d of %s is damaged; it is done again", index, stage
        )
        return None

    def close(self) -> None:
        """Give the lock back; the state stays for the next run."""
        self._lock.release()

    def discard(self) -> None:
        """Delete the work folder after its output was published, then give the lock back."""
        with explained(self.folder):
            shutil.rmtree(self.folder)
        self._lock.release()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _block(self, stage: str, index: int) -> Path:
        return self.folder / BLOCKS / stage / f"{index:04}.safetensors"

    def _save(self) -> None:
        state = {"schema": SCHEMA, "fingerprint": self._fingerprint, "stages": self._finished}
        write_file(self.folder / STATE_FILE, json_bytes(state))


def fingerprint_of(values: Mapping[str, object]) -> str:
    """SHA-256 over values as canonical JSON."""
    return hashlib.sha256(json_bytes(dict(values))).hexdigest()


def revision_of(*packages: str) -> str:
    """SHA-256 over the source files of packages or modules of ours, for example "blocks", "checkpoint".

    Part of a fingerprint: blocks computed by other code must not be mixed with new ones.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for package in sorted(packages):
        place = root / package
        sources = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        for source in sources:
            digest.update(source.relative_to(root).as_posix().encode())
            digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def _clear(folder: Path) -> None:
    with explained(folder):
        for path in folder.iterdir():
            if path.name == LOCK_FILE:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _finished_stages(folder: Path, mark: Mapping[str, object]) -> dict[str, Any]:
    """Finished stages of an earlier run with the same fingerprint; none if this is the first."""
    path = folder / STATE_FILE
    if not path.exists():
        if (folder / BLOCKS).exists():
            raise _unreadable(folder, f"there are finished blocks, but no {STATE_FILE}")
        return {}
    try:
        kept = read_json(path, limit=JSON_LIMIT_BYTES, code="E4802")
    except MbqError as error:
        raise _unreadable(folder, error.message) from error
    if kept.get("schema") != SCHEMA or not _is_stages(kept.get("stages")):
        raise _unreadable(
            folder, f"its schema is {kept.get('schema')!r}, or its stages are malformed"
        )
    _compare(folder, kept.get("fingerprint"), mark)
    stages: dict[str, Any] = kept["stages"]
    return stages


def _is_stages(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values())
        for files in value.values()
    )


def _unreadable(folder: Path, reason: str) -> FormatError:
    return FormatError(
        "E4802",
        f"The state of an earlier run in {folder} cannot be read: {reason}",
        why="finished work is used only if it is known what it belongs to",
        fix=("add --fresh to start over", "choose another -o"),
    )


def _compare(folder: Path, kept: object, wanted: Mapping[str, object]) -> None:
    old, new = _flat(kept), _flat(wanted)
    changed = {
        key: (old.get(key, _ABSENT), new.get(key, _ABSENT))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    }
    if changed:
        table = "; ".join(f"{key}: {before} -> {after}" for key, (before, after) in changed.items())
        raise UsageError(
            "E2010",
            f"{folder} holds unfinished work for other arguments: {table}.",
            why="blocks of two different runs must not be mixed",
            fix=(
                "add --fresh to start over",
                "choose another -o",
                "repeat the arguments of before",
            ),
            context={"differences": {key: list(pair) for key, pair in changed.items()}},
        )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Leaves of nested mappings by dotted key."""
    if not isinstance(value, Mapping) or not value:
        return {prefix.rstrip("."): value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flat(inner, f"{prefix}{key}.").items()
    }


def _hash_or_none(path: Path) -> str | None:
    """Hash of a regular file, or None where there is none."""
    return sha256_of(path) if path.is_file() and not path.is_symlink() else None
