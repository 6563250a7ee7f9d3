"""What the compiler made of kernels: read from a library with code for two GPUs, and from the tool's own words."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.plugin_library import RECORD_NAME, PluginLibrary, machine_code
from mbq_export.plugin_library.elf import SharedLibrary
from mbq_export.plugin_library.machine_code import (
    CompiledCode,
    GpuCode,
    compiled_code,
    recorded_code,
    rows,
    short_name,
    usage_by_gpu,
)
from mbq_export.reading import sha256_of
from tests.plugin_library.libraries import stand_in
from tests.plugins import compiled

KERNELS = """
namespace mbq {
template <int N> __global__ void lean(float *x) { x[threadIdx.x] *= N; }
// An array whose index the compiler does not know lies in memory, not in registers.
__global__ void spilling(float *x, int at) {
    float kept[64];
    for (int i = 0; i < 64; ++i) kept[i] = x[i * at];
    for (int i = 0; i < at; ++i) kept[(i * 7) % 64] += kept[(i * 5) % 64];
    x[0] = kept[at % 64];
}
template __global__ void lean<3>(float *);
}
"""
PRINTED = """
Fatbin elf code:
================
arch = sm_80
Resource usage:
 Function _ZN3mbq4leanILi3EEEvPf:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:480 TEXTURE:0 SURFACE:0 SAMPLER:0
Fatbin elf code:
arch = sm_120a
 Function _ZN3mbq4leanILi3EEEvPf:
  REG:9 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:480 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function other:
  REG:255 STACK:0 SHARED:0 LOCAL:0
Fatbin ptx code:
arch = sm_120
"""


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared library with machine code for two GPUs and PTX, by nvcc."""
    nvcc = compiled.tool("nvcc")
    folder = tmp_path_factory.mktemp("code")
    (folder / "kernels.cu").write_text(KERNELS)
    command = [
        nvcc,
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-cudart",
        "none",
        "kernels.cu",
        "-o",
        "k.so",
    ]
    for sm in (80, 89):
        command += ["-gencode", f"arch=compute_{sm},code=sm_{sm}"]
    command += ["-gencode", "arch=compute_89,code=compute_89"]
    subprocess.run(command, cwd=folder, check=True, timeout=100)
    return folder / "k.so"


@pytest.mark.nvcc
def test_kernels_registers_spills_and_bytes_are_read_for_every_gpu(two_gpus: Path) -> None:
    if machine_code.find_cuobjdump() is None:
        pytest.skip(machine_code.NO_TOOL)
    code = compiled_code(two_gpus)
    assert code.unread == ""
    assert [each.gpu for each in code.gpus] == ["sm_80", "sm_89"]
    for each in code.gpus:
        assert each.kernels == 2
        assert 8 < (each.registers or 0) < 256
        assert each.spills == {"spilling": 256}  # the array: 64 floats
        assert 1000 < each.bytes < two_gpus.stat().st_size
    assert CompiledCode.from_json(json.loads(json.dumps(code.as_json()))) == code


@pytest.mark.nvcc
def test_bytes_are_those_of_the_files_that_the_tool_takes_out(
    two_gpus: Path, tmp_path: Path
) -> None:
    tool = machine_code.find_cuobjdump()
    if tool is None:
        pytest.skip(machine_code.NO_TOOL)
    subprocess.run([tool, "-xelf", "all", two_gpus], cwd=tmp_path, check=True, timeout=60)
    taken = {path.name.split(".")[-2]: path.stat().st_size for path in tmp_path.glob("*.cubin")}
    found = SharedLibrary.read(two_gpus).machine_code_bytes
    assert set(found) == set(taken) == {"sm_80", "sm_89"}
    for gpu, size in found.items():
        assert 0 <= size - taken[gpu] < 8  # payloads are aligned to 8 bytes


@pytest.mark.nvcc
def test_without_the_tool_bytes_are_known_and_the_rest_is_not_read(
    two_gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "find_cuobjdump", lambda: None)
    code = compiled_code(two_gpus)
    assert code.unread == machine_code.NO_TOOL
    assert [(each.gpu, each.kernels, each.registers) for each in code.gpus] == [
        ("sm_80", None, None),
        ("sm_89", None, None),
    ]
    assert rows(code)[0][:4] == ("sm_80", "not read", "not read", "not read")


def test_tool_that_fails_is_quoted_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "find_cuobjdump", lambda: Path("/bin/false"))
    assert compiled_code(stand_in(tmp_path / "x.so")) == CompiledCode(
        gpus=(), unread="false failed: "
    )


def test_the_tools_words_are_sorted_by_gpu() -> None:
    found = usage_by_gpu(PRINTED)
    assert set(found) == {"sm_80", "sm_120"}
    lean = {gpu: kernels["_ZN3mbq4leanILi3EEEvPf"] for gpu, kernels in found.items()}
    assert (lean["sm_80"].registers, lean["sm_80"].spilled) == (8, 0)
    assert (lean["sm_120"].registers, lean["sm_120"].spilled) == (9, 24)
    assert len(found["sm_120"]) == 2


def test_names_lose_what_every_kernel_has() -> None:
    assert short_name("void mbq::lean<3>(float *)") == "lean<3>"
    assert short_name("_Z5plain") == "_Z5plain"


def test_tool_in_a_package_is_found_and_can_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = tmp_path / "nvidia/cu13/bin/cuobjdump"
    carried.parent.mkdir(parents=True)
    carried.write_text("#!/bin/sh\n")
    carried.chmod(0o644)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(machine_code.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    assert machine_code.find_cuobjdump() == carried
    assert carried.stat().st_mode & 0o111
    carried.unlink()
    assert machine_code.find_cuobjdump() is None


def library_with(record: dict[str, object], folder: Path) -> PluginLibrary:
    path = stand_in(folder / "libmbq_trt_plugins.so")
    digest = sha256_of(path)
    (folder / RECORD_NAME).write_text(json.dumps({"sha256": digest, **record}))
    return PluginLibrary(
        path=path, sha256=digest, abi=1, archs=(), headers="10.14.1", found="cache"
    )


def test_record_beside_a_library_is_believed_if_it_is_of_that_library(tmp_path: Path) -> None:
    code = CompiledCode(gpus=(GpuCode(gpu="sm_89", bytes=7, kernels=1, registers=9, widest="k"),))
    library = library_with({"code": code.as_json()}, tmp_path)
    assert recorded_code(library) == code
    assert recorded_code(replace(library, sha256="0" * 64)).gpus == ()


@pytest.mark.parametrize("record", [{}, {"code": {"gpus": [], "unread": "no tool"}}])
def test_library_whose_record_does_not_tell_is_read_again(
    record: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CompiledCode(gpus=(GpuCode(gpu="sm_89", bytes=7),))
    monkeypatch.setattr(machine_code, "compiled_code", lambda _: read)
    assert recorded_code(library_with(record, tmp_path)) == read
