"""Work that survives being killed: finished stages and blocks, kept beside the output until it is complete.

    <out>.partial/
      state.json                   fingerprint; finished stages with the hashes of their files
      blocks/<stage>/NNNN.safetensors  NNNN.json    one finished block; the record holds the tensors' hash
      lock                         host, pid and start time of the build that works here
      <stage>/                     output of a stage
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray


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
        raise NotImplementedError

    def stage(self, name: str) -> Path:
        """Where the output of a stage belongs; made by whoever writes it."""
        raise NotImplementedError

    def done(self, name: str) -> bool:
        """Whether a stage is finished and its files are still what they were; damage is logged (W4801)."""
        raise NotImplementedError

    def finish(self, name: str) -> None:
        """Mark a stage as finished, remembering the hash of every file in its folder."""
        raise NotImplementedError

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
        raise NotImplementedError

    def load_block(self, stage: str, index: int) -> SavedBlock | None:
        """Return a finished block, or None if it is missing or damaged (W4801): then do it again."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the lock back; the state stays for the next run."""
        raise NotImplementedError

    def discard(self) -> None:
        """Delete the work folder after its output was published, lock included."""
        raise NotImplementedError

    def __enter__(self) -> State:
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


def fingerprint_of(values: Mapping[str, object]) -> str:
    """SHA-256 over values as canonical JSON."""
    raise NotImplementedError


def revision_of(*packages: str) -> str:
    """SHA-256 over the source files of packages of ours, for example "blocks": part of a fingerprint."""
    raise NotImplementedError
