"""Shared libraries read as files: what one is, what it holds, which GPUs it serves. Nothing is loaded.

Sections are found by name (System V ABI, "Object Files"). Device code lies in ``.nv_fatbin`` as containers, each
a header and entries of one image:

    container   u32 magic 0xba55ed50, u16 version, u16 header bytes, u64 bytes behind the header
    entry       u16 kind (1 PTX, 2 machine code), u16, u32 header bytes, u64 payload bytes, ... u32 at 28: SM

NVIDIA does not document the second part; it was read off libraries that ``cuobjdump`` lists, and a test compares
the two.
"""

import platform
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mbq_export.errors import FormatError

MACHINES: Final = {"x86_64": 62, "aarch64": 183}
"""ELF's numbers of the processors this project runs on."""
SHARED_OBJECT: Final = 3
HEADER_BYTES: Final = 64
LARGEST_BYTES: Final = 1 << 30
FATBIN_MAGIC: Final = 0xBA55ED50
FATBIN_HEADER: Final = struct.Struct("<IHHQ")
FATBIN_ENTRY: Final = struct.Struct("<HHIQ")
SM_OFFSET: Final = 28
KINDS: Final = {1: "compute", 2: "sm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLibrary:
    """A shared library for this machine's processor.

    Attributes:
        path: Where it lies.
        sections: Bytes of each section by name; empty for sections without any.
    """

    path: Path
    sections: dict[str, bytes]

    @classmethod
    def read(cls, path: Path) -> "SharedLibrary":
        """Read a file, refusing what the loader should never see.

        Raises:
            FormatError: E4701 for anything but a whole 64-bit shared library for this processor.
        """
        if not path.is_file() or path.stat().st_size > LARGEST_BYTES:
            raise _no_library(path, "a file of at most 1 GiB is wanted")
        data = path.read_bytes()
        if data[:4] != b"\x7fELF" or len(data) < HEADER_BYTES:
            raise _no_library(path, f"it starts with {data[:8]!r}, not with \\x7fELF")
        if data[4:6] != b"\x02\x01":
            raise _no_library(path, "it is not a 64-bit little-endian file")
        kind, machine = struct.unpack_from("<HH", data, 16)
        if kind != SHARED_OBJECT:
            raise _no_library(path, f"its type is {kind}, a shared object is {SHARED_OBJECT}")
        here = platform.machine()
        if machine != MACHINES.get(here):
            names = {number: name for name, number in MACHINES.items()}
            built = names.get(machine, f"processor {machine}")
            raise _no_library(path, f"it is for {built}, this machine is {here}")
        return cls(path=path, sections=_sections(path, data))

    @property
    def architectures(self) -> tuple[str, ...]:
        """GPUs it has code for: ``sm_89`` machine code, ``compute_120`` PTX; sorted."""
        return fatbin_architectures(self.sections.get(".nv_fatbin", b""))

    @property
    def machine_code_bytes(self) -> dict[str, int]:
        """Bytes of machine code by GPU, ``sm_89``, oldest first; PTX is none."""
        sizes = fatbin_bytes(self.sections.get(".nv_fatbin", b""))
        return {f"{kind}_{sm}": size for (kind, sm), size in sorted(sizes.items()) if kind == "sm"}


def fatbin_architectures(data: bytes) -> tuple[str, ...]:
    """List the images of every container in a section, each kind and SM once."""
    return tuple(
        f"{kind}_{sm}"
        for kind, sm in sorted(fatbin_bytes(data), key=lambda each: (each[0] != "sm", each[1]))
    )


def fatbin_bytes(data: bytes) -> Counter[tuple[str, int]]:
    """Bytes of the images of every container in a section, by kind and SM, as they lie there."""
    found: Counter[tuple[str, int]] = Counter()
    start = 0
    while start + FATBIN_HEADER.size <= len(data):
        magic, _, header, size = FATBIN_HEADER.unpack_from(data, start)
        if magic != FATBIN_MAGIC:  # containers are aligned to 8 bytes, with zeros between
            start += 8
            continue
        found += _images(data[start + header : start + header + size])
        start += max(header, FATBIN_HEADER.size) + size
    return found


def _images(entries: bytes) -> Counter[tuple[str, int]]:
    found: Counter[tuple[str, int]] = Counter()
    start = 0
    while start + SM_OFFSET + 4 <= len(entries):
        kind, _, header, size = FATBIN_ENTRY.unpack_from(entries, start)
        (sm,) = struct.unpack_from("<I", entries, start + SM_OFFSET)
        if kind not in KINDS or header == 0:
            break
        found[KINDS[kind], sm] += size
        start += header + size
    return found


def _sections(path: Path, data: bytes) -> dict[str, bytes]:
    table, (size, count, names) = (
        struct.unpack_from("<Q", data, 40)[0],
        struct.unpack_from("<HHH", data, 58),
    )
    if table == 0 or size != HEADER_BYTES or names >= count or table + size * count > len(data):
        raise _no_library(path, "its section table lies outside the file: it is truncated")
    # name, type, flags, address, offset, size
    rows = [struct.unpack_from("<IIQQQQ", data, table + size * index) for index in range(count)]
    occupied = [row[1] != 8 for row in rows]  # SHT_NOBITS takes no bytes of the file
    if any(row[4] + row[5] > len(data) for row, real in zip(rows, occupied, strict=True) if real):
        raise _no_library(path, "a section lies outside the file: it is truncated")
    strings = data[rows[names][4] : rows[names][4] + rows[names][5]]
    return {
        strings[row[0] :].split(b"\0", 1)[0].decode(errors="replace"): data[
            row[4] : row[4] + row[5]
        ]
        if real
        else b""
        for row, real in zip(rows, occupied, strict=True)
    }


def _no_library(path: Path, why: str) -> FormatError:
    return FormatError(
        "E4701",
        f"{path} is no shared library for this machine.",
        why=why,
        fix=("mbq-export plugins build", "name another file"),
    )
