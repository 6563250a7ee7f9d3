"""The operators on a GPU: every case, captured graphs, streams, compiled functions, and Triton in the library's place."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mbq_export.errors import MbqError
from mbq_kernels import ops
from mbq_kernels.cases import DTYPES
from mbq_kernels.comparison import Family
from mbq_kernels.testing import Epilogue, assert_close
from tests.kernels.operator_calls import (
    SCHEMES,
    SKINNY_ROWS,
    SMALL,
    all_cases,
    answer,
    arguments,
    name_of,
    weight_of,
)

TWO_ROUNDINGS = 2e-3
"""Half an ulp of float16 before residual or epilogue and one after, relative to sums that may cancel."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_answers_every_case(scheme: str, dtype: torch.dtype) -> None:
    for case in all_cases(scheme, dtype):
        problem = case.make(0)
        family = Family.SKINNY if case.m <= SKINNY_ROWS else Family.GEMM
        assert_close(answer(problem, "cuda"), problem, family=family)


@pytest.mark.gpu
def test_a_gpu_runs_the_compiled_library() -> None:
    assert ops.chosen_library() is not None, "python kernels/build.py"


@pytest.mark.gpu
@pytest.mark.parametrize("k", [8, 128, 136])
def test_a_gpu_quantizes_activations_bit_for_bit(k: int) -> None:
    x = torch.randn(5, k).half()
    for found, wanted in zip(ops.quant_act(x.cuda()), ops.quant_act(x), strict=True):
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 33])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_replayed_graph_gives_the_bits_of_a_plain_call(scheme: str, m: int) -> None:
    problem = replace(SMALL, scheme=scheme, m=m, n=512, k=1024).make(0)
    weight, x = weight_of(problem, "cuda"), problem.x_on("cuda").clone()
    ops.apply(weight, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = ops.apply(weight, x)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(kept, ops.apply(weight, x))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_finds_the_operators_consistent_on_a_gpu(scheme: str) -> None:
    given = arguments(replace(SMALL, scheme=scheme).make(0))
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()}
    torch.library.opcheck(ops.linear, (), moved)
    torch.library.opcheck(ops.quant_act, (moved["x"],))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # the compiler's advice to round more
def test_a_compiled_function_gives_the_bits_of_a_plain_one() -> None:
    weight = weight_of(replace(SMALL, residual=False).make(0), "cuda")
    x = torch.randn(3, 256, device="cuda").half()
    compiled = torch.compile(lambda x: ops.apply(weight, x) * 2, fullgraph=True)
    assert torch.equal(compiled(x), ops.apply(weight, x) * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", [Epilogue.NONE, Epilogue.SILU_MUL])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_triton_in_its_place_answers_up_to_a_rounding(scheme: str, epilogue: Epilogue) -> None:
    case = replace(SMALL, scheme=scheme, epilogue=epilogue, residual=epilogue is Epilogue.NONE)
    problem = case.make(0)
    residual = None if problem.residual is None else problem.residual.cuda()
    y = ops.by_triton(
        weight_of(problem, "cuda"),
        problem.x_on("cuda"),
        residual=residual,
        epilogue=name_of(epilogue),
    )
    found, wanted = y.double().cpu().numpy(), problem.answer.reference
    assert np.linalg.norm(found - wanted) <= TWO_ROUNDINGS * np.linalg.norm(wanted)


@pytest.mark.gpu
def test_two_streams_do_not_share_scratch() -> None:
    problems = [replace(SMALL, m=m, n=2048, k=4096, residual=False).make(m) for m in (1, 33)]
    pairs = [(weight_of(problem, "cuda"), problem.x_on("cuda")) for problem in problems]
    wanted = [ops.apply(weight, x) for weight, x in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for stream, (weight, x) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                found.append(ops.apply(weight, x))
        torch.cuda.synchronize()
        for y, right in zip(found, wanted, strict=True):
            assert torch.equal(y, right)


@pytest.mark.gpu
def test_rows_that_start_anywhere_in_memory_are_copied_into_place() -> None:
    problem = replace(SMALL, residual=False).make(0)
    buffer = torch.zeros(problem.x.numel() + 1, dtype=torch.float16, device="cuda")
    x = buffer[1:].view(problem.x.shape).copy_(problem.x)
    assert_close(ops.apply(weight_of(problem, "cuda"), x), problem)


@pytest.mark.gpu
def test_float32_on_a_gpu_is_an_error_with_a_code() -> None:
    weight = weight_of(replace(SMALL, bias=False).make(0), "cuda")
    with pytest.raises(MbqError) as caught:
        ops.apply(weight, torch.zeros(1, 256, device="cuda"))
    assert caught.value.code == "E4102"
