"""Where every file from outside is first looked at: size caps, strict JSON, safetensors headers, paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

JSON_LIMIT: Final = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor in a safetensors file.

    Attributes:
        dtype: As the header spells it, for example ``F16``.
        shape: Sizes.
        start: First byte in the file.
        end: Byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_json(path: Path, *, limit: int = JSON_LIMIT, code: str = "E4002") -> dict[str, Any]:
    """Read one JSON object, strictly."""
    raise NotImplementedError


def read_jsonl(path: Path, *, code: str = "E4302") -> list[tuple[int, dict[str, Any]]]:
    """Read one JSON object per line: (line number from 1, object)."""
    raise NotImplementedError


def contained(root: Path, relative: str, *, code: str) -> Path:
    """Resolve a path named by a file to a regular file inside `root`."""
    raise NotImplementedError


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Check a safetensors file without reading its tensors."""
    raise NotImplementedError


def sha256_of(path: Path) -> str:
    """Hash a file, in pieces."""
    raise NotImplementedError
