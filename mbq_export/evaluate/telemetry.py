"""The machine while it is measured: what it is, who else uses it, how fast it reads memory.

Clocks, power modes and temperatures are read where the kernel shows them and never set. What nobody shows is
null with a reason.
"""

import ctypes
import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from mbq_export.backends.ort import granted_cpus, installed_packages
from mbq_export.native import available_memory
from mbq_export.runtime.timing import peak_rss_bytes, rss_bytes

CPU_INFO: Final = "/proc/cpuinfo"
SYSTEM_STAT: Final = "/proc/stat"
CACHE_FOLDER: Final = "/sys/devices/system/cpu/cpu0/cache"
FREQUENCY: Final = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"

ALL_CPUS: Final = "cpu "
USER, NICE, SYSTEM, IRQ, SOFT_IRQ, STEAL = 0, 1, 2, 5, 6, 7
BUSY_FIELDS: Final = (USER, NICE, SYSTEM, IRQ, SOFT_IRQ, STEAL)
"""Columns of the kernel's CPU times that mean work, ours or that of others; steal is another machine's."""

RESET_PEAK: Final = "/proc/self/clear_refs"
PEAK_ONLY: Final = "5"

SMALLEST_BUFFER: Final = 256 << 20
CACHES: Final = 4
"""A buffer this many times as large as the last cache is read from memory, whatever is kept of it."""

PIECE: Final = 64 << 20
"""Least bytes one thread reads per timing, so that starting it costs nothing beside the reading."""

SMALLEST_SHARE: Final = 64 << 10
"""Below this, calling the search costs as much as reading."""

PASSES: Final = 5
FILLING: Final = 1
ABSENT: Final = 0


@dataclass(frozen=True, kw_only=True)
class Load:
    """CPU time used between two moments, as shares of all CPUs.

    Attributes:
        seconds: Wall time.
        own: This process.
        others: Everybody else, other machines on the same host included; None where nobody tells.
    """

    seconds: float
    own: float
    others: float | None


class LoadMeter:
    """Watches who uses the CPUs from its making to `read`."""

    def __init__(self) -> None:
        """Start."""
        self._started = time.perf_counter()
        self._own = time.process_time()
        self._busy = busy_seconds()

    def read(self) -> Load:
        """Return the shares since the start."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        cpus = os.cpu_count() or 1
        own = (time.process_time() - self._own) / seconds / cpus
        busy = busy_seconds()
        others = None
        if busy is not None and self._busy is not None:
            others = max(0.0, (busy - self._busy) / seconds / cpus - own)
        return Load(seconds=seconds, own=own, others=others)


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """How fast memory of one size is read.

    Attributes:
        size: Bytes of the buffer.
        threads: Threads that read parts of it at once.
        best_gb_s: Fastest pass: what the machine can do.
        passes_gb_s: All passes.
    """

    size: int
    threads: int
    best_gb_s: float
    passes_gb_s: tuple[float, ...]

    @classmethod
    def measure(cls, size: int, *, threads: int = 0, passes: int = PASSES) -> Self:
        """Read a buffer again and again, looking for a byte it does not hold.

        The C library's ``memchr`` does nothing but read, with the widest loads the CPU has.

        Args:
            size: Bytes; at least `SMALLEST_SHARE` per thread are read.
            threads: 0 takes all CPUs of this process.
            passes: Timings to take, at least 1.
        """
        threads = threads or granted_cpus()
        share = max(SMALLEST_SHARE, size // threads)
        buffer = np.full(share * threads, FILLING, np.uint8)
        rounds = max(1, PIECE // share)
        scan = _memchr()

        def read(part: int) -> None:
            for _ in range(rounds):
                scan(buffer.ctypes.data + part * share, ABSENT, share)

        rates = []
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))
            for _ in range(passes):
                start = time.perf_counter_ns()
                list(pool.map(read, range(threads)))
                rates.append(buffer.nbytes * rounds / (time.perf_counter_ns() - start))
        return cls(
            size=buffer.nbytes, threads=threads, best_gb_s=max(rates), passes_gb_s=tuple(rates)
        )

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "bytes": self.size,
            "threads": self.threads,
            "gb_s": self.best_gb_s,
            "passes_gb_s": list(self.passes_gb_s),
            "source": "measured",
            "method": "fastest of several passes of memchr over the whole buffer",
        }


def memory_bandwidth(*, threads: int = 0) -> Bandwidth:
    """Measure reads from memory: the buffer exceeds every cache, within what memory is free."""
    wanted = max(SMALLEST_BUFFER, CACHES * (last_cache_bytes() or 0))
    return Bandwidth.measure(min(wanted, available_memory() // 2), threads=threads)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Resident memory some work added, in bytes.

    Attributes:
        kept: Added for good; None where the system does not tell.
        peak: Added at most while it ran; None where peaks cannot be reset.
    """

    kept: int | None
    peak: int | None


class MemoryMeter:
    """Watches resident memory from its making to `read`; memory that lies idle is given back first."""

    def __init__(self) -> None:
        """Start."""
        give_back()
        self._resets = _reset_peak()
        self._before = rss_bytes()

    def read(self) -> Growth:
        """Return what was added since the start."""
        now, peak = rss_bytes(), peak_rss_bytes()
        if self._before is None or now is None or peak is None:
            return Growth(kept=None, peak=None)
        return Growth(kept=now - self._before, peak=peak - self._before if self._resets else None)


def give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    """Let the kernel count this process's peak anew; False where it does not allow that."""
    try:
        Path(RESET_PEAK).write_text(PEAK_ONLY)
    except OSError:
        return False
    return True


def last_cache_bytes() -> int | None:
    """Return the size of the largest cache of the first CPU; None where the kernel does not tell."""
    sizes = []
    for path in Path(CACHE_FOLDER).glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=None)


def busy_seconds() -> float | None:
    """Return the CPU time all processes have used since the machine started; None where nobody tells."""
    try:
        lines = Path(SYSTEM_STAT).read_text().splitlines()
    except OSError:
        return None
    ticks = [line.split()[1:] for line in lines if line.startswith(ALL_CPUS)]
    if not ticks:
        return None
    return sum(int(ticks[0][field]) for field in BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")


def environment() -> dict[str, Any]:
    """Describe the machine and the packages, for comparing results: no host name, no path."""
    megahertz = _frequency_mhz()
    cache = last_cache_bytes()
    return {
        "cpu": cpu_name(),
        "cpus": granted_cpus(),
        "last_cache_bytes": cache,
        **({} if cache else {"last_cache_bytes_why": "the kernel shows no cache sizes"}),
        "cpu_mhz": megahertz,
        **({} if megahertz else {"cpu_mhz_why": "the kernel shows no CPU frequency"}),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": _versions(),
        "gpu": None,
        "gpu_why": "the engines ran on the CPU",
        "temp_c": None,
        "temp_c_why": "CPU temperatures are not read",
    }


def cpu_name() -> str:
    """Return the CPU's name as the kernel spells it, else what Python knows."""
    try:
        lines = Path(CPU_INFO).read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _frequency_mhz() -> float | None:
    try:
        return int(Path(FREQUENCY).read_text()) / 1000
    except (OSError, ValueError):
        return None


def _versions() -> Mapping[str, str]:
    others = {name: metadata.version(name) for name in ("numpy", "transformers")}
    return {**installed_packages(), **others}


def _memchr() -> Any:
    function = ctypes.CDLL(None).memchr
    function.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    function.restype = ctypes.c_void_p
    return function
