"""Compile the plugin library from the installed sources into the user's cache.

The key is a hash of everything the result depends on: sources, compilers, TensorRT headers, GPUs. CMake finds the
tools and headers first, which takes seconds; what was compiled before with the same is not compiled again.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mbq_export import cache
from mbq_export.errors import BuildError, MachineError, ResourceError
from mbq_export.native import ChildResult, run_child, source_root, sources_sha256, tail
from mbq_export.plugin_library import (
    CACHE_KIND,
    FILE_NAME,
    RECORD_NAME,
    PluginLibrary,
    read_plugin_library,
)
from mbq_export.plugin_library.check import loaded
from mbq_export.plugin_library.machine_code import CODE, USUAL_CUDA, compiled_code
from mbq_export.progress import Progress, silent
from mbq_export.writing import json_bytes, write_file

CONFIGURE_SECONDS: Final = 300.0
BUILD_SECONDS: Final = 3600.0
WATCH_SECONDS: Final = 0.5
PERCENT: Final = re.compile(r"^\[ *(\d+)%\] (.*)$")
TOOLS: Final = {
    "cmake": "apt-get install cmake (3.24 or newer)",
    "nvcc": "install the CUDA toolkit, 12.6 or newer, and put its bin on PATH",
    "c++": "apt-get install g++",
    "make": "apt-get install make",
}
"""Programs and how to get them. nvcc is looked for in the toolkit's usual place too."""
HEADERS_MISSING: Final = "NvInferRuntime.h was not found"
SEARCHED: Final = re.compile(r"Searched: (.*?)\.\s+Install")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to compile, as the user says it.

    Attributes:
        sms: Compute capabilities; empty for all usual ones that the compiler knows.
        headers: Folder of NvInferRuntime.h; None to look in the usual places.
        jobs: Compilers at once.
    """

    sms: tuple[int, ...] = ()
    headers: Path | None = None
    jobs: int = 1


def build_plugin_library(recipe: Recipe, *, progress: Progress = silent) -> PluginLibrary:
    """Compile a library, load it once in a child, keep it in the cache; or find it there.

    Args:
        recipe: What for.
        progress: Called with the percentage and the file being compiled.

    Raises:
        MachineError: E3010 without a compiler, E3011 without TensorRT's headers, E3005 if the loader refuses the result.
        BuildError: E6006 if configuring or compiling fails.
        ResourceError: E5001, E5006, E5007 or E5008.
        FormatError: E4803 for a cache that is not safe to load from.
    """
    cache.folder(CACHE_KIND)  # refuse an unsafe cache before the work
    tools = {name: _tool(name) for name in TOOLS}
    with tempfile.TemporaryDirectory(prefix="mbq-plugins-") as place:
        folder = Path(place)
        found = _configured(recipe, tools, folder)
        sources = sources_sha256(source_root())
        key = _key(sources, found)
        with cache.making(CACHE_KIND, key, wait_s=BUILD_SECONDS) as staged:
            if staged is not None:
                library = _compiled(recipe, tools["cmake"], folder, progress)
                shutil.copyfile(library, staged / FILE_NAME)
                _describe(staged, sources, found)
                loaded(staged / FILE_NAME)
        entry = cache.lookup(CACHE_KIND, key)
    if entry is None:
        raise ResourceError(
            "E5001",
            f"The compiled library vanished from {cache.folder(CACHE_KIND)}.",
            why="it was damaged while it was written",
            fix="free space and run the same command again",
        )
    return read_plugin_library(entry / FILE_NAME, found="cache")


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=USUAL_CUDA)
    if found is None:
        raise MachineError(
            "E3010",
            f"{name} is not on the PATH.",
            why=f"the plugin library is compiled on this machine with {', '.join(TOOLS)}",
            fix=TOOLS[name],
        )
    return found


def _configured(recipe: Recipe, tools: dict[str, str], folder: Path) -> dict[str, str]:
    """Let CMake find everything; return what it found."""
    command = [tools["cmake"], "-S", str(source_root() / "plugins"), "-B", str(folder)]
    command += ["-G", "Unix Makefiles", f"-DCMAKE_CUDA_COMPILER={tools['nvcc']}"]
    if recipe.headers is not None:
        command.append(f"-DTENSORRT_INCLUDE_DIR={recipe.headers.absolute()}")
    if recipe.sms:
        images = [*(f"{sm}-real" for sm in sorted(recipe.sms)), f"{max(recipe.sms)}-virtual"]
        command.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(images)}")
    log = folder / "configure.log"
    result = run_child(command, log=log, timeout_s=CONFIGURE_SECONDS)
    if not result.ok:
        text = " ".join(line.strip() for line in log.read_text(errors="replace").splitlines())
        if HEADERS_MISSING in text:
            raise MachineError(
                "E3011",
                "TensorRT's headers were not found.",
                why=f"searched: {searched[1]}" if (searched := SEARCHED.search(text)) else text,
                fix=(
                    "apt-get install libnvinfer-headers-dev (Jetson, Ubuntu)",
                    "mbq-export plugins build --headers DIR (the folder of NvInferRuntime.h)",
                ),
            )
        raise _failed("CMake cannot configure the plugin library.", result, CONFIGURE_SECONDS)
    lines = (folder / "found.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def _key(sources: str, found: dict[str, str]) -> str:
    digest = hashlib.sha256(sources.encode())
    digest.update(repr(sorted((k, v) for k, v in found.items() if k != "headers_folder")).encode())
    for header in sorted(Path(found["headers_folder"]).glob("NvInfer*.h")):
        digest.update(header.name.encode() + b"\0" + header.read_bytes())
    return digest.hexdigest()


def _compiled(recipe: Recipe, cmake: str, folder: Path, progress: Progress) -> Path:
    log = folder / "build.log"
    command = [cmake, "--build", str(folder), "--parallel", str(max(1, recipe.jobs))]
    with _followed(log, progress):
        result = run_child(command, log=log, timeout_s=BUILD_SECONDS)
    if not result.ok:
        raise _failed("The plugin library does not compile.", result, BUILD_SECONDS)
    return folder / FILE_NAME


def _describe(staged: Path, sources: str, found: dict[str, str]) -> None:
    library = read_plugin_library(staged / FILE_NAME, found="cache")
    record = {
        **library.record,
        "nvcc": found["nvcc"],
        "sources_sha256": sources,
        CODE: compiled_code(library.path).as_json(),
    }
    write_file(staged / RECORD_NAME, json_bytes(record))


@contextlib.contextmanager
def _followed(log: Path, progress: Progress) -> Iterator[None]:
    """Report the percentages in a log that grows."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(WATCH_SECONDS):
            steps = [step for line in tail(log, 40) if (step := PERCENT.match(line))]
            if steps:
                progress(int(steps[-1][1]), 100, Path(steps[-1][2].split()[-1]).stem)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _failed(message: str, result: ChildResult, limit_s: float) -> BuildError | ResourceError:
    """Name the first error; the log outlives the folder it was written in."""
    if result.timed_out:
        return ResourceError(
            "E5006",
            f"{message} It ran longer than {limit_s:.0f} s and was ended.",
            why="compiling for one GPU takes minutes",
            fix="mbq-export plugins build --target DEVICE",
        )
    kept = Path(tempfile.gettempdir()) / f"mbq-plugins-{os.getpid()}.log"
    shutil.copyfile(result.log, kept)
    lines = kept.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\b(error|Error|fatal)\b", line)]
    return BuildError(
        "E6006",
        message,
        why=(errors or lines or ["it said nothing"])[0].strip(),
        fix=(f"see {kept}", "mbq-export doctor"),
    )
