"""4-bit constants in standard operators compute what the packed weight means, for both runtimes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mbq_export.evaluate.tolerances import OP_FP16, OP_FP32
from mbq_export.export import ops
from mbq_export.export.graph import settle_constants
from mbq_export.export.lowerings.qdq import LOWERING
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.oracle import dequantized, weight_only_linear
from tests.export.one_linear import one_node, packed, random_packed, relative_error, run_on_ort
from tests.export.test_functions import CASES, Case, normal

RNG = np.random.default_rng(11)


def constants(model: ir.Model) -> dict[str, ir.DataType]:
    return {str(value.name): value.const_value.dtype for value in model.graph.initializers.values()}  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_form_for_onnx_runtime_computes_what_the_oracle_computes(
    case: Case, bits: int, tmp_path: Path
) -> None:
    weight = case.weight(bits)
    found = run_on_ort(one_node(weight, lowering="qdq"), case.x, tmp_path)
    assert relative_error(found, weight_only_linear(case.x, weight)) <= OP_FP32


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_form_for_tensorrt_computes_what_the_oracle_computes_in_fp16(
    case: Case, bits: int, tmp_path: Path
) -> None:
    weight, x = case.weight(bits), case.x.astype(np.float16)
    model = one_node(weight, lowering="qdq", target="trt", dtype="fp16")
    found = run_on_ort(model, x, tmp_path)
    assert relative_error(found, weight_only_linear(x, weight)) <= OP_FP16


def test_correction_costs_no_more_than_the_rounding_of_the_product(tmp_path: Path) -> None:
    """The worst case: zero points at the end of the range, so that two large numbers nearly cancel."""
    codes = RNG.integers(13, 16, (16, 128))
    weight = packed(codes, bits=4, group_size=32, zeros=15)
    x = np.abs(normal(4, 128)).astype(np.float16)
    model = one_node(weight, lowering="qdq", target="trt", dtype="fp16")
    error = np.abs(run_on_ort(model, x, tmp_path) - weight_only_linear(x, weight))
    uncorrected = np.abs(x.astype(float) @ dequantized(replace(weight, zeros=None)).T)
    assert error.max() <= OP_FP16 * uncorrected.max()


@pytest.mark.parametrize("target", ["ort", "trt"])
def test_three_bit_codes_become_signed_int4_without_zero_points(target: str) -> None:
    weight = random_packed(RNG, n=16, k=64, bits=3, group_size=32)
    model = one_node(weight, lowering="qdq", target=target)
    settle_constants(model.graph)
    assert constants(model) == {
        "linear.qweight_int4": ir.DataType.INT4,
        "linear.block_scales": ir.DataType.FLOAT,
    }
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul"]


def test_symmetric_four_bit_codes_need_no_correction() -> None:
    weight = packed(RNG.integers(0, 16, (16, 64)), bits=4, group_size=32, zeros=None)
    for target in ("ort", "trt"):
        model = one_node(weight, lowering="qdq", target=target)
        assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul"]


@pytest.mark.parametrize("bits", [3, 4])
def test_form_for_tensorrt_holds_no_type_that_it_refuses(bits: int) -> None:
    weight = random_packed(RNG, n=16, k=64, bits=bits, group_size=32)
    types = set(constants(one_node(weight, lowering="qdq", target="trt", dtype="fp16")).values())
    assert not types & {ir.DataType.UINT4, ir.DataType.UINT8, ir.DataType.UINT32, ir.DataType.INT2}


@pytest.mark.parametrize("bits", [3, 4])
def test_every_block_runs_along_k(bits: int) -> None:
    weight = random_packed(RNG, n=16, k=96, bits=bits, group_size=32)
    model = one_node(weight, lowering="qdq")
    blocks = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    assert blocks.attributes["axis"].as_int() == 0
    assert blocks.attributes["block_size"].as_int() == 32
    assert tuple(blocks.inputs[0].shape) == (96, 16)  # type: ignore[union-attr,arg-type]


def test_matmul_takes_name_output_and_source_of_the_node() -> None:
    weight = random_packed(RNG, n=16, k=64, bits=4, group_size=32)
    for target in ("ort", "trt"):
        model = one_node(weight, lowering="qdq", target=target, dtype="fp16")
        product = next(node for node in model.graph if node.op_type == "MatMul")
        assert product.name == "linear"
        assert product.metadata_props[ops.SOURCE] == "w"
        assert [str(value.name) for value in model.graph.outputs] == ["y"]
        assert ops.DOMAIN not in model.opset_imports


def test_schemes_that_it_cannot_hold_are_refused_with_the_reason() -> None:
    assert LOWERING.supports(SCHEMES["w3a16"], "trt") is None
    assert LOWERING.supports(SCHEMES["w4a16"], "ort") is None
    w4a8 = replace(SCHEMES["w4a16"], name="w4a8", act_bits=8)
    assert (
        LOWERING.supports(w4a8, "trt")
        == "w4a8 quantizes activations, which this form does not write"
    )
    w5a16 = replace(SCHEMES["w4a16"], name="w5a16", weight_bits=5)
    assert LOWERING.supports(w5a16, "ort") == "there is no mbq operator for w5a16"
