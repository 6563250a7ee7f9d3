"""4-bit constants in standard operators compute what the packed weight means, for both runtimes."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
import pytest

from mbq_export.errors import UsageError
from mbq_export.evaluate.tolerances import OP_FP16, OP_FP32
from mbq_export.export import ops
from mbq_export.export.check import Limits, check_graph
from mbq_export.export.graph import settle_constants
from mbq_export.export.lowerings.qdq import LOWERING, check_group
from mbq_export.export.profile import OPSET23
from mbq_export.export.save import save_graph
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.integers import integer_linear, quantize_activations
from mbq_export.schemes.oracle import dequantized, weight_only_linear
from mbq_export.tensor_file import BFLOAT16
from tests.export.one_linear import one_node, packed, random_packed, relative_error, run_on_ort
from tests.export.rounded_linears import EACH, Rounded, codes, lowered
from tests.export.test_functions import CASES, Case, normal
from tests.schemes.integer_weights import weight_of

RNG = np.random.default_rng(11)
BFLOAT16_ULP: Final = 2**-8
"""Rounding to 8 bits leaves half of it; a tie that falls to the other side leaves all of it."""


def constants(model: ir.Model) -> dict[str, ir.DataType]:
    settle_constants(model.graph)
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
    weight = packed(RNG.integers(13, 16, (16, 128)), bits=4, group_size=32, zeros=15)
    x = np.abs(normal(4, 128)).astype(np.float16)
    model = one_node(weight, lowering="qdq", target="trt", dtype="fp16")
    error = np.abs(run_on_ort(model, x, tmp_path) - weight_only_linear(x, weight))
    uncorrected = np.abs(x.astype(float) @ dequantized(replace(weight, zeros=None)).T)
    assert error.max() <= OP_FP16 * uncorrected.max()


@pytest.mark.parametrize("target", ["ort", "trt"])
def test_three_bit_codes_become_signed_int4_without_zero_points(target: str) -> None:
    weight = random_packed(RNG, n=16, k=64, bits=3, group_size=32)
    model = one_node(weight, lowering="qdq", target=target)
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
    assert LOWERING.supports(SCHEMES["w4a8"], "trt") is None
    w5a16 = replace(SCHEMES["w4a16"], name="w5a16", weight_bits=5)
    assert LOWERING.supports(w5a16, "ort") == "there is no mbq operator for w5a16"


@EACH
@pytest.mark.parametrize("bits", [4, 8])
def test_standard_form_equals_the_oracle_to_the_bit(
    case: Rounded, bits: int, tmp_path: Path
) -> None:
    weight = case.weight(CHANNEL, bits)
    found = run_on_ort(lowered(weight, "qdq"), case.x, tmp_path)
    np.testing.assert_array_equal(found, integer_linear(case.x, weight))


@EACH
@pytest.mark.parametrize("bits", [4, 8])
def test_form_for_tensorrt_says_the_same_to_a_runtime_that_multiplies_in_floats(
    case: Rounded, bits: int, tmp_path: Path
) -> None:
    """ONNX Runtime multiplies INT4 codes by their scale before it sums; INT8 codes it does not."""
    weight = case.weight(CHANNEL, bits)
    found = run_on_ort(lowered(weight, "qdq", target="trt"), case.x, tmp_path)
    assert relative_error(found, integer_linear(case.x, weight)) <= OP_FP32


@pytest.mark.parametrize(
    ("bits", "target", "kind"),
    [(4, "ort", "INT8"), (4, "trt", "INT4"), (8, "ort", "INT8"), (8, "trt", "INT8")],
)
def test_codes_have_the_type_that_the_runtime_multiplies(bits: int, target: str, kind: str) -> None:
    weight = codes(16, 128)(CHANNEL, bits)
    types = constants(lowered(weight, "qdq", target=target, dtype="fp16"))
    assert types[f"linear.qweight_{kind.lower()}"] == ir.DataType[kind]
    assert types["linear.channel_scales"] == ir.DataType.FLOAT
    assert not set(types.values()) & {ir.DataType.UINT4, ir.DataType.UINT8, ir.DataType.UINT32}


def test_no_quantize_node_has_a_computed_scale() -> None:
    """TensorRT refuses one, or ignores it; the token's scale is divided out before and multiplied in behind."""
    model = lowered(codes(16, 128)(CHANNEL), "qdq", target="trt", dtype="fp16")
    nodes = [node for node in model.graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert len(nodes) == 3
    for node in nodes:
        scale = node.inputs[1]
        assert scale is not None
        assert scale.is_initializer()
    unit = nodes[0].inputs[1]
    assert unit is not None
    assert unit.const_value is not None
    assert unit.const_value.numpy().item() == 1.0


def test_everything_between_the_casts_is_float() -> None:
    model = lowered(codes(16, 128)(CHANNEL), "qdq", target="trt", dtype="fp16")
    kinds = {str(node.name): node.outputs[0].dtype for node in model.graph}
    assert kinds.pop("linear.rounded") == ir.DataType.FLOAT16
    assert kinds.pop("linear.x_codes") == ir.DataType.INT8
    assert set(kinds.values()) == {ir.DataType.FLOAT}
    assert "linear" in kinds, "the product has the name of the linear"


def test_linears_of_one_graph_share_their_constants() -> None:
    weight = codes(16, 128)(CHANNEL)
    names = set(constants(lowered(weight, "qdq")))
    assert {name for name in names if name.startswith("activations.")} == {
        "activations.last_axis", "activations.smallest_absmax", "activations.largest_code",
        "activations.unit_scale", "activations.unit_zero",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_scales_of_channels_stay_exact_and_weights_become_narrow_once(dtype: str) -> None:
    """TensorRT for RTX multiplies such weights from their codes, with the Cast in the same kernel."""
    weight = codes(16, 128)(CHANNEL, 8)
    model = one_node(weight, lowering="qdq", target="trt", dtype=dtype, scheme="w8a16")
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "Cast", "MatMul"]
    assert constants(model) == {
        "linear.qweight_int8": ir.DataType.INT8,
        "linear.channel_scales": ir.DataType.FLOAT,
        # Without them ONNX Runtime fails on CPUs that have no VNNI.
        "linear.channel_zeros": ir.DataType.INT8,
    }


@pytest.mark.parametrize("target", ["ort", "trt"])
def test_groups_have_no_standard_form(target: str) -> None:
    with pytest.raises(UsageError, match="w4a8 in groups of 128 has no qdq form") as caught:
        lowered(codes(16, 128)(128), "qdq", target=target)
    assert caught.value.code == "E2006"
    assert caught.value.why == (
        "group-wise W4A8 needs the plugin lowering; TensorRT may compile this pattern to a wrong result"
    )


def test_only_rounded_activations_make_groups_a_problem() -> None:
    assert LOWERING.check_group is check_group
    check_group(SCHEMES["w4a8"], CHANNEL)
    check_group(SCHEMES["w4a16"], 128)


@EACH
@pytest.mark.parametrize("lowering", ["reference", "qdq"])
def test_half_precision_rounds_the_result_alone(
    case: Rounded, lowering: str, tmp_path: Path
) -> None:
    weight, x = case.weight(CHANNEL), case.x.astype(np.float16)
    found = run_on_ort(lowered(weight, lowering, dtype="fp16"), x, tmp_path)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, integer_linear(x, weight).astype(np.float16))


def with_float_ports(model: ir.Model) -> ir.Model:
    """Cast on both ends: ONNX Runtime hands no bfloat16 over."""
    graph = model.graph
    x, y = graph.inputs[0], graph.outputs[0]
    wide_x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=x.shape)
    wide_y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=y.shape)
    x.name, y.name = "x_narrow", "y_narrow"
    narrow = ir.Value(name="x_bf16", type=x.type, shape=x.shape)
    attributes = ir.convenience.convert_attributes({"to": ir.DataType.BFLOAT16})
    begin = ir.Node("", "Cast", [wide_x], attributes, outputs=[narrow], name="begin")
    attributes = ir.convenience.convert_attributes({"to": ir.DataType.FLOAT})
    end = ir.Node("", "Cast", [y], attributes, outputs=[wide_y], name="end")
    ir.convenience.replace_all_uses_with(x, narrow)
    graph.inputs[0], graph.outputs[0] = wide_x, wide_y
    graph.insert_before(graph[0], begin)
    graph.append(end)
    return model


@EACH
def test_bfloat16_rounds_the_result_of_rounded_activations_alone(
    case: Rounded, tmp_path: Path
) -> None:
    """ONNX Runtime multiplies INT4 codes by their scale before it sums: results may fall on the other side of a tie."""
    weight, x = case.weight(CHANNEL), case.x.astype(BFLOAT16).astype(np.float32)
    model = with_float_ports(lowered(weight, "qdq", target="trt", dtype="bf16"))
    exact = integer_linear(x, weight)
    found = run_on_ort(model, x, tmp_path)
    assert (found == found.astype(BFLOAT16)).all()
    assert relative_error(found, exact) <= BFLOAT16_ULP


@pytest.mark.parametrize(
    ("scheme", "target", "words"),
    [
        ("w3a16", "trt", "bf16 would round the scales of its groups"),
        ("w4a16", "trt", "bf16 would round the scales of its groups"),
        ("w4a8", "trt", None),
        ("w8a8", "trt", None),
        ("w8a16", "trt", None),
        (None, "trt", None),
        ("w4a8", "ort", "ONNX Runtime multiplies no bf16"),
        (None, "ort", "ONNX Runtime multiplies no bf16"),
    ],
)
def test_bfloat16_is_refused_where_it_would_change_weights_or_nothing_runs_it(
    scheme: str | None, target: str, words: str | None
) -> None:
    reason = LOWERING.misfit(None if scheme is None else SCHEMES[scheme], target, "bf16")
    assert (reason is None) == (words is None)
    assert words is None or words in str(reason)
    assert LOWERING.misfit(SCHEMES["w3a16"], target, "fp16") is None
    assert LOWERING.misfit(SCHEMES["w3a16"], target, "fp8") == "it exists in fp32, fp16, bf16"


def test_sums_beyond_half_precision_do_not_overflow_inside(tmp_path: Path) -> None:
    """127 * 8 * 256 is 260096: the sum itself has no place in fp16, the result has."""
    weight = weight_of(np.full((16, 256), -8))
    x = np.full((1, 256), 0.5, np.float16)
    assert np.abs(quantize_activations(x)[0].astype(int) @ np.full((256, 1), -8)).max() > 65504
    for lowering in ("reference", "qdq"):
        found = run_on_ort(lowered(weight, lowering, dtype="fp16"), x, tmp_path)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("lowering", ["reference", "qdq"])
def test_a_token_with_an_infinity_has_no_finite_result(lowering: str, tmp_path: Path) -> None:
    weight, x = codes(16, 128)(CHANNEL), normal(3, 128)
    x[1, 100] = np.inf
    found = run_on_ort(lowered(weight, lowering), x, tmp_path)
    assert np.isfinite(found).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize(("lowering", "group_size"), [("reference", CHANNEL), ("reference", 128), ("qdq", CHANNEL)])  # fmt: skip
def test_graphs_of_ours_pass_their_checks(lowering: str, group_size: int, tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    save_graph(lowered(codes(16, 128)(group_size), lowering), path)
    check_graph(path, Limits(allowed=OPSET23.ops))


@pytest.mark.parametrize("lowering", ["reference", "qdq"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_graphs_of_8_bit_codes_pass_their_checks(
    scheme: str, lowering: str, tmp_path: Path
) -> None:
    path = tmp_path / "one.onnx"
    save_graph(one_node(codes(16, 128)(CHANNEL, 8), lowering=lowering, scheme=scheme), path)
    check_graph(path, Limits(allowed=OPSET23.ops))
