"""Shared libraries read as files, and files that are none."""

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mbq_export.errors import FormatError
from mbq_export.plugin_library.elf import MACHINES, SharedLibrary, fatbin_architectures
from tests.plugin_library.libraries import compiled, recorded

KERNEL = "__global__ void scale(float *x) { x[threadIdx.x] *= 2; }\n"
ARCHS = {"sm_80": "compute_80", "sm_89": "compute_89", "compute_90": "compute_90"}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return compiled(recorded({"abi": 1}), tmp_path / "whole.so")


def test_a_section_is_found_by_its_name(whole: Path) -> None:
    library = SharedLibrary.read(whole)
    assert library.sections[".mbq_plugin"] == b'{"abi": 1}\0'
    assert library.architectures == ()


def refused(path: Path) -> str:
    with pytest.raises(FormatError, match="is no shared library for this machine") as caught:
        SharedLibrary.read(path)
    assert caught.value.code == "E4701"
    return caught.value.why


def changed(path: Path, offset: int, value: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    return path


def test_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("<!doctype html>" * 20)
    assert "it starts with b'<!doctyp'" in refused(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "a file of at most 1 GiB is wanted" in refused(tmp_path / "nowhere.so")


def test_a_32_bit_library_is_refused(whole: Path) -> None:
    assert "not a 64-bit" in refused(changed(whole, 4, b"\x01"))


def test_a_library_for_another_processor_is_refused(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = changed(whole, 18, struct.pack("<H", MACHINES["aarch64"]))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "it is for aarch64, this machine is x86_64" in refused(arm)


def test_a_program_is_refused(whole: Path) -> None:
    assert "its type is 2" in refused(changed(whole, 16, struct.pack("<H", 2)))


def test_a_library_is_refused_wherever_it_was_cut(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    cut = tmp_path / "cut.so"
    for size in (0, 3, 63, 64, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        refused(cut)


def test_noise_in_place_of_device_code_lists_nothing() -> None:
    assert fatbin_architectures(b"\x50\xed\x55\xba" + b"\xff" * 60) == ()
    assert fatbin_architectures(b"\x50\xed\x55\xba" + b"\0" * 12) == ()


@pytest.mark.nvcc
def test_device_code_is_listed_as_cuobjdump_lists_it(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    tool = shutil.which("cuobjdump") or next(
        iter(sorted(Path(sys.prefix).glob("lib/python*/site-packages/**/bin/cuobjdump"))), None
    )
    if nvcc is None or tool is None:
        pytest.skip("nvcc or cuobjdump is missing")
    source, out = tmp_path / "a.cu", tmp_path / "a.so"
    source.write_text(KERNEL)
    images = [f"-gencode=arch={virtual},code={code}" for code, virtual in ARCHS.items()]
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", *images, str(source), "-o", str(out)]
    subprocess.run(command, check=True, timeout=100)
    listed = subprocess.run(
        [str(tool), "--list-elf", "--list-ptx", str(out)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = set(re.findall(r"\.(sm_\d+)\.cubin", listed))
    expected |= {f"compute_{sm}" for sm in re.findall(r"\.sm_(\d+)\.ptx", listed)}
    assert set(SharedLibrary.read(out).architectures) == expected == set(ARCHS)
