"""Compiling the plugin library: what is missing is named, what fails leaves nothing, what was made is found again."""

import re
import shutil
from pathlib import Path

import pytest

from mbq_export import cache
from mbq_export.errors import BuildError, FormatError, MachineError
from mbq_export.plugin_library import build, find_plugin_library
from mbq_export.plugin_library.build import Recipe, build_plugin_library
from mbq_export.plugin_library.check import check_plugin_library
from mbq_export.plugin_library.machine_code import compiled_code
from mbq_export.reading import read_json
from tests.plugins import compiled

OLD_VERSION = """
#define NV_TENSORRT_MAJOR 8
#define NV_TENSORRT_MINOR 6
#define NV_TENSORRT_PATCH 1
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MBQ_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    return tmp_path


@pytest.fixture
def tools() -> None:
    for name in build.TOOLS:
        compiled.tool(name)


@pytest.mark.parametrize("missing", list(build.TOOLS))
def test_a_missing_tool_is_named_with_what_installs_it(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = shutil.which
    monkeypatch.setattr(
        shutil,
        "which",
        lambda name, path=None: None if name == missing else which(name) or "/bin/x",
    )
    with pytest.raises(MachineError, match=re.escape(f"{missing} is not on the PATH.")) as caught:
        build_plugin_library(Recipe(sms=(89,)))
    assert caught.value.code == "E3010"
    assert caught.value.fix == (build.TOOLS[missing],)


@pytest.mark.nvcc
@pytest.mark.usefixtures("tools")
def test_missing_headers_are_an_error_that_says_where_they_were_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if any(Path("/usr/include").glob("*/NvInferRuntime.h")):
        pytest.skip("this machine has TensorRT's headers")
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(MachineError, match="headers were not found") as caught:
        build_plugin_library(Recipe(sms=(89,)))
    assert caught.value.code == "E3011"
    assert f"searched: {tmp_path}/nowhere/include, /usr/include" in caught.value.why
    assert "apt-get install libnvinfer-headers-dev" in caught.value.fix[0]


@pytest.mark.nvcc
@pytest.mark.usefixtures("tools")
def test_headers_that_are_too_old_fail_in_seconds_and_leave_no_entry(tmp_path: Path) -> None:
    headers = tmp_path / "old"
    headers.mkdir()
    (headers / "NvInferVersion.h").write_text(OLD_VERSION)
    (headers / "NvInferRuntime.h").write_text('#include "NvInferVersion.h"\n')
    with pytest.raises(BuildError, match="does not compile") as caught:
        build_plugin_library(Recipe(sms=(89,), headers=headers))
    assert caught.value.code == "E6006"
    assert "TensorRT 10.3 or newer is needed" in caught.value.why
    log = Path(caught.value.fix[0].removeprefix("see "))
    assert "NvInferVersion.h" in log.read_text() or "static assertion" in log.read_text()
    log.unlink()
    assert cache.entries("plugins") == []


@pytest.mark.nvcc
@pytest.mark.usefixtures("tools")
def test_a_gpu_that_the_compiler_does_not_know_is_an_error() -> None:
    headers = compiled.tensorrt_headers()
    with pytest.raises(BuildError, match="cannot configure") as caught:
        build_plugin_library(Recipe(sms=(11,), headers=headers))
    assert caught.value.code == "E6006"
    Path(caught.value.fix[0].removeprefix("see ")).unlink()


def test_an_unsafe_cache_is_refused_before_the_work(place: Path) -> None:
    (place / "cache").mkdir()
    (place / "cache").chmod(0o777)
    with pytest.raises(FormatError, match="not safe") as caught:
        build_plugin_library(Recipe())
    assert caught.value.code == "E4803"


def test_percentages_of_the_log_become_progress(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("[  7%] Building CUDA object CMakeFiles/k.dir/src/gemm_w3a16.cu.o\nwarning: x\n")
    steps: list[tuple[int, int, str]] = []
    with build._followed(log, lambda done, total, note="": steps.append((done, total, note))):
        for _ in range(100):
            if steps:
                break
            build.threading.Event().wait(0.05)
    assert steps[0] == (7, 100, "gemm_w3a16.cu")


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("tools")
def test_a_library_is_compiled_once_checked_and_found() -> None:
    recipe = Recipe(sms=(89,), headers=compiled.tensorrt_headers())
    made = build_plugin_library(recipe)
    assert made.archs == ("sm_89", "compute_89")
    assert len(check_plugin_library(made.path).creators) == 3
    assert find_plugin_library(sms=(89, 120)) == made
    record = read_json(made.path.with_name("plugin.json"))
    assert (record["abi"], record["sha256"]) == (made.abi, made.sha256)
    assert [gpu["gpu"] for gpu in record["code"]["gpus"]] == ["sm_89"]
    assert record["code"] == compiled_code(made.path).as_json()
    before = made.path.stat().st_mtime_ns
    assert build_plugin_library(recipe).path.stat().st_mtime_ns == before
