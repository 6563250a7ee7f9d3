"""What the compiler made of a library's kernels, per GPU: how many, registers, spills, bytes. Nothing is run.

Bytes come from the file itself; the rest from ``cuobjdump``, which belongs to the CUDA toolkit and may be missing.
"""

import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from mbq_export.native import run_child
from mbq_export.plugin_library import RECORD_NAME, PluginLibrary
from mbq_export.plugin_library.elf import SharedLibrary
from mbq_export.reading import read_json

USUAL_CUDA: Final = "/usr/local/cuda/bin"
CODE: Final = "code"
"""Key of a library's record."""
TOOL_SECONDS: Final = 300.0
NO_TOOL: Final = (
    "cuobjdump is neither in the CUDA toolkit nor installed (pip install nvidia-cuda-cuobjdump)"
)
_USAGE: Final = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_ARCH: Final = re.compile(r"^arch = (sm_\d+)\w?$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelUse:
    """What one kernel takes.

    Attributes:
        registers: Per thread.
        spilled: Bytes of stack and local memory per thread.
    """

    registers: int
    spilled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCode:
    """The machine code for one GPU.

    Attributes:
        gpu: ``sm_89``.
        bytes: What it takes in the library.
        kernels: How many there are; None if nobody could read them.
        registers: Most that a kernel takes per thread.
        widest: The kernel that takes them.
        spills: Bytes of stack per thread by kernel, of those that have any.
    """

    gpu: str
    bytes: int
    kernels: int | None = None
    registers: int | None = None
    widest: str = ""
    spills: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledCode:
    """The machine code of a library.

    Attributes:
        gpus: One entry per GPU, oldest first.
        unread: Why only bytes are known; empty if all is.
    """

    gpus: tuple[GpuCode, ...]
    unread: str = ""

    def as_json(self) -> dict[str, Any]:
        """As ``plugin.json`` and the command's result have it."""
        return {"gpus": [asdict(each) for each in self.gpus], "unread": self.unread}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "CompiledCode":
        """Undo `as_json`."""
        return cls(gpus=tuple(GpuCode(**each) for each in found["gpus"]), unread=found["unread"])


def find_cuobjdump() -> Path | None:
    """The tool that reads device code: on PATH, in the CUDA toolkit, or in a package that carries it."""
    packages = Path(sysconfig.get_paths()["purelib"])
    carried = [
        packages / "nvidia" / "cu13" / "bin" / "cuobjdump",
        packages / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump",
    ]
    on_path = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=USUAL_CUDA)
    found = Path(on_path) if on_path else next(filter(Path.is_file, carried), None)
    if found is not None and not os.access(found, os.X_OK):
        found.chmod(0o755)  # some packages carry it without the bit
    return found


def compiled_code(library: Path) -> CompiledCode:
    """Read the machine code of a plugin library.

    Raises:
        FormatError: E4701 for a file that is no shared library.
    """
    sizes = SharedLibrary.read(library).machine_code_bytes
    tool = find_cuobjdump()
    if tool is None:
        return CompiledCode(
            gpus=tuple(GpuCode(gpu=gpu, bytes=size) for gpu, size in sizes.items()), unread=NO_TOOL
        )
    with tempfile.TemporaryDirectory(prefix="mbq-") as folder:
        log = Path(folder, "log")
        result = run_child([str(tool), "-res-usage", str(library)], log=log, timeout_s=TOOL_SECONDS)
        text = log.read_text(errors="replace")
        uses = usage_by_gpu(text) if result.ok else {}
        names = readable({name for kernels in uses.values() for name in kernels}, Path(folder))
    return CompiledCode(
        gpus=tuple(_summed(gpu, size, uses.get(gpu), names) for gpu, size in sizes.items()),
        unread="" if result.ok else f"{tool.name} failed: {' '.join(text.split())[-200:]}",
    )


def recorded_code(library: PluginLibrary) -> CompiledCode:
    """What was recorded beside a library when it was compiled; read from the library where that is not all.

    Raises:
        FormatError: E4604 for a record that cannot be read.
    """
    path = library.path.with_name(RECORD_NAME)
    record = read_json(path, code="E4604") if path.is_file() else {}
    if CODE in record and record.get("sha256") == library.sha256:
        found = CompiledCode.from_json(record[CODE])
        if not found.unread:
            return found
    return compiled_code(library.path)


def usage_by_gpu(text: str) -> dict[str, dict[str, KernelUse]]:
    """Kernels by GPU and symbol, from what ``cuobjdump -res-usage`` prints of a library with code for several."""
    found: dict[str, dict[str, KernelUse]] = {}
    _, *parts = _ARCH.split(text)
    for gpu, part in zip(parts[::2], parts[1::2], strict=True):
        kernels = usage(part)
        if kernels:
            found.setdefault(gpu, {}).update(kernels)
    return found


def usage(text: str) -> dict[str, KernelUse]:
    """Kernels by symbol, from what ``cuobjdump -res-usage`` prints of one file."""
    return {
        symbol: KernelUse(registers=int(registers), spilled=int(stack) + int(local))
        for symbol, registers, stack, local in _USAGE.findall(text)
    }


def readable(symbols: Iterable[str], folder: Path) -> dict[str, str]:
    """Short names of kernels, ``skinny<WeightOnly<W3, F16, 1>, 2, 1>``, by symbol; the symbol without ``c++filt``."""
    mangled = sorted(symbols)
    if not mangled or shutil.which("c++filt") is None:
        return {symbol: symbol for symbol in mangled}
    log = folder / "names"
    result = run_child(["c++filt", *mangled], log=log, timeout_s=TOOL_SECONDS)
    lines = log.read_text().splitlines() if result.ok else mangled
    log.unlink()
    return {symbol: short_name(line) for symbol, line in zip(mangled, lines, strict=True)}


def short_name(demangled: str) -> str:
    """``skinny<WeightOnly<W3, F16, 1>, 2, 1>`` of ``void mbq::skinny<...>(...)``."""
    bare = demangled.removeprefix("void ").replace("mbq::", "")
    return bare[: bare.rindex("(")] if "(" in bare else bare


def rows(code: CompiledCode) -> Sequence[tuple[str, str, str, str, str]]:
    """For people: GPU, kernels, most registers, kernels that spill, bytes."""
    return [
        (
            each.gpu,
            "not read" if each.kernels is None else str(each.kernels),
            "not read" if each.registers is None else f"{each.registers} ({each.widest})",
            "not read" if each.kernels is None else str(len(each.spills) or "none"),
            f"{each.bytes:,}",
        )
        for each in code.gpus
    ]


def _summed(
    gpu: str, size: int, kernels: Mapping[str, KernelUse] | None, names: Mapping[str, str]
) -> GpuCode:
    if not kernels:
        return GpuCode(gpu=gpu, bytes=size)
    named = {names[symbol]: use for symbol, use in sorted(kernels.items())}
    widest = max(named, key=lambda name: (named[name].registers, name))
    return GpuCode(
        gpu=gpu,
        bytes=size,
        kernels=len(kernels),
        registers=named[widest].registers,
        widest=widest,
        spills={name: use.spilled for name, use in sorted(named.items()) if use.spilled},
    )
