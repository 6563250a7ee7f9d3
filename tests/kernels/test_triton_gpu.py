"""The Triton kernels on a GPU: every case, and the same bits every time."""

import pytest
import torch

from mbq_export.schemes.base import CHANNEL
from mbq_kernels.base import SCHEMES_WITH_KERNELS, kernel_for
from mbq_kernels.cases import DTYPES, adversarial_cases
from mbq_kernels.comparison import Family
from mbq_kernels.configs import GEMV_ROWS
from mbq_kernels.testing import Case, assert_close
from mbq_kernels.weights import device_weight

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LARGE = [
    Case(scheme=scheme, dtype=dtype, m=m, n=3584, k=3584, group_size=group, bias=True)
    for scheme, group in (("w3a16", 128), ("w4a16", 128), ("w4a8", CHANNEL))
    for dtype in DTYPES
    for m in (1, 8, 16, 129)
]


def check(case: Case, seed: int) -> None:
    problem = case.make(seed)
    weight = device_weight(problem.tiled, dtype=case.dtype, device="cuda")
    out = problem.poisoned_output("cuda")
    y = kernel_for(case.scheme).run(problem.x_on("cuda"), weight, out=out)
    assert_close(y, problem, family=Family.SKINNY if case.m <= GEMV_ROWS else Family.GEMM)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_every_case_has_its_answer(scheme: str, dtype: torch.dtype) -> None:
    for case in adversarial_cases(scheme, dtype):
        for seed in case.seeds():
            check(case, seed)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_a_layer_of_a_real_model_has_its_answer(case: Case) -> None:
    check(case, seed=1)


@pytest.mark.parametrize("m", [1, 8, 33])
@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_a_captured_graph_gives_the_same_bits_as_a_call(scheme: str, m: int) -> None:
    group = CHANNEL if scheme == "w4a8" else 64
    case = Case(scheme=scheme, dtype=torch.float16, m=m, n=896, k=896, group_size=group)
    problem = case.make(3)
    weight = device_weight(problem.tiled, dtype=case.dtype, device="cuda")
    x, run = problem.x_on("cuda"), kernel_for(scheme).run
    called, captured = run(x, weight), problem.poisoned_output("cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x, weight, out=captured)
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured.view(torch.int16), called.view(torch.int16))
