"""What this machine can do: one row per thing that commands rely on, with what would mend it.

Nothing is written and nothing is fixed; libraries are looked up, not loaded. What may hang (a driver's tool)
runs in a child with a time limit.
"""

import importlib.util
import locale
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Final

from mbq_export.backends import BACKENDS
from mbq_export.backends.ort import check_packages, installed_packages
from mbq_export.bundle import Bundle
from mbq_export.errors import MachineError, MbqError
from mbq_export.native import available_memory, local_gpu
from mbq_export.plugin_library import cached_libraries
from mbq_export.target import GRAPHS, Target

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"
SKIP: Final = "skip"

OLDEST_PYTHON: Final = (3, 11)
ENOUGH_MEMORY_BYTES: Final = 3 << 30
ENOUGH_DISK_BYTES: Final = 2 << 30
ENOUGH_FILES: Final = 256

PACKAGES: Final = (
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "numpy",
    "safetensors",
    "pillow",
)
USES: Final = {
    "build": ("python", "packages", "memory", "disk", "onnxruntime"),
    "build:rtx": ("python", "packages", "memory", "disk", "onnxruntime", "rtx"),
    "validate": ("python", "packages", "memory", "onnxruntime", "bundle"),
    "run": ("python", "packages", "onnxruntime", "bundle"),
    "bench": ("python", "packages", "onnxruntime", "bundle"),
}
"""Checks that a use needs; a failed one makes it impossible. A bundle is checked only if one is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One check.

    Attributes:
        id: Short name.
        found: What is there.
        needed: What is wanted.
        status: ``ok``, ``warn``, ``fail`` or ``skip``.
        fix: What to type; empty when nothing is wrong.
    """

    id: str
    found: str
    needed: str
    status: str
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """Form of the JSON document."""
        return {
            "id": self.id,
            "found": self.found,
            "needed": self.needed,
            "status": self.status,
            "fix": self.fix,
        }


def examine(*, output: Path, bundle: Path | None = None) -> list[Row]:
    """Run every check.

    Args:
        output: Where output would go; its disk is measured.
        bundle: A bundle that should work here, or None.
    """
    checks: list[Callable[[], Row]] = [
        _python,
        _packages,
        _onnxruntime,
        _backend_rtx,
        _backend_trt,
        _memory,
        lambda: _disk(output),
        _open_files,
        _encoding,
        _shadow,
        _gpu,
        lambda: _tool("nvcc", "to compile kernels; not needed for engines of the qdq lowering"),
        lambda: _tool("cmake", "to compile plugins; not needed for engines of the qdq lowering"),
        _plugins,
    ]
    rows = [check() for check in checks]
    return rows if bundle is None else [*rows, _bundle(bundle)]


def uses(rows: Iterable[Row]) -> dict[str, bool]:
    """Whether each use can work: none of its checks failed."""
    failed = {row.id for row in rows if row.status == FAIL}
    return {use: not failed & set(needs) for use, needs in USES.items()}


def demand(rows: list[Row], use: str) -> None:
    """Refuse a use that cannot work.

    Raises:
        MachineError: E3015, with the fix of every failed check.
    """
    failed = [row for row in rows if row.status == FAIL and row.id in USES[use]]
    if failed:
        raise MachineError(
            "E3015",
            f"{use} cannot work here: {', '.join(row.id for row in failed)}.",
            why="; ".join(f"{row.id}: found {row.found}, needed {row.needed}" for row in failed),
            fix=tuple(row.fix for row in failed),
        )


def report_rows(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """(check, status, found) for a table; what is needed is worth a line only where it is missing."""
    return [(row.id, row.status, row.found) for row in rows]


def advice(rows: Iterable[Row]) -> list[str]:
    """What is needed and what to type, for each check that is not as it should be."""
    return [
        line
        for row in rows
        if row.status in {WARN, FAIL}
        for line in ("", f"{row.status}  {row.id}: needed {row.needed}", f"  fix  {row.fix}")
    ]


def _python() -> Row:
    good = sys.version_info >= OLDEST_PYTHON
    return Row(
        id="python",
        found=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        needed=f">= {'.'.join(map(str, OLDEST_PYTHON))}",
        status=OK if good else FAIL,
        fix="" if good else "install a newer Python",
    )


def _packages() -> Row:
    missing = [name for name in PACKAGES if not _version(name)]
    found = ", ".join(f"{name} {_version(name)}" for name in PACKAGES if _version(name))
    return Row(
        id="packages",
        found=found,
        needed=", ".join(PACKAGES),
        status=FAIL if missing else OK,
        fix=f"pip install {' '.join(missing)}" if missing else "",
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _onnxruntime() -> Row:
    packages = installed_packages()
    try:
        check_packages(packages)
    except MachineError as error:
        return Row(
            id="onnxruntime",
            found=", ".join(packages) or "nothing",
            needed="onnxruntime or onnxruntime-gpu, not both",
            status=FAIL,
            fix=error.fix[0],
        )
    available = BACKENDS["ort"].available()
    return Row(
        id="onnxruntime",
        found=available.found,
        needed=available.needed,
        status=OK if available.ok else FAIL,
        fix=available.fix,
    )


def _backend_rtx() -> Row:
    available = BACKENDS["rtx"].available()
    return Row(
        id="rtx",
        found=available.found,
        needed=available.needed,
        status=OK if available.ok else FAIL,
        fix=available.fix,
    )


def _backend_trt() -> Row:
    """Full TensorRT, which lives on devices: what its version reads decides the graphs."""
    available = BACKENDS["trt"].available()
    numbers = [int(part) for part in available.version.split(".")[:2] if part.isdecimal()]
    level = -1
    if len(numbers) == 2:
        level = replace(Target.parse("sm87:trt"), version=(numbers[0], numbers[1])).op_level
    told = f": {GRAPHS[level]}" if level >= 0 else ""
    return Row(
        id="trt",
        found=f"{available.found}{told}",
        needed="10.3 or newer, on the device that engines are for",
        status=SKIP if not available.ok else OK if told else WARN,
        fix="" if told or not available.ok else "install TensorRT 10.3 or newer",
    )


def _memory() -> Row:
    free = available_memory()
    good = free >= ENOUGH_MEMORY_BYTES
    return Row(
        id="memory",
        found=f"{free / 2**30:.1f} GiB free, {os.cpu_count()} CPUs",
        needed="2.5 GiB for the sample model; about ten times its weights for another",
        status=OK if good else WARN,
        fix="" if good else "close other programs",
    )


def _disk(output: Path) -> Row:
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    writable = place.is_dir() and os.access(place, os.W_OK)
    good = free >= ENOUGH_DISK_BYTES and writable
    return Row(
        id="disk",
        found=f"{free / 2**30:.1f} GiB free{'' if writable else ', not writable'}",
        needed="writable; about six times the model's weights",
        status=OK if good else FAIL,
        fix="" if good else "free space, or choose another -o",
    )


def _open_files() -> Row:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES
    return Row(
        id="open files",
        found=str(soft),
        needed=f">= {ENOUGH_FILES}",
        status=OK if good else WARN,
        fix="" if good else f"ulimit -n {ENOUGH_FILES}",
    )


def _encoding() -> Row:
    found = locale.getpreferredencoding(do_setlocale=False)
    good = found.upper().replace("-", "") == "UTF8"
    return Row(
        id="encoding",
        found=found,
        needed="UTF-8",
        status=OK if good else WARN,
        fix="" if good else "export LC_ALL=C.UTF-8",
    )


def _shadow() -> Row:
    """A folder named kernels on the import path hides another project's package of that name."""
    spec = importlib.util.find_spec("kernels")
    stray = spec is not None and spec.origin is not None and "site-packages" not in spec.origin
    return Row(
        id="kernels package",
        found="a stray top-level package" if stray else "none",
        needed="none outside site-packages",
        status=WARN if stray else OK,
        fix="remove __init__.py from that folder" if stray else "",
    )


def _gpu() -> Row:
    gpu = local_gpu()
    return Row(
        id="gpu",
        found="none" if gpu is None else f"{gpu.name}, sm{gpu.sm}, driver {gpu.driver}",
        needed="only to run engines; building them for RTX cards needs none",
        status=SKIP if gpu is None else OK,
    )


def _tool(name: str, purpose: str) -> Row:
    found = shutil.which(name)
    return Row(id=name, found=found or "none", needed=purpose, status=OK if found else SKIP)


def _plugins() -> Row:
    try:
        libraries = cached_libraries()
    except MbqError as error:
        return Row(
            id="plugins",
            found=error.message,
            needed="a cache that only you can write to",
            status=WARN,
            fix=error.fix[0],
        )
    found = "; ".join(f"{' '.join(each.archs)}, TensorRT {each.headers}" for each in libraries)
    return Row(
        id="plugins",
        found=found or "none",
        needed="for engines of the plugin lowering: mbq-export plugins build",
        status=OK if libraries else SKIP,
    )


def _bundle(path: Path) -> Row:
    try:
        bundle = Bundle.open(path, verify=True)
    except MbqError as error:
        return Row(
            id="bundle",
            found=error.message,
            needed="a sealed bundle",
            status=FAIL,
            fix=error.fix[0],
        )
    return Row(
        id="bundle", found=f"sha256 {bundle.sha256[:16]}", needed="a sealed bundle", status=OK
    )
