"""Where every file from outside is first looked at: sizes, strict JSON, safetensors headers, paths.

Nothing here trusts a number, a name or a link before it is checked, and nothing is allocated by a number
that a file states. The libraries that read these files later disagree about what is an error; this file
decides.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn

from mbq_export.errors import FormatError

JSON_LIMIT: Final = 4 << 20
LINE_LIMIT: Final = 1 << 20
MANIFEST_LIMIT: Final = 1 << 30
HEADER_LIMIT: Final = 100 << 20
DEEPEST: Final = 64
LINES_SHOWN: Final = 5

BYTES_OF: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Safetensors dtypes and the bytes of one element."""

_LOOKALIKES: Final = (
    (b"version https://git-lfs", "E4107", "a Git-LFS pointer, not the file it points to"),
    (b"<!doctype", "E4107", "a web page, not weights"),
    (b"<html", "E4107", "a web page, not weights"),
    (b"\x1f\x8b", "E4107", "gzip-compressed"),
    (b"pk\x03\x04", "E4101", "a zip archive (perhaps a renamed PyTorch pickle)"),
    (b"\x80\x02", "E4101", "a Python pickle"),
    (b"\x80\x03", "E4101", "a Python pickle"),
    (b"\x80\x04", "E4101", "a Python pickle"),
    (b"\x7felf", "E4101", "a program"),
)


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
    """Read one JSON object, strictly: UTF-8, no key twice, no NaN or infinity, at most 64 deep.

    Args:
        path: A regular file.
        limit: Largest size in bytes.
        code: Code of the error, which differs between configs, manifests and reports.

    Raises:
        FormatError: `code`, with line and column where the text is at fault.
    """
    regular_size(path, code=code, limit=limit)
    return parse_json(path.read_bytes(), name=path.name, code=code)


def parse_json(data: bytes, *, name: str, code: str) -> dict[str, Any]:
    """Parse one JSON object as `read_json` does.

    Raises:
        FormatError: `code`.
    """

    def refuse(reason: str) -> NoReturn:
        raise FormatError(
            code,
            f"{name} is not a strict JSON object: {reason}.",
            why="one JSON object in UTF-8, without repeated keys, NaN or more than 64 levels",
            fix="write or download the file again",
        )

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        refuse(f"byte {error.start} is not UTF-8 (starts with {data[:8]!r})")
    except json.JSONDecodeError as error:
        refuse(
            f"{error.msg} at line {error.lineno} column {error.colno} (starts with {data[:8]!r})"
        )
    except RecursionError:
        refuse(f"deeper than {DEEPEST} levels")
    except ValueError as error:
        refuse(str(error))
    if not isinstance(value, dict):
        refuse(f"the top level is a {type(value).__name__}")
    if _deeper_than(value, DEEPEST):
        refuse(f"deeper than {DEEPEST} levels")
    return value


def read_jsonl(path: Path, *, code: str = "E4302") -> list[tuple[int, dict[str, Any]]]:
    """Read one JSON object per line; blank lines, CRLF and a leading byte order mark are accepted.

    Returns:
        Line number, counted from 1, and object.

    Raises:
        FormatError: `code`, naming the first five bad lines, not only the first.
    """
    regular_size(path, code=code, limit=MANIFEST_LIMIT)
    found: list[tuple[int, dict[str, Any]]] = []
    bad: list[str] = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        if len(line) > LINE_LIMIT:
            bad.append(f"line {number} is longer than {LINE_LIMIT} bytes")
            continue
        try:
            found.append((number, parse_json(line, name=f"line {number}", code=code)))
        except FormatError as error:
            bad.append(error.message)
    if bad:
        raise FormatError(
            code,
            f"{len(bad)} bad lines in {path.name}: {'; '.join(bad[:LINES_SHOWN])}",
            why="each line is one JSON object in UTF-8",
            fix=f"mend the lines named here (the first {LINES_SHOWN} are shown)",
        )
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines without their ends; a longer line than allowed comes cut, not whole."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            rest = line
            while len(rest) > LINE_LIMIT and not rest.endswith(b"\n"):
                rest = file.readline(LINE_LIMIT + 1)
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def contained(root: Path, relative: str, *, code: str, missing: str = "") -> Path:
    """Resolve a path that a file states to a regular file inside a folder.

    A link is followed only if it ends inside the folder, or, in a snapshot of the hub cache, in the
    ``blobs`` folder of the same repository.

    Args:
        root: The folder.
        relative: What the file states.
        code: Code of the error for a path that leads elsewhere.
        missing: Code for a file that is not there or not regular; the same if empty.

    Raises:
        FormatError: `code` or `missing`.
    """
    shown = _shown(relative)

    def refuse(reason: str) -> NoReturn:
        raise FormatError(
            code,
            f"The path {shown} {reason}.",
            why=f"paths stay inside {root.name}/, are relative, and nothing is downloaded",
            fix="put the file into the folder and name it by its relative path",
        )

    if not relative or "\0" in relative or "\\" in relative:
        refuse("is empty or holds a zero byte or backslash")
    if "://" in relative or relative.lower().startswith("file:"):
        refuse("is a URL")
    if relative.startswith(("/", "~")) or relative[1:2] == ":":
        refuse("is absolute")
    if ".." in Path(relative).parts:
        refuse("leads upwards")
    path = root / relative
    try:
        target = path.resolve()
        home = root.resolve()
        homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
        if not any(target.is_relative_to(inside) for inside in homes):
            refuse("is a link that leaves the folder")
    except (OSError, RuntimeError) as error:
        raise FormatError(missing or code, f"The path {shown} cannot be followed.") from error
    regular_size(path, code=missing or code)
    return path


def regular_size(path: Path, *, code: str, limit: int | None = None) -> int:
    """Return the size of a regular file.

    Raises:
        FormatError: `code` if there is none, it is a folder, pipe or device, cannot be read, or is larger
            than `limit`.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise FormatError(
            code,
            f"There is no file {_shown(path.name)} in {path.parent.name or '.'}/.",
            why="the file is needed",
            fix="check the path, or download the folder again",
        ) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
        raise FormatError(
            code,
            f"{_shown(path.name)} is {kind}.",
            why="a regular file is needed",
            fix="name a file",
        )
    if not os.access(path, os.R_OK):
        raise FormatError(
            code,
            f"{_shown(path.name)} cannot be read.",
            why="permission denied",
            fix="chmod +r FILE",
        )
    if limit is not None and found.st_size > limit:
        raise FormatError(
            code,
            f"{_shown(path.name)} has {found.st_size} bytes.",
            why=f"a file of this kind has at most {limit}",
            fix="check that it is the right file",
        )
    return found.st_size


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Check a safetensors file without reading its tensors, and say where each lies.

    Stricter than the library: a name twice is an error, and bytes that belong to no tensor are too.

    Returns:
        Entries by name, in file order, with `start` and `end` counted from the start of the file.

    Raises:
        FormatError: E4101 for a truncated, overlapping or unreadable file, E4106 for one that is not
            regular, E4107 for a download pointer or a web page.
    """
    size = regular_size(path, code="E4106")
    with path.open("rb") as file:
        first = file.read(64)
        length = int.from_bytes(first[:8], "little")
        fits = size >= 8 and length <= min(HEADER_LIMIT, size - 8)
        # A header of 640 bytes begins as a pickle does: what can be a header is no lookalike.
        if not (fits and first[8:9] == b"{"):
            _refuse_lookalikes(path, first)
        if not fits:
            _bad_tensors(
                path,
                f"its header should have {length} bytes and the file has {size} in all",
                "truncated, or no safetensors file",
            )
        file.seek(8)
        header = parse_json(file.read(length), name=f"the header of {path.name}", code="E4101")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_ranges(path, entries, start=8 + length, size=size)
    return dict(sorted(entries.items(), key=lambda item: (item[1].start, item[0])))


def sha256_of(path: Path) -> str:
    """Hash a file in pieces; returns 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_lookalikes(path: Path, first: bytes) -> None:
    """Name a file that is something else, which explains more than a wrong header length."""
    start = first.lstrip().lower()
    for magic, code, what in _LOOKALIKES:
        if start.startswith(magic):
            raise FormatError(
                code,
                f"{path.name} is {what}.",
                why="weights are read from safetensors files only",
                fix="hf download ORG/NAME --local-dir FOLDER",
            )


def _entry(path: Path, name: str, value: object, offset: int) -> TensorEntry:
    """Check one entry of the header for itself."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _bad_tensors(path, f"the entry of {_shown(name)} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in BYTES_OF:
        _bad_tensors(path, f"{_shown(name)} has the unknown dtype {_shown(str(dtype))}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            _bad_tensors(
                path, f"{_shown(name)} has a shape or range that is not whole numbers >= 0"
            )
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * BYTES_OF[dtype]:
        _bad_tensors(path, f"{_shown(name)} has shape {shape} {dtype} but lies in bytes {offsets}")
    start, end = offsets
    return TensorEntry(dtype=dtype, shape=tuple(shape), start=offset + start, end=offset + end)


def _check_ranges(path: Path, entries: dict[str, TensorEntry], *, start: int, size: int) -> None:
    """Tensors must lie one after the other and fill the file."""
    filled = sorted(
        (
            (entry.start, entry.end, name)
            for name, entry in entries.items()
            if entry.end > entry.start
        )
    )
    if any(entry.end > size for entry in entries.values()):
        name = next(name for name, entry in entries.items() if entry.end > size)
        _bad_tensors(
            path,
            f"{_shown(name)} should end at byte {entries[name].end} and the file has {size}",
            "truncated",
        )
    ends = [(start, start, "the header"), *filled, (size, size, "the end of the file")]
    for (_, end, before), (begin, _, after) in pairwise(ends):
        if end != begin:
            what = "overlap" if begin < end else f"have {begin - end} unused bytes between them"
            _bad_tensors(path, f"{_shown(before)} and {_shown(after)} {what}")


def _bad_tensors(
    path: Path, reason: str, why: str = "not a well-formed safetensors file"
) -> NoReturn:
    raise FormatError(
        "E4101",
        f"{path.name} is damaged: {reason}.",
        why=why,
        fix=("download the file again", f"mbq-export inspect {path.name}"),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {_shown(key)} is there twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _deeper_than(value: object, levels: int) -> bool:
    """Measure nesting without recursion."""
    level = [value]
    for _ in range(levels):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _shown(text: str) -> str:
    """Quote a foreign name for a message: escaped, and not longer than a line."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
