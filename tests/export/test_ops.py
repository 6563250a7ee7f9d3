"""The contract of the domain, as onnx's own checker sees it."""

import subprocess
import sys
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

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
    for scheme in ("w3a16", "w4a16"):
        assert tuple(functions.body(ops.OPS[scheme], opset=23).attribute) == ops.ATTRIBUTES


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


def test_an_operator_is_what_its_scheme_is() -> None:
    assert ops.PLUGINS == {"w3a16": "w3t", "w4a16": "w4t", "w4a8": "w4t"}
    for name, op in ops.OPS.items():
        scheme = SCHEMES[name]
        facts = (scheme.weight_bits, scheme.act_bits, scheme.symmetric, scheme.kernel_layout)
        assert (op.bits, op.act_bits, op.symmetric, op.tiles) == facts


def test_only_operators_of_schemes_with_zero_points_read_them() -> None:
    assert ops.OPS["w3a16"].inputs == ("x", "qweight", "scales", "zeros")
    assert ops.OPS["w4a8"].inputs == ("x", "qweight", "scales")


def test_the_plugin_form_has_attributes_that_the_reference_form_has_not() -> None:
    plugin = {**ATTRIBUTES, "has_bias": 0, "epilogue": 0, "act_bits": 16, "row_order": 0}
    check(graph(attributes=plugin, body=False))
    assert set(plugin) == set(ops.PLUGIN_ATTRIBUTES)
    assert set(ops.PLUGIN_FIELDS) <= set(ops.INT_ATTRIBUTES + ops.PLUGIN_INT_ATTRIBUTES)


@pytest.mark.parametrize("scales", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_w4a8_takes_scales_per_channel_and_per_group(scales: int) -> None:
    check(w4a8_graph(scales))


def test_w4a8_takes_no_other_scales() -> None:
    with pytest.raises(
        onnx.shape_inference.InferenceError, match="scales typestr: S, has unsupported"
    ):
        check(w4a8_graph(TensorProto.DOUBLE))


def w4a8_graph(scales: int) -> onnx.ModelProto:
    """One W4A8Linear without a body, whose constants are inputs."""
    shape = [8] if scales == TensorProto.FLOAT else [8, 1]
    ports = (
        helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["b", "t", 128]),
        helper.make_tensor_value_info("qweight", TensorProto.INT32, [8, 16]),
        helper.make_tensor_value_info("scales", scales, shape),
    )
    attributes = {**ATTRIBUTES, "K": 128, "bits": 4, "signed_codes": 1}
    names = [port.name for port in ports]
    node = helper.make_node("W4A8Linear", names, ["y"], domain=ops.DOMAIN, **attributes)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["b", "t", "n"])
    return helper.make_model(
        helper.make_graph([node], "one", ports, [result]),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(ops.DOMAIN, 1)],
        ir_version=11,
    )


def test_importing_the_contract_registers_nothing() -> None:
    code = "import onnx, mbq_export.export.ops as o; raise SystemExit(onnx.defs.has('W3Linear', 1, o.DOMAIN))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
