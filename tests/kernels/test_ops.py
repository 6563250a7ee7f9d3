"""The operators give every case's answer, on meta tensors its shape, and a message for what they cannot do."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mbq_export.errors import MbqError
from mbq_export.schemes.integers import quantize_activations
from mbq_kernels import ops
from mbq_kernels.cases import DTYPES, epilogue_cases
from mbq_kernels.comparison import Family
from mbq_kernels.library import KernelLibrary, LinearCall
from mbq_kernels.testing import Epilogue, assert_close
from tests.kernels.emulated import loaded
from tests.kernels.emulated_linear import library_path
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

FLOAT32_ROUNDING = 2e-7
"""Rounding a float64 answer to float32, half an ulp of each element, with room."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_cpu_answers_every_case_from_the_tiles(scheme: str, dtype: torch.dtype) -> None:
    for case in all_cases(scheme, dtype):
        problem = case.make(0)
        assert_close(answer(problem), problem)


def test_a_cpu_also_computes_in_float32_without_rounding() -> None:
    problem = replace(SMALL, dtype=torch.float32).make(0)
    found = answer(problem).double().numpy()
    wanted = problem.answer.reference
    assert np.linalg.norm(found - wanted) <= FLOAT32_ROUNDING * np.linalg.norm(wanted)


def test_leading_axes_are_rows() -> None:
    problem = replace(SMALL, m=6).make(0)
    weight, residual = weight_of(problem), problem.residual
    assert residual is not None
    flat = ops.apply(weight, problem.x, residual=residual)
    deep = ops.apply(weight, problem.x.view(2, 3, -1), residual=residual.view(2, 3, -1))
    assert torch.equal(deep.view(6, -1), flat)


def test_no_rows_give_no_rows() -> None:
    weight = weight_of(SMALL.make(0))
    assert ops.apply(weight, torch.zeros(0, 256, dtype=torch.float16)).shape == (0, 64)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("epilogue", Epilogue)
def test_torch_finds_the_operator_consistent(scheme: str, epilogue: Epilogue) -> None:
    residual = epilogue is Epilogue.NONE
    case = replace(SMALL, scheme=scheme, epilogue=epilogue, residual=residual, bias=residual)
    problem = case.make(0)
    torch.library.opcheck(ops.linear, (), arguments(problem, epilogue=name_of(epilogue)))


def test_torch_finds_the_activation_operator_consistent() -> None:
    torch.library.opcheck(ops.quant_act, (torch.randn(3, 136),))


def test_it_is_one_node_of_a_compiled_graph_of_any_number_of_rows() -> None:
    problem = SMALL.make(0)
    weight = weight_of(problem)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: ops.apply(weight, x), backend=keep, fullgraph=True, dynamic=True
    )
    for rows in (3, 5):
        x = torch.randn(rows, 256).half()
        assert torch.equal(compiled(x), ops.apply(weight, x))
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("mbq" in name for name in called) == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another dtype of x": ({"x": torch.zeros(3, 256, dtype=torch.float64)}, "E4102"),
    "another K": ({"x": torch.zeros(3, 128, dtype=torch.float16)}, "E4102"),
    "x is no matrix": ({"x": torch.zeros(256, dtype=torch.float16)}, "E4102"),
    "words of another type": ({"codes": torch.zeros(4, 2, 192, dtype=torch.int64)}, "E4102"),
    "a tile too few": ({"codes": torch.zeros(3, 2, 192, dtype=torch.int32)}, "E4102"),
    "tiles with gaps": (
        {"codes": torch.zeros(4, 2, 384, dtype=torch.int32)[..., ::2]},
        "E4102",
    ),
    "scales of another type": ({"scales": torch.zeros(4, 2, 8, 2)}, "E4102"),
    "no zero points": ({"zeros": None}, "E4102"),
    "zero points of another shape": ({"zeros": torch.zeros(4, 2, dtype=torch.int32)}, "E4102"),
    "a bias of another dtype": ({"bias": torch.zeros(64)}, "E4102"),
    "a bias of another length": ({"bias": torch.zeros(60, dtype=torch.float16)}, "E4102"),
    "a residual of other rows": ({"residual": torch.zeros(2, 64, dtype=torch.float16)}, "E4102"),
    "another device": ({"codes": torch.zeros(4, 2, 192, dtype=torch.int32, device="meta")}, "E4102"),
    "an unknown scheme": ({"scheme": "w5a16"}, "E2001"),
    "an unknown epilogue": ({"epilogue": "relu"}, "E2001"),
    "a group size the scheme has not": ({"group_size": 48}, "E2004"),
    "half a tile of gate": ({"epilogue": "silu_mul", "n": 60}, "E4102"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_a_linear_cannot_take_is_an_error_with_a_code(what: str) -> None:
    changes, code = BAD[what]
    with pytest.raises(MbqError) as caught:
        ops.linear(**arguments(SMALL.make(0), **changes))
    assert caught.value.code == code


def test_what_is_no_tensor_is_a_type_error() -> None:
    with pytest.raises((TypeError, RuntimeError), match="codes"):
        ops.linear(**arguments(SMALL.make(0), codes="tiles"))


def test_shapes_are_known_without_numbers() -> None:
    given = arguments(SMALL.make(0), epilogue="silu_mul", residual=None)
    bare = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    found = ops.linear(**bare)
    assert (found.shape, found.dtype, found.device.type) == ((3, 32), torch.float16, "meta")


@pytest.mark.parametrize("k", [8, 128, 136])
def test_activations_are_quantized_as_the_scheme_says(k: int) -> None:
    draws = np.random.default_rng(k)
    x = draws.standard_normal((5, k)).astype(np.float16)
    x[1], x[2, 3], x[3, 0] = 0, np.nan, np.inf
    wanted, scales = quantize_activations(x)
    codes, found = ops.quant_act(torch.from_numpy(x))
    np.testing.assert_array_equal(found.numpy(), scales)
    whole = np.zeros((5, 128 * -(-k // 128)), np.int8)
    whole[:, :k] = wanted
    for column in range(whole.shape[1]):
        place = column - column % 4 + (0, 2, 1, 3).index(column % 4)
        np.testing.assert_array_equal(codes[:, place].numpy(), whole[:, column])


def test_activations_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(MbqError) as caught:
        ops.quant_act(torch.zeros(8))
    assert caught.value.code == "E4102"


def test_without_library_and_triton_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SMALL.make(0)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mbq_kernels.base", raising=False)
    with pytest.raises(MbqError, match=r"pip install \S+mbq-export\[triton\]") as caught:
        ops.by_triton(weight_of(problem), problem.x)
    assert caught.value.code == "E3005"


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before the first launch of a process."""
    monkeypatch.setattr(ops._Choice, "decided", False)
    monkeypatch.setattr(ops._Choice, "library", None)


@pytest.mark.usefixtures("undecided")
def test_a_missing_library_is_told_once_and_triton_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ops, "BUILT_LIBRARY", tmp_path / "libmbq_kernels.so")
    assert [ops.chosen_library() for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert "Triton" in caplog.text


@pytest.mark.usefixtures("undecided")
def test_a_library_that_is_none_is_an_error_not_a_reason_for_triton(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ops, "BUILT_LIBRARY", tmp_path / "libmbq_kernels.so")
    ops.BUILT_LIBRARY.write_bytes(b"no library")
    with pytest.raises(MbqError) as caught:
        ops.chosen_library()
    assert caught.value.code == "E3005"


def test_only_importing_the_module_registers_the_operators() -> None:
    code = (
        "import torch, mbq_export.commands, mbq_kernels.weights, mbq_kernels.library;"
        "before = hasattr(torch.ops.mbq, 'linear');"
        "import mbq_kernels.ops;"
        "raise SystemExit(before or not hasattr(torch.ops.mbq, 'linear'))"
    )
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=path)


class Watched(KernelLibrary):
    """The emulated library, which may touch nothing but what a call of the operators names."""

    def allow(self, address: int, size: int, *, writable: bool = False) -> None:
        if size:
            self.cdll.mbq_emulation_register(address, size, writable)

    def allow_only(self, *tensors: Tensor | None) -> None:
        self.cdll.mbq_emulation_forget_all()
        for tensor in tensors:
            if tensor is not None:
                self.allow(tensor.data_ptr(), tensor.nbytes)

    def linear(self, call: LinearCall, *, m: int, y: int, **others: Any) -> None:
        self.allow(
            y, 2 * m * (call.n // 2 if call.epilogue == "silu_mul" else call.n), writable=True
        )
        self.allow(*others["workspace"], writable=True)
        super().linear(call, m=m, y=y, **others)

    def quant_act(self, *, m: int, k: int, xq: int, sx: int, **others: Any) -> None:
        self.allow(xq, m * 128 * -(-k // 128), writable=True)
        self.allow(sx, 4 * m, writable=True)
        super().quant_act(m=m, k=k, xq=xq, sx=sx, **others)


@pytest.fixture(scope="module")
def watched() -> Watched:
    path = library_path()
    return Watched(loaded(path), path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_library_is_called_with_what_it_needs(
    watched: Watched, scheme: str, dtype: torch.dtype
) -> None:
    for case in epilogue_cases(scheme, dtype):
        problem = case.make(0)
        weight = weight_of(problem)
        x, residual = problem.x, problem.residual
        watched.allow_only(x, residual, weight.codes, weight.scales, weight.zeros, weight.bias)
        y = ops.by_library(watched, weight, x, residual=residual, epilogue=name_of(case.epilogue))
        family = Family.SKINNY if case.m <= SKINNY_ROWS else Family.GEMM
        assert_close(y, problem, family=family)


@pytest.mark.slow
@pytest.mark.parametrize("k", [8, 128, 136])
def test_the_library_quantizes_activations_bit_for_bit(watched: Watched, k: int) -> None:
    x = torch.randn(5, k).half()
    watched.allow_only(x)
    found = ops.quant_act_by_library(watched, x)
    for ours, wanted in zip(found, ops.quant_act(x), strict=True):
        assert torch.equal(ours, wanted)
