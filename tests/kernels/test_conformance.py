"""Every instruction of arch.cuh: emulation against exact arithmetic, and against a GPU where one has been asked."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.conformance_reference import (
    BF16,
    EXACT,
    F16,
    F32,
    Operation,
    differences,
    mma_sums,
    read,
    read_file,
)
from tests.kernels.emulated import EMULATION, ROOT, compiled

SOURCE: Final = ROOT / "kernels/emulation/conformance.cu"
GOLDEN: Final = ROOT / "tests/golden"
SEEDS: Final = range(1, 4)
EMULATED_SUM: Final = 2.0**-24
"""Of the sum of the terms' sizes: sums in fp64, then one rounding to fp32."""
DEVICE_SUM: Final = 18 * 2.0**-23
"""Of the sum of the terms' sizes: 17 terms, each cut off at the last place of the largest one, and a rounding."""
EXPONENTIAL_ULPS: Final = 2
SUMS: Final = {"mma_f16": F16, "mma_bf16": BF16}


def outcome_of(program: Path, seed: int) -> dict[str, Operation]:
    done = subprocess.run([program, str(seed)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


@pytest.fixture(scope="module")
def emulated() -> list[dict[str, Operation]]:
    """What the emulated program prints, by seed."""
    program = compiled("conformance", [SOURCE, *EMULATION], [])
    return [outcome_of(program, seed) for seed in SEEDS]


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Places between fp32 numbers of one sign, given as words."""
    return np.abs(a.astype(np.int64) - b.astype(np.int64))


def assert_agree(ours: dict[str, Operation], theirs: dict[str, Operation]) -> None:
    """Compare two runs of the program: bits, or the named tolerance where an operation has one."""
    assert ours.keys() == theirs.keys()
    for name, operation in ours.items():
        other = theirs[name]
        assert (operation.given == other.given).all(), name
        if operation.compare == "exact":
            assert differences(name, operation.out, other.out) == 0, name
        elif operation.compare == "ulp2":
            far = ulps(operation.out, other.out) > EXPONENTIAL_ULPS
            assert differences(name, operation.out[far][None], other.out[far][None]) == 0, name
        else:
            _, sizes = mma_sums(operation.given, SUMS[name])
            a, b = (x.view(np.float32).astype(np.float64) for x in (operation.out, other.out))
            assert (np.abs(a - b) <= DEVICE_SUM * sizes).all(), name


def test_every_operation_has_a_reference(emulated: list[dict[str, Operation]]) -> None:
    assert set(emulated[0]) == {*EXACT, *SUMS, "f32_exponential"}


def test_the_program_uses_every_function_of_the_device_header() -> None:
    header, program = (path.read_text() for path in (ROOT / "kernels/include/mbq/arch.cuh", SOURCE))
    named = set(re.findall(r"^ *(?:static )?MBQ_FN [\w ]+?[ *](\w+)\(", header, re.MULTILINE))
    named |= set(re.findall(r"^MBQ_LOAD\((\w+)", header, re.MULTILINE))
    assert len(named) > 40
    assert {name for name in named if not re.search(rf"\b{name}\b", program)} == set()


@pytest.mark.parametrize("name", EXACT)
def test_the_emulation_is_exact(emulated: list[dict[str, Operation]], name: str) -> None:
    for operations in emulated:
        operation = operations[name]
        assert operation.compare == "exact"
        assert differences(name, operation.out, EXACT[name](operation.given)) == 0


@pytest.mark.parametrize("name", SUMS)
def test_emulated_sums_are_rounded_once(emulated: list[dict[str, Operation]], name: str) -> None:
    for operations in emulated:
        exact, sizes = mma_sums(operations[name].given, SUMS[name])
        out = operations[name].out.view(np.float32).astype(np.float64)
        assert (np.abs(out - exact) <= EMULATED_SUM * sizes).all()


def test_the_emulated_exponential_is_the_nearest_number(
    emulated: list[dict[str, Operation]],
) -> None:
    for operations in emulated:
        operation = operations["f32_exponential"]
        with np.errstate(all="ignore"):
            exact = np.exp(operation.given.view(np.float32).astype(np.float64)).astype(np.float32)
        assert differences("f32_exponential", operation.out, exact.view(np.uint32)) == 0


def test_conversions_agree_with_numpy_and_ml_dtypes(emulated: list[dict[str, Operation]]) -> None:
    for operations in emulated:
        for name, dtype in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
            narrow = operations[f"{name}_from_float"]
            with np.errstate(all="ignore"):
                expected = (
                    narrow.given.view(np.float32).astype(dtype).view(np.uint16).astype(np.uint32)
                )
            assert differences(f"{name}_from_float", narrow.out, expected) == 0
            wide = operations[f"{name}_to_float"]
            halves = (wide.given & 0xFFFF).astype(np.uint16).view(dtype)
            assert (
                differences(f"{name}_to_float", wide.out, halves.astype(np.float32).view(np.uint32))
                == 0
            )


def test_the_drawn_numbers_reach_the_edges(emulated: list[dict[str, Operation]]) -> None:
    for name, form in (("f16_fma2", F16), ("bf16_fma2", BF16), ("f32_fma", F32)):
        given = np.concatenate([operations[name].given for operations in emulated], axis=None)
        bits = (given.view(np.uint16) if form.width == 16 else given) & (
            (1 << (form.width - 1)) - 1
        )
        assert (bits == 0).any()
        assert (bits == form.infinity).any()
        assert (bits > form.infinity).any()
        assert ((bits > 0) & (bits < 1 << form.mantissa)).any(), "no subnormal number"
    narrow = np.concatenate(
        [operations["bf16_from_float"].given for operations in emulated], axis=None
    )
    assert ((narrow & 0xFFFF) == 0x8000).any(), "no tie between two bf16 numbers"


@pytest.mark.parametrize(
    "name", ["f16_fma2", "mma_f16", "mma_s8", "ldmatrix4", "cp_async", "f32_exponential"]
)
def test_a_wrong_result_would_be_seen(emulated: list[dict[str, Operation]], name: str) -> None:
    right = emulated[0][name]
    out = right.out.copy()
    out[0, 3] ^= 0x00010000  # a place too large for every tolerance
    changed = Operation(compare=right.compare, given=right.given, out=out)
    with pytest.raises(AssertionError):
        assert_agree(emulated[0], {**emulated[0], name: changed})


def test_every_recorded_device_agrees_with_the_emulation(
    emulated: list[dict[str, Operation]],
) -> None:
    recorded = sorted(GOLDEN.glob("conformance_*.txt"))
    if not recorded:
        pytest.skip("no output of a GPU recorded yet: kernels/emulation/README.md says how")
    for path in recorded:
        assert_agree(emulated[0], read_file(path))


def device_program(folder: Path, arch: str) -> Path:
    """The same program for a GPU."""
    out = folder / "conformance"
    include = ROOT / "kernels/include"
    command = ["nvcc", "-std=c++17", f"-arch={arch}", f"-I{include}", str(SOURCE), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_program_compiles_for_a_gpu(tmp_path: Path) -> None:
    assert device_program(tmp_path, "sm_90").stat().st_size > 0


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_emulation(
    tmp_path: Path, emulated: list[dict[str, Operation]]
) -> None:
    program = device_program(tmp_path, "native")
    for seed, operations in zip(SEEDS, emulated, strict=True):
        assert_agree(operations, outcome_of(program, seed))
