"""What the compiled library shows to the dynamic linker: two functions, and no TensorRT or driver library behind it."""

import re
import sys
from pathlib import Path

import pytest

from mbq_export.plugin_library import FILE_NAME, PLUGIN_ABI, read_plugin_library
from tests.plugins import compiled

EXPORTS = {"getCreators", "setLoggerFinder"}
SYSTEM_LIBRARIES = re.compile(
    r"^(libc|libm|libstdc\+\+|libgcc_s|libdl|librt|libpthread|ld-linux[-\w]*)\.so"
)
FOREIGN = re.compile(
    r"nvinfer|createInfer|getLogger|getPluginRegistry|^cu[A-Z]|^cuda|^__cuda|nvml", re.IGNORECASE
)


def symbols(library: Path, *options: str) -> list[str]:
    found = compiled.run([compiled.tool("nm"), "-D", *options, library])
    assert found.returncode == 0, found.stderr
    return [line.split()[-1].partition("@")[0] for line in found.stdout.splitlines()]


def check_surface(library: Path) -> None:
    """Assert what this file is about."""
    assert set(symbols(library, "--defined-only")) == EXPORTS
    assert [name for name in symbols(library, "--undefined-only") if FOREIGN.search(name)] == []
    dynamic = compiled.run([compiled.tool("readelf"), "-d", library]).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed
    assert [name for name in needed if not SYSTEM_LIBRARIES.match(name)] == []
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic


@pytest.mark.nvcc
@pytest.mark.slow
def test_the_library_exports_two_functions_and_needs_no_tensorrt_and_no_driver() -> None:
    check_surface(compiled.cuda_library())


def test_the_check_sees_a_third_symbol() -> None:
    with pytest.raises(AssertionError):
        check_surface(compiled.emulated_library())  # it exports what watches memory


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cmake_makes_the_same_library_from_objects_made_before(tmp_path: Path) -> None:
    objects = ";".join(map(str, compiled.kernel_objects(emulated=False)))
    configured = compiled.run(
        [
            *(compiled.tool("cmake"), "-S", compiled.ROOT / "plugins", "-B", tmp_path),
            *(f"-DCMAKE_CUDA_ARCHITECTURES={compiled.SM}-real", f"-DMBQ_KERNEL_OBJECTS={objects}"),
            *("-DMBQ_ALLOW_WHEEL_HEADERS=ON", f"-DPython3_EXECUTABLE={sys.executable}"),
        ]
    )
    assert configured.returncode == 0, configured.stderr
    assert re.search(r"TensorRT headers: \d+\.\d+\.\d+ in /", configured.stdout)
    built = compiled.run([compiled.tool("cmake"), "--build", tmp_path])
    assert built.returncode == 0, built.stderr
    library = read_plugin_library(tmp_path / FILE_NAME, found="cache")
    check_surface(library.path)
    assert library.abi == PLUGIN_ABI
    assert f"sm_{compiled.SM}" in library.archs
    assert library.headers in configured.stdout
