"""Bodies of the operators against the oracle, on two runtimes that share no code with it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from mbq_export.errors import InternalError
from mbq_export.evaluate.tolerances import OP_FP16, OP_FP32
from mbq_export.export import functions, ops
from mbq_export.schemes.base import CHANNEL, PackedWeight
from mbq_export.schemes.integers import integer_linear
from mbq_export.schemes.oracle import weight_only_linear
from tests.export.one_linear import one_node, packed, random_packed, relative_error, run_on_ort
from tests.export.rounded_linears import EACH, Rounded, lowered
from tests.schemes.integer_weights import random_q, weight_of

RNG = np.random.default_rng(7)


GROUP_RELATIVE = 5e-7
"""In groups the oracle adds float64 numbers and graphs float32 ones, 7 here: a few roundings of 6e-8."""


def normal(rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)


def largest(zeros: int) -> Callable[[int], PackedWeight]:
    return lambda bits: packed(
        np.full((16, 64), 2**bits - 1), bits=bits, group_size=32, zeros=min(zeros, 2**bits - 1)
    )


@dataclass(frozen=True)
class Case:
    """A weight and activations that would show a mistake."""

    name: str
    weight: Callable[[int], PackedWeight]
    x: NDArray[np.float32]


def outlier() -> NDArray[np.float32]:
    x = normal(2, 128)
    x[0, 77] = 1e4
    return x


CASES = (
    Case("largest codes, zero point 0", largest(0), normal(3, 64)),
    Case("largest codes, largest zero point", largest(15), normal(3, 64)),
    Case(
        "each column alone",
        lambda bits: random_packed(RNG, n=16, k=64, bits=bits, group_size=32),
        np.eye(64, dtype=np.float32),
    ),
    Case(
        "a token of zeros",
        lambda bits: random_packed(RNG, n=16, k=64, bits=bits, group_size=64),
        np.zeros((1, 64), np.float32),
    ),
    Case(
        "one outlier",
        lambda bits: random_packed(RNG, n=48, k=128, bits=bits, group_size=32),
        outlier(),
    ),
    Case(
        "one group per row",
        lambda bits: random_packed(RNG, n=16, k=128, bits=bits, group_size=128),
        normal(5, 128),
    ),
    Case(
        "an odd number of groups",
        lambda bits: random_packed(RNG, n=32, k=896, bits=bits, group_size=128),
        normal(4, 896),
    ),
    Case(
        "the widest row of a large model",
        lambda bits: random_packed(RNG, n=16, k=4864, bits=bits, group_size=64),
        normal(2, 4864),
    ),
)


def evaluate(model: ir.Model, x: NDArray[np.floating]) -> NDArray[np.floating]:
    """Run a graph on the evaluator that the ONNX standard is written with."""
    found: NDArray[np.floating] = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x[None]})[
        0
    ][0]
    return found


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_body_computes_what_the_oracle_computes_on_onnx_runtime(
    case: Case, bits: int, tmp_path: Path
) -> None:
    weight = case.weight(bits)
    found = run_on_ort(one_node(weight, lowering="reference"), case.x, tmp_path)
    assert relative_error(found, weight_only_linear(case.x, weight)) <= OP_FP32


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
def test_body_computes_what_the_oracle_computes_on_the_reference_evaluator(
    case: Case, bits: int
) -> None:
    weight = case.weight(bits)
    found = evaluate(one_node(weight, lowering="reference"), case.x)
    assert relative_error(found, weight_only_linear(case.x, weight)) <= OP_FP32


@pytest.mark.parametrize("bits", [3, 4])
def test_body_in_fp16_stays_within_its_rounding(bits: int, tmp_path: Path) -> None:
    weight = random_packed(RNG, n=32, k=256, bits=bits, group_size=64)
    x = normal(3, 256).astype(np.float16)
    found = run_on_ort(one_node(weight, lowering="reference", dtype="fp16"), x, tmp_path)
    assert found.dtype == np.float16
    assert relative_error(found, weight_only_linear(x, weight)) <= OP_FP16


@pytest.mark.parametrize("bits", [3, 4])
def test_one_hot_activations_read_out_every_code(bits: int) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 2**bits, (16, 96))
    weight = packed(codes, bits=bits, group_size=32, scales=np.ones((16, 3)), zeros=0)
    assert (weight.words.view(np.int32) < 0).mean() > 0.4, "the case must have negative words"
    found = evaluate(one_node(weight, lowering="reference"), np.eye(96, dtype=np.float32))
    np.testing.assert_array_equal(found.T, codes)


@pytest.mark.parametrize("scheme", ops.OPS)
def test_bodies_use_no_operator_that_tensorrt_refuses(scheme: str) -> None:
    used = {node.op_type for node in functions.body(ops.OPS[scheme], opset=23).node}
    refused = {"BitShift", "BitwiseAnd", "BitwiseOr", "MatMulInteger", "DynamicQuantizeLinear"}
    assert not used & refused


def test_checker_refuses_a_body_of_another_opset() -> None:
    ops.register()
    model = ir.to_proto(
        one_node(packed(np.zeros((16, 32)), bits=3, group_size=32), lowering="reference")
    )
    onnx.checker.check_model(model, full_check=True)
    model.functions[0].CopyFrom(functions.body(ops.OPS["w3a16"], opset=22))
    model.functions[0].opset_import[0].version = 17
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model, full_check=True)


def test_a_width_without_a_body_is_a_bug_of_ours() -> None:
    with pytest.raises(InternalError, match="W9Linear has no body for codes of 9 bits"):
        functions.body(ops.LinearOp(name="W9Linear", bits=9), opset=23)


@EACH
@pytest.mark.parametrize("bits", [4, 8])
def test_body_equals_the_oracle_to_the_bit_on_two_runtimes(
    case: Rounded, bits: int, tmp_path: Path
) -> None:
    weight = case.weight(CHANNEL, bits)
    wanted = integer_linear(case.x, weight)
    model = lowered(weight, "reference")
    np.testing.assert_array_equal(evaluate(model, case.x), wanted)
    np.testing.assert_array_equal(run_on_ort(model, case.x, tmp_path), wanted)


@EACH
def test_body_in_groups_differs_by_the_order_of_the_last_sum(case: Rounded, tmp_path: Path) -> None:
    weight = case.weight(128)
    wanted = integer_linear(case.x, weight)
    model = lowered(weight, "reference")
    assert relative_error(evaluate(model, case.x), wanted) <= GROUP_RELATIVE
    assert relative_error(run_on_ort(model, case.x, tmp_path), wanted) <= GROUP_RELATIVE


@pytest.mark.parametrize(("bits", "largest_code"), [(4, 8), (8, 128)])
def test_sums_are_exact_up_to_the_width_that_is_promised(bits: int, largest_code: int) -> None:
    largest = functions.exact_columns(bits) * 127 * largest_code
    assert largest <= 2**24 < largest + 127 * largest_code


@EACH
@pytest.mark.parametrize("lowering", ["reference", "qdq"])
def test_weights_of_8_bits_alone_are_multiplied_as_the_oracle_says(
    case: Rounded, lowering: str, tmp_path: Path
) -> None:
    weight, x = case.weight(CHANNEL, 8), np.clip(case.x, -1e3, 1e3)
    wanted = weight_only_linear(x, weight)
    model = one_node(weight, lowering=lowering, scheme="w8a16")
    assert relative_error(evaluate(model, x), wanted) <= OP_FP32
    assert relative_error(run_on_ort(model, x, tmp_path), wanted) <= OP_FP32
    half = one_node(weight, lowering=lowering, scheme="w8a16", dtype="fp16")
    narrow = (x / 64).astype(np.float16)  # results beyond fp16 would be infinite
    found = run_on_ort(half, narrow, tmp_path)
    assert relative_error(found, weight_only_linear(narrow, weight)) <= OP_FP16


def test_one_hot_activations_read_out_every_code_of_8_bits() -> None:
    q = random_q(3, 16, 96, bits=8)
    weight = replace(weight_of(q, bits=8), scales=np.ones((16, 1), np.float32))
    assert (weight.words.view(np.int32) < 0).mean() > 0.4, "the case must have negative words"
    model = one_node(weight, lowering="reference", scheme="w8a16")
    np.testing.assert_array_equal(evaluate(model, np.eye(96, dtype=np.float32)).T, q)
