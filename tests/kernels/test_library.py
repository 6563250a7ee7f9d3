"""The C ABI refuses what is wrong with a documented status, writes nothing then, and says what it means."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import torch

from mbq_export.errors import FormatError, MachineError
from mbq_kernels.library import DeviceStruct, KernelLibrary, LinearCall, LinearStruct
from mbq_kernels.testing import Case, Problem
from tests.kernels.emulated import ROOT
from tests.kernels.emulated_linear import Emulator, Setting, described

HEADER: Final = (ROOT / "kernels/include/mbq/mbq.h").read_text()
STATUS: Final = {name: int(value) for name, value in re.findall(r"(MBQ_\w+) = (-?\d+)", HEADER)}
UNTOUCHED: Final = 0x77
H100: Final = DeviceStruct(sm=90, sm_count=132, smem_optin=232448, l2_bytes=52428800)


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return Emulator.unbroken().library


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Case(
        scheme="w3a16", dtype=torch.float16, m=2, n=32, k=256, group_size=128, bias=True
    ).make(0)


class Attempt:
    """One call with valid arguments, any of which a test may spoil."""

    def __init__(self, library: KernelLibrary, problem: Problem) -> None:
        self.buffers, self.call = described(problem)
        self.library = library
        self.struct = self.call.as_struct()
        self.size = max(library.workspace_bytes(self.call, max_m=problem.case.m), 16)
        self.y = (ctypes.c_uint8 * 4096)(*([UNTOUCHED] * 4096))
        self.scratch = (ctypes.c_uint8 * (self.size + 16))()
        self.arguments = {
            "linear": ctypes.byref(self.struct),
            "m": problem.case.m,
            "x": self.buffers["x"].pointer,
            "y": -(-ctypes.addressof(self.y) // 16) * 16,
            "workspace": -(-ctypes.addressof(self.scratch) // 16) * 16,
            "bytes": self.size,
            "stream": None,
        }

    def status(self, *, config: int | None = None) -> int:
        """Call, and check that a refusal wrote nothing."""
        arguments = tuple(self.arguments.values())
        if config is None:
            status = self.library.cdll.mbq_linear(*arguments)
        else:
            status = self.library.cdll.mbq_linear_config(*arguments, config)
        if status < 0:
            assert set(bytes(self.y)) == {UNTOUCHED}
        return int(status)


@pytest.fixture
def attempt(library: KernelLibrary, problem: Problem) -> Iterator[Attempt]:
    made = Attempt(library, problem)
    Emulator.unbroken().set_up(Setting(), list(made.buffers.values()))
    yield made
    library.cdll.mbq_emulation_forget_all()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("struct_size", 8, "MBQ_E_STRUCT"),
        ("scheme", 0, "MBQ_E_SCHEME"),
        ("scheme", STATUS["MBQ_W8A8"], "MBQ_E_SCHEME"),
        ("scheme", 99, "MBQ_E_SCHEME"),
        ("layout_version", 2, "MBQ_E_LAYOUT"),
        ("dtype", 3, "MBQ_E_DTYPE"),
        ("epilogue", 2, "MBQ_E_EPILOGUE"),
        ("flags", 1, "MBQ_E_EPILOGUE"),
        ("n", 0, "MBQ_E_SHAPE"),
        ("n", -16, "MBQ_E_SHAPE"),
        ("n", 1 << 30, "MBQ_E_SHAPE"),
        ("k", 0, "MBQ_E_SHAPE"),
        ("k", 252, "MBQ_E_SHAPE"),
        ("k", -128, "MBQ_E_SHAPE"),
        ("group", 0, "MBQ_E_GROUP"),
        ("group", 96, "MBQ_E_GROUP"),
        ("group", -128, "MBQ_E_GROUP"),
        ("group", 256, "MBQ_E_GROUP"),
        ("codes", None, "MBQ_E_NULL"),
        ("scales", None, "MBQ_E_NULL"),
        ("zeros", None, "MBQ_E_NULL"),
    ],
)
def test_a_bad_field_is_refused(
    attempt: Attempt, field: str, value: int | None, expected: str
) -> None:
    setattr(attempt.struct, field, value)
    assert attempt.status() == STATUS[expected]
    assert attempt.status(config=1) == STATUS[expected]


@pytest.mark.parametrize("field", ["codes", "scales", "zeros", "bias"])
def test_a_misaligned_weight_is_refused(attempt: Attempt, field: str) -> None:
    setattr(attempt.struct, field, getattr(attempt.struct, field) + 8)
    assert attempt.status() == STATUS["MBQ_E_ALIGN"]


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("linear", None, "MBQ_E_STRUCT"),
        ("m", -1, "MBQ_E_SHAPE"),
        ("x", None, "MBQ_E_NULL"),
        ("y", None, "MBQ_E_NULL"),
    ],
)
def test_a_bad_argument_is_refused(
    attempt: Attempt, argument: str, value: int | None, expected: str
) -> None:
    attempt.arguments[argument] = value
    assert attempt.status() == STATUS[expected]


@pytest.mark.parametrize("argument", ["x", "y", "workspace"])
def test_a_misaligned_argument_is_refused(attempt: Attempt, argument: str) -> None:
    attempt.arguments[argument] += 2
    assert attempt.status() == STATUS["MBQ_E_ALIGN"]


def test_no_rows_are_no_work(attempt: Attempt) -> None:
    attempt.arguments["m"] = 0
    attempt.arguments["x"] = None
    assert attempt.status() == STATUS["MBQ_OK"]
    assert set(bytes(attempt.y)) == {UNTOUCHED}


def test_a_group_that_does_not_divide_k_is_refused(attempt: Attempt) -> None:
    attempt.struct.k = 192
    assert attempt.status() == STATUS["MBQ_E_GROUP"]


def test_silu_mul_needs_whole_pairs_of_tiles(attempt: Attempt) -> None:
    attempt.struct.epilogue = STATUS["MBQ_EPILOGUE_SILU_MUL"]
    attempt.struct.n = 48
    assert attempt.status() == STATUS["MBQ_E_SHAPE"]


def test_an_unknown_config_is_refused(attempt: Attempt) -> None:
    assert attempt.status(config=9999) == STATUS["MBQ_E_CONFIG"]
    assert attempt.status(config=-1) == STATUS["MBQ_E_CONFIG"]


def test_a_config_for_fewer_rows_is_refused(attempt: Attempt) -> None:
    attempt.arguments["m"] = 9
    assert attempt.status(config=1) == STATUS["MBQ_E_CONFIG"]


def test_a_small_workspace_is_refused(library: KernelLibrary) -> None:
    problem = Case(scheme="w4a8", dtype=torch.float16, m=2, n=32, k=256, group_size=0).make(0)
    attempt = Attempt(library, problem)
    attempt.arguments["bytes"] = 255
    assert attempt.status() == STATUS["MBQ_E_WORKSPACE"]
    attempt.arguments["bytes"], attempt.arguments["workspace"] = attempt.size, None
    assert attempt.status() == STATUS["MBQ_E_WORKSPACE"]


def test_an_old_device_is_refused(attempt: Attempt) -> None:
    cdll = attempt.library.cdll
    cdll.mbq_emulation_device(ctypes.byref(DeviceStruct(sm=75, sm_count=40, smem_optin=65536)))
    try:
        assert attempt.status() == STATUS["MBQ_E_NO_IMAGE"]
    finally:
        cdll.mbq_emulation_device(ctypes.byref(H100))


def test_w4a8_refuses_rows_whose_sums_would_overflow(library: KernelLibrary) -> None:
    call = LinearCall(
        scheme="w4a8", dtype="float16", n=16, k=132104, group_size=0, codes=16, scales=16
    )
    assert library.select(call, m=1, sm=90) > 0
    assert library.select(replace(call, k=132112), m=1, sm=90) == STATUS["MBQ_E_SHAPE"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((9, 1, 128, 16, 16, 16, None), "MBQ_E_DTYPE"),
        ((1, -1, 128, 16, 16, 16, None), "MBQ_E_SHAPE"),
        ((1, 1, 100, 16, 16, 16, None), "MBQ_E_SHAPE"),
        ((1, 1, 128, None, 16, 16, None), "MBQ_E_NULL"),
        ((1, 1, 128, 16, 24, 16, None), "MBQ_E_ALIGN"),
        ((1, 0, 128, None, None, None, None), "MBQ_OK"),
    ],
)
def test_quant_act_refuses(
    library: KernelLibrary, arguments: tuple[int | None, ...], expected: str
) -> None:
    assert library.cdll.mbq_quant_act(*arguments) == STATUS[expected]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, 16, 16, None), "MBQ_E_NULL"),
        ((16, 16, None, None), "MBQ_E_NULL"),
        ((24, 16, 16, None), "MBQ_E_ALIGN"),
        ((16, 0, 16, None), "MBQ_E_SHAPE"),
        ((16, 24, 16, None), "MBQ_E_SHAPE"),
    ],
)
def test_read_bw_refuses(
    library: KernelLibrary, arguments: tuple[int | None, ...], expected: str
) -> None:
    assert library.cdll.mbq_read_bw(*arguments) == STATUS[expected]


def test_dequant_refuses(attempt: Attempt) -> None:
    dequant = attempt.library.cdll.mbq_dequant
    assert dequant(attempt.arguments["linear"], None, None) == STATUS["MBQ_E_NULL"]
    assert dequant(attempt.arguments["linear"], 24, None) == STATUS["MBQ_E_ALIGN"]
    assert dequant(None, 16, None) == STATUS["MBQ_E_STRUCT"]


def test_every_status_has_a_text_of_its_own(library: KernelLibrary) -> None:
    texts = [
        library.status(code)
        for name, code in STATUS.items()
        if name.startswith("MBQ_E_") and code < 0
    ]
    assert len(set(texts)) == len(texts) >= 12
    assert "unknown status" not in texts
    assert library.status(-999) == "unknown status"


def test_python_and_c_agree_on_the_structs(tmp_path: Path) -> None:
    program = tmp_path / "sizes.c"
    program.write_text(
        '#include <stdio.h>\n#include "mbq/mbq.h"\n'
        'int main(void) { printf("%zu %zu %zu %zu", sizeof(MbqLinear), sizeof(MbqDevice), '
        "sizeof(MbqConfig), offsetof(MbqLinear, residual)); return 0; }\n"
    )
    made = tmp_path / "sizes"
    command = [
        "gcc",
        "-std=c99",
        "-pedantic",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{ROOT}/kernels/include",
    ]
    subprocess.run([*command, str(program), "-o", str(made)], check=True)
    found = subprocess.run([str(made)], capture_output=True, text=True, check=True).stdout
    sizes = (
        ctypes.sizeof(LinearStruct),
        ctypes.sizeof(DeviceStruct),
        28,
        LinearStruct.residual.offset,
    )
    assert found == " ".join(map(str, sizes))


def test_a_refusal_is_an_error_that_says_why(library: KernelLibrary, problem: Problem) -> None:
    _, call = described(problem)
    with pytest.raises(FormatError, match="not a multiple of 16 bytes") as caught:
        library.linear(call, m=1, x=8, y=16)
    assert caught.value.code == "E4121"


def test_a_missing_library_names_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"kernels/build\.py") as caught:
        KernelLibrary.load(tmp_path / "none.so")
    assert caught.value.code == "E3005"


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "libwrong.so"
    wrong.write_bytes(b"not an ELF file")
    with pytest.raises(MachineError, match="is no kernel library"):
        KernelLibrary.load(wrong)


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_without_a_driver_a_launch_fails_cleanly(problem: Problem, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    made = tmp_path / "libmbq_kernels.so"
    built = [str(ROOT / "kernels/build.py"), "--sm", "90", "-o", str(made)]
    subprocess.run([shutil.which("python3") or "python3", *built], check=True)
    attempt = Attempt(KernelLibrary.load(made), problem)
    insufficient_driver, no_device = 35, 100
    assert attempt.status() in {insufficient_driver, no_device}
    assert set(bytes(attempt.y)) == {UNTOUCHED}
