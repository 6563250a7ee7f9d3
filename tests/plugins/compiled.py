"""The plugin library and the programs that drive it, compiled once per state of their sources.

    python -m tests.plugins.compiled 90       build/gpu-plugins: what the tests on an H100 need, made where headers are

The emulated library is the product's plugins over the kernels that run on a CPU: same glue, same kernel sources, and
``enqueue`` computes.
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from mbq_export.native import local_gpu

ROOT: Final = Path(__file__).resolve().parents[2]
OUT: Final = ROOT / "build" / "plugins"
FOR_GPU: Final = ROOT / "build" / "gpu-plugins"
"""Where files for the tests on another machine's GPU are put."""
HOST: Final = ROOT / "tests/plugins/host"
PLUGIN_SOURCES: Final = (
    "plugins/common/linear_spec.cpp",
    "plugins/exports.cpp",
    *(f"plugins/{op}/plugin.cpp" for op in ("w3_linear", "w4a16_linear", "w4a8_linear")),
)
WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")
ASAN: Final = ("-fsanitize=address", "-g", "-fno-omit-frame-pointer")
SM: Final = 89
"""The one architecture that tests compile for; all of them take minutes."""
EXPORTS: Final = "getCreators; setLoggerFinder;"
WATCHED: Final = "mbq_emulation_register; mbq_emulation_forget_all; mbq_emulation_message;"


def tool(name: str) -> str:
    """Path of a program, or a skip that names it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on PATH")
    return found


def run(command: Sequence[object], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def tensorrt_headers() -> Path:
    """Folder of NvInferRuntime.h, or a skip that says where it was looked for."""
    wheel = importlib.util.find_spec("kernel_lens")
    named = os.environ.get("TENSORRT_INCLUDE_DIR")
    places = [Path(named)] if named else []
    places += [Path("/usr/include") / f"{machine}-linux-gnu" for machine in ("x86_64", "aarch64")]
    places += [
        Path(root) / "include/tensorrt"
        for root in (wheel and wheel.submodule_search_locations) or ()
    ]
    for place in places:
        if (place / "NvInferRuntime.h").is_file():
            return place
    pytest.skip("no TensorRT headers: set TENSORRT_INCLUDE_DIR, or pip install kernel-lens==2.0.1")


def cuda_headers() -> Path:
    """Folder of cuda_runtime_api.h, or a skip."""
    compiler = shutil.which("nvcc")
    roots = [Path(compiler).resolve().parents[1]] if compiler else []
    for place in [root / "include" for root in [*roots, Path("/usr/local/cuda")]]:
        if (place / "cuda_runtime_api.h").is_file():
            return place
    pytest.skip("no CUDA headers: install the CUDA toolkit")


@functools.cache
def kernel_build() -> ModuleType:
    """``kernels/build.py``, which keeps objects by the hash of what they are made from."""
    spec = importlib.util.spec_from_file_location("mbq_kernel_build", ROOT / "kernels/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def kernel_objects(*, emulated: bool, sm: int = SM) -> list[Path]:
    """Object files of the kernel library."""
    build = kernel_build()
    plan = build.Plan(emulated=True) if emulated else build.Plan(sms=(sm,))
    found: list[Path] = build.compiled(
        plan, ["-c"], suffix=".o", objects=ROOT / "build/objects", jobs=1
    )
    return found


def includes(*, tensorrt: bool = True) -> list[str]:
    """Flags of every C++ compilation here."""
    own = [f"-I{ROOT / folder}" for folder in ("plugins", "plugins/common", "kernels/include")]
    if not tensorrt:
        return own
    return [*own, "-isystem", str(tensorrt_headers()), "-isystem", str(cuda_headers())]


def made(name: str, command: Sequence[object], inputs: Sequence[Path]) -> Path:
    """What a compiler makes of its inputs; made again when any of them, or the command, changed."""
    headers = [
        *(ROOT / "plugins").rglob("*.h"), *HOST.glob("*.h"), *(ROOT / "kernels/include").rglob("*.h"),
    ]  # fmt: skip
    digest = hashlib.sha256(repr([str(word) for word in command]).encode())
    for path in [*inputs, *sorted(headers)]:
        digest.update(path.read_bytes())
    out = OUT / f"{digest.hexdigest()[:16]}-{name}"
    if not out.is_file():
        OUT.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
        outcome = run([*command, *inputs, "-o", partial])
        assert outcome.returncode == 0, outcome.stderr
        partial.replace(out)
    return out


def plugin_objects(flags: Sequence[str] = ()) -> list[Path]:
    """Object files of the plugins."""
    base = [tool("g++"), "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", *WARNINGS, *flags]
    command = [*base, *includes(), "-c"]
    return [
        made(f"{Path(source).parent.name}_{Path(source).stem}.o", command, [ROOT / source])
        for source in PLUGIN_SOURCES
    ]


def version_script(symbols: str) -> Path:
    """A linker's list of what a library exports."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{hashlib.sha256(symbols.encode()).hexdigest()[:8]}.map"
    path.write_text(f"{{ global: {symbols} local: *; }};\n")
    return path


def emulated_library(flags: Sequence[str] = (), extra: Sequence[Path] = ()) -> Path:
    """The plugins over the emulated kernels; exports what watches memory beside the two functions."""
    script = version_script(f"{EXPORTS} {WATCHED}")
    command = [tool("g++"), "-shared", *flags, f"-Wl,--version-script={script}"]
    objects = [*plugin_objects(flags), *kernel_objects(emulated=True), *extra]
    return made("emulated.so", command, objects)


def cuda_library(sm: int = SM) -> Path:
    """The product's library for one architecture."""
    command = [
        *(tool("nvcc"), "-shared", "-cudart", "static"),
        *(
            "-Xlinker",
            f"--version-script={ROOT / 'plugins/exports.map'}",
            "-Xlinker",
            "--no-undefined",
        ),
    ]
    return made("cuda.so", command, [*plugin_objects(), *kernel_objects(emulated=False, sm=sm)])


def host_program(flags: Sequence[str] = ()) -> Path:
    """The program that drives a plugin library without TensorRT."""
    command = [tool("g++"), "-std=c++17", "-O1", *WARNINGS, *flags, *includes(), "-ldl"]
    return made("host", command, [HOST / "host.cpp"])


def for_this_gpu() -> tuple[Path, Path]:
    """Library and host program for this machine's GPU: brought along, or compiled here."""
    found = [FOR_GPU / name for name in ("libmbq_trt_plugins.so", "host")]
    if all(path.is_file() for path in found):
        return found[0], found[1]
    gpu = local_gpu()
    return cuda_library(SM if gpu is None else gpu.sm), gpu_host_program()


def gpu_host_program() -> Path:
    """The host program, computing on the GPU of this machine."""
    command = [tool("nvcc"), "-std=c++17", "-DMBQ_HOST_CUDA", "-cudart", "static", *includes()]
    return made("gpu_host", command, [HOST / "host.cpp"])


def unit_program() -> Path:
    """Checks of what the plugins decide, without TensorRT and CUDA headers."""
    command = [tool("g++"), "-std=c++17", "-O1", *WARNINGS, *includes(tensorrt=False)]
    sources = [HOST / "linear_spec_test.cpp", ROOT / "plugins/common/linear_spec.cpp"]
    return made("unit", command, [*sources, *kernel_objects(emulated=True)])


def defective_library(defect: str) -> Path:
    """A library with a planted defect; the names are in ``host/defective.cpp``."""
    command = [
        *(tool("g++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-w"),
        *(f"-DDEFECT={defect.upper().replace('-', '_')}", *includes()),
    ]
    return made(f"{defect}.so", command, [HOST / "defective.cpp"])


def main(sm: int) -> None:
    """Make what the tests on a GPU need."""
    FOR_GPU.mkdir(parents=True, exist_ok=True)
    shutil.copy(cuda_library(sm), FOR_GPU / "libmbq_trt_plugins.so")
    shutil.copy(gpu_host_program(), FOR_GPU / "host")


if __name__ == "__main__":
    main(int(sys.argv[1]))
