"""The Triton kernels in Triton's interpreter; run by test_triton_interpreter.py in a process of its own.

Whether a kernel is interpreted is decided when its file is imported, so these tests cannot share a process with
anything that compiles.
"""

import numpy as np
import pytest
import torch

from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.integers import quantize_activations
from mbq_kernels import activations, w4a8, weight_only
from mbq_kernels.base import SCHEMES_WITH_KERNELS, kernel_for
from mbq_kernels.cases import DTYPES, adversarial_cases
from mbq_kernels.comparison import Family
from mbq_kernels.configs import GEMV_ROWS
from mbq_kernels.testing import Case, Kind, assert_close
from mbq_kernels.weights import device_weight

LARGEST_M = 17
EVERY = {
    ("w3a16", torch.float16): 1,
    ("w3a16", torch.bfloat16): 4,
    ("w4a16", torch.float16): 2,
    ("w4a16", torch.bfloat16): 5,
    ("w4a8", torch.float16): 1,
    ("w4a8", torch.bfloat16): 4,
}
"""Which share of the cases runs: bfloat16 is interpreted as float32, and w4a16 differs from w3a16 in one function."""
CASES = [
    case
    for (scheme, dtype), step in EVERY.items()
    for case in [c for c in adversarial_cases(scheme, dtype) if c.m <= LARGEST_M][::step]
]


def check(case: Case, seed: int) -> None:
    problem = case.make(seed)
    weight = device_weight(problem.tiled, dtype=case.dtype)
    with np.errstate(invalid="ignore"):  # NaN is the point of some cases
        y = kernel_for(case.scheme).run(problem.x, weight, out=problem.poisoned_output())
    assert_close(y, problem, family=Family.SKINNY if case.m <= GEMV_ROWS else Family.GEMM)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_has_its_answer(case: Case) -> None:
    check(case, seed=1)


@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
@pytest.mark.parametrize("m", [8, 16])
def test_every_column_of_a_tile_has_its_place(scheme: str, m: int) -> None:
    group = CHANNEL if scheme == "w4a8" else 32
    case = Case(
        scheme=scheme,
        dtype=torch.float16,
        m=m,
        n=16,
        k=128,
        group_size=group,
        kind=Kind.ONE_HOT,
    )
    for seed in case.seeds():
        check(case, seed)


@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
@pytest.mark.parametrize("m", [1, 8, 17])
def test_the_blocks_a_gpu_gets_give_the_same_answer(
    scheme: str, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (weight_only, w4a8):
        monkeypatch.setattr(module, "compute_capability", lambda _: 90)
    group = CHANNEL if scheme == "w4a8" else 128
    check(
        Case(scheme=scheme, dtype=torch.float16, m=m, n=40, k=640, group_size=group, bias=True),
        seed=2,
    )


@pytest.mark.parametrize("kind", [Kind.RANDOM, Kind.TIES, Kind.ZEROS, Kind.OUTLIERS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_quantized_bit_for_bit(kind: Kind, dtype: torch.dtype) -> None:
    # 4104 columns take two steps, the second of 8 columns.
    case = Case(scheme="w4a8", dtype=dtype, m=5, n=16, k=4104, group_size=CHANNEL, kind=kind)
    x = case.make(4).x
    steps, scales = activations.quantized(x)
    expected_steps, expected_scales = quantize_activations(x.float().numpy())
    np.testing.assert_array_equal(steps.numpy(), expected_steps)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)


@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_a_row_alone_and_in_a_batch_has_the_same_bits(scheme: str) -> None:
    group = CHANNEL if scheme == "w4a8" else 64
    case = Case(scheme=scheme, dtype=torch.float16, m=17, n=48, k=512, group_size=group)
    problem = case.make(6)
    weight = device_weight(problem.tiled, dtype=case.dtype)
    run = kernel_for(scheme).run
    together = run(problem.x, weight)
    # 9 and 17 rows take the same kernel, in blocks of 16 and 32 rows.
    assert torch.equal(run(problem.x[:9].contiguous(), weight), together[:9])


@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_no_rows_give_no_rows(scheme: str) -> None:
    case = Case(
        scheme=scheme,
        dtype=torch.float16,
        m=1,
        n=16,
        k=128,
        group_size=CHANNEL if scheme == "w4a8" else 128,
    )
    problem = case.make(0)
    weight = device_weight(problem.tiled, dtype=case.dtype)
    assert kernel_for(scheme).run(problem.x[:0], weight).shape == (0, 16)


@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_the_torch_oracle_has_the_answer(scheme: str) -> None:
    module = __import__(f"mbq_kernels.{scheme}", fromlist=["oracle"])
    for case in list(adversarial_cases(scheme, torch.float16))[::5]:
        problem = case.make(7)
        y = module.oracle(problem.x, problem.tiled).to(case.dtype)
        assert_close(y, problem)
