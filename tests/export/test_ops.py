"""The contract of the domain, as onnx's own checker sees it."""

import subprocess
import sys
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from mbq_export.errors import UsageError
from mbq_export.export import functions, ops
from mbq_export.schemes import SCHEMES

ATTRIBUTES: dict[str, Any] = {
    "N": 8,
    "K": 32,
    "group_size": 32,
    "bits": 3,
    "signed_codes": 0,
    "layout_version": 1,
    "layout": "dense",
    "plugin_namespace": "mbq",
    "plugin_version": "1",
}
PORTS = (
    helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", 32]),
    helper.make_tensor_value_info("qweight", TensorProto.INT32, [8, 3]),
    helper.make_tensor_value_info("scales", TensorProto.FLOAT16, [8, 1]),
    helper.make_tensor_value_info("zeros", TensorProto.INT32, [8, 1]),
    helper.make_tensor_value_info("bias", TensorProto.FLOAT, [8]),
)


def graph(
    *, inputs: int = 4, attributes: dict[str, Any] | None = None, body: bool = True
) -> onnx.ModelProto:
    """One W3Linear whose constants are inputs."""
    ports = PORTS[:inputs]
    node = helper.make_node(
        "W3Linear",
        [port.name for port in ports],
        ["y"],
        domain=ops.DOMAIN,
        **(attributes or ATTRIBUTES),
    )
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", "n"])
    return helper.make_model(
        helper.make_graph([node], "one", ports, [result]),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(ops.DOMAIN, 1)],
        functions=[functions.body(ops.OPS["w3a16"], opset=23)] if body else [],
        ir_version=11,
    )


def check(model: onnx.ModelProto) -> None:
    ops.register()
    onnx.checker.check_model(model, full_check=True)


def test_register_twice_is_the_same_as_once() -> None:
    ops.register()
    ops.register()
    assert onnx.defs.get_schema("W3Linear", 1, ops.DOMAIN).since_version == 1


@pytest.mark.parametrize("body", [True, False])
@pytest.mark.parametrize("inputs", [4, 5])
def test_checker_accepts_a_node_with_and_without_bias_and_body(*, inputs: int, body: bool) -> None:
    check(graph(inputs=inputs, body=body))


def test_shape_inference_replaces_the_last_axis_by_n() -> None:
    ops.register()
    inferred = onnx.shape_inference.infer_shapes(graph(), strict_mode=True)
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["b", "t", 8]


def test_checker_refuses_a_misspelt_attribute() -> None:
    with pytest.raises(onnx.checker.ValidationError, match="Unrecognized attribute: groupsize"):
        check(graph(attributes={**ATTRIBUTES, "groupsize": 32}))


@pytest.mark.parametrize("name", ops.ATTRIBUTES)
def test_checker_refuses_a_missing_attribute(name: str) -> None:
    rest = {key: value for key, value in ATTRIBUTES.items() if key != name}
    with pytest.raises(
        onnx.checker.ValidationError, match=f"Required attribute '{name}' is missing"
    ):
        check(graph(attributes=rest))


def test_every_attribute_of_the_contract_is_an_attribute_of_every_body() -> None:
    for op in ops.OPS.values():
        assert tuple(functions.body(op, opset=23).attribute) == ops.ATTRIBUTES


def test_names_of_ports_are_those_of_other_tools() -> None:
    assert ops.decoder_inputs(2, static=True) == (
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "write_indices",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    )
    assert ops.decoder_inputs(1, static=False)[3] == "past_key_values.0.key"
    assert ops.decoder_outputs(1) == ("logits", "present.0.key", "present.0.value")


def test_linears_of_one_input_share_its_name() -> None:
    assert ops.linear_input(3, "v_proj") == ops.linear_input(3, "q_proj") == "layers.3.q_proj.in"
    assert ops.linear_input(3, "up_proj") == "layers.3.gate_proj.in"
    assert ops.linear_input(3, "down_proj") == "layers.3.down_proj.in"


def test_width_without_an_operator_names_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        ops.op_of_bits(8)
    assert str(caught.value) == (
        "MBQ-E2005: No operator holds weights of 8 bits.\n"
        "  why     known: W3Linear (3 bits), W4A16Linear (4 bits)\n"
        "  fix     --wbits 3\n"
        "  fix     --wbits 4"
    )


def test_every_scheme_with_an_operator_has_its_width() -> None:
    for name, op in ops.OPS.items():
        assert SCHEMES[name].weight_bits == op.bits
        assert ops.scheme_of_bits(op.bits) == name


def test_importing_the_contract_registers_nothing() -> None:
    code = "import onnx, mbq_export.export.ops as o; raise SystemExit(onnx.defs.has('W3Linear', 1, o.DOMAIN))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
