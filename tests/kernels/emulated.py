"""Compile kernels for the CPU, and hand them memory whose edges are watched."""

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from enum import IntEnum
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

ROOT: Final = Path(__file__).resolve().parents[2]
CASES: Final = Path(__file__).resolve().parent / "emulation_cases"
EMULATION: Final = sorted((ROOT / "kernels/emulation").glob("*.cpp"))
FLAGS: Final = (
    *("g++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror"),
    *("-x", "c++", "-DMBQ_EMULATION"),
    *(f"-I{ROOT / 'kernels' / folder}" for folder in ("include", "emulation", "src")),
)
GUARD: Final = 256
"""Bytes before and behind every buffer; also its alignment, as on a device."""
GUARD_BYTE: Final = 0xA5


class Schedule(IntEnum):
    """Who goes on when a thread waits."""

    FORWARD = 0
    REVERSE = 1
    SHUFFLED = 2
    SKEWED = 3


class BlockOrder(IntEnum):
    """Which block comes next."""

    FORWARD = 0
    REVERSE = 1
    ROTATED = 2
    SHUFFLED = 3


EVERY_ORDER: Final = [
    (schedule, seed, order) for schedule, seed, order in product(Schedule, range(3), BlockOrder)
]


def compiled(name: str, sources: Sequence[Path], flags: Sequence[str] = ("-shared",)) -> Path:
    """Path of the compiled sources; made anew only when any source of the kernels changed."""
    digest = hashlib.sha256(repr((FLAGS, flags)).encode())
    headers = [
        *(ROOT / "kernels/include/mbq").iterdir(),
        *(ROOT / "kernels/emulation").iterdir(),
        *(ROOT / "kernels/src").iterdir(),
    ]
    for path in [*sources, *sorted(headers)]:
        digest.update(path.read_bytes())
    out = ROOT / "build" / "emulation" / f"{name}-{digest.hexdigest()[:16]}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        half_done = out.with_suffix(".new")
        command = [*FLAGS, *flags, *map(str, sources), "-o", str(half_done)]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, outcome.stderr
        half_done.replace(out)
    return out


def loaded(path: Path) -> ctypes.CDLL:
    """An emulated library with the types of its control functions."""
    library = ctypes.CDLL(str(path))
    library.mbq_emulation_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    library.mbq_emulation_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mbq_emulation_message.restype = ctypes.c_char_p
    return library


class Buffer:
    """Memory of a kernel between two guard zones.

    Attributes:
        bytes: (size,) uint8, what the kernel may touch.
        writable: False if a store to it is a fault.
    """

    def __init__(self, size: int, *, writable: bool = False) -> None:
        raw = np.full(size + 3 * GUARD, GUARD_BYTE, np.uint8)
        begin = GUARD + -raw.ctypes.data % GUARD
        self._before, self._behind = raw[begin - GUARD : begin], raw[begin + size :][:GUARD]
        self.bytes: NDArray[np.uint8] = raw[begin : begin + size]
        self.writable = writable

    @classmethod
    def of(cls, array: NDArray[np.generic]) -> "Buffer":
        """A read-only copy of an array."""
        buffer = cls(array.nbytes)
        buffer.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return buffer

    @property
    def pointer(self) -> int:
        """Address of the first byte."""
        return self.bytes.ctypes.data

    def register(self, library: ctypes.CDLL) -> None:
        """Allow the library's kernels to touch it."""
        status = library.mbq_emulation_register(self.pointer, self.bytes.nbytes, int(self.writable))
        assert status == 0

    def assert_guards_intact(self) -> None:
        """Fail if something wrote next to the buffer."""
        assert (self._before == GUARD_BYTE).all(), "written before the buffer"
        assert (self._behind == GUARD_BYTE).all(), "written behind the buffer"
