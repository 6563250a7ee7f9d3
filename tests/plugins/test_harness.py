"""Every part of a plugin's life but TensorRT: driven by a program that has its headers only.

Over the emulated kernels the whole way is real: fields, formats, scratch, serialization, ``enqueue`` and its result,
which the kernels' oracle judges. A library of CUDA code shows here that it fails cleanly without a driver.
"""

from pathlib import Path

import pytest
import torch

from mbq_kernels.testing import Case
from tests.plugins import compiled
from tests.plugins.make_cases import assert_result, cases, write_case

LIVES = "10000"
DEFECT_FREE = "all checks hold"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def host(library: Path, *words: object, program: Path | None = None, **environment: str) -> str:
    """What the host program says; fails with it."""
    outcome = compiled.run(
        [program or compiled.host_program(), library, *words], env=environment or None, timeout=100
    )
    assert outcome.returncode == 0, f"{outcome.stdout}\n{outcome.stderr[-4000:]}"
    assert DEFECT_FREE in outcome.stdout
    return outcome.stdout + outcome.stderr


@pytest.fixture(scope="module")
def emulated() -> Path:
    return compiled.emulated_library()


def test_decisions_without_tensorrt_are_right_by_hand() -> None:
    outcome = compiled.run([compiled.unit_program()], timeout=60)
    assert outcome.returncode == 0, outcome.stdout
    assert DEFECT_FREE in outcome.stdout


def test_three_creators_declare_the_attributes_of_the_graph(emulated: Path) -> None:
    declared = "N K group_size bits layout_version has_bias epilogue act_bits"
    said = host(emulated, "creators").splitlines()
    assert said[:3] == [
        f"{op} 1 mbq {declared}" for op in ("W3Linear", "W4A16Linear", "W4A8Linear")
    ]


def test_every_linear_lives_from_its_fields_to_its_second_enqueue(emulated: Path) -> None:
    host(emulated, "life")


def test_bad_fields_shapes_types_and_pointers_are_refused(emulated: Path) -> None:
    said = host(emulated, "refusals")
    assert "MBQPLG error W3Linear field K is missing" in said
    assert "MBQPLG error W4A8Linear x has 257 columns, expected K = 256" in said


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_plugin_computes_what_the_oracle_says(emulated: Path, case: Case, tmp_path: Path) -> None:
    problem = case.make(0)
    result = tmp_path / "result"
    host(emulated, "case", write_case(problem, tmp_path / "case"), result)
    assert_result(problem, result.read_bytes())


def test_the_judge_sees_one_wrong_bit(emulated: Path, tmp_path: Path) -> None:
    problem = cases()[0].make(0)
    result = tmp_path / "result"
    host(emulated, "case", write_case(problem, tmp_path / "case"), result)
    raw = bytearray(result.read_bytes())
    raw[1] ^= 0x40  # an exponent's bit
    with pytest.raises(AssertionError, match="w3a16"):
        assert_result(problem, bytes(raw))


def test_ten_thousand_lives_leave_nothing_behind() -> None:
    library = compiled.emulated_library(compiled.ASAN)
    program = compiled.host_program(compiled.ASAN)
    said = host(library, "leaks", LIVES, program=program, ASAN_OPTIONS="detect_leaks=1")
    assert "LeakSanitizer" not in said


def test_refusals_touch_no_memory_that_is_not_theirs() -> None:
    library = compiled.emulated_library(compiled.ASAN)
    host(library, "refusals", program=compiled.host_program(compiled.ASAN))


@pytest.mark.nvcc
@pytest.mark.slow
def test_without_a_driver_enqueue_returns_35_and_writes_nothing() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver")
    library = compiled.cuda_library()
    for task in ("creators", "life", "refusals"):
        host(library, task)


@pytest.mark.gpu
@pytest.mark.nvcc
@needs_gpu
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_plugin_on_a_gpu_computes_what_the_oracle_says(case: Case, tmp_path: Path) -> None:
    """Also replayed from a graph and on two streams at once: the host compares bits."""
    problem = case.make(0)
    result = tmp_path / "result"
    file = write_case(problem, tmp_path / "case")
    library, program = compiled.for_this_gpu()
    host(library, "case", file, result, program=program)
    assert_result(problem, result.read_bytes())


@pytest.mark.gpu
@pytest.mark.nvcc
@needs_gpu
def test_the_sanitizer_finds_nothing_on_a_gpu(tmp_path: Path) -> None:
    sanitizer = compiled.tool("compute-sanitizer")
    library, program = compiled.for_this_gpu()
    for case in cases()[:6]:
        file = write_case(case.make(0), tmp_path / "case")
        outcome = compiled.run(
            [sanitizer, "--error-exitcode", "3", program, library, "case", file, tmp_path / "out"],
            timeout=100,
        )
        assert outcome.returncode == 0, outcome.stdout[-4000:]
