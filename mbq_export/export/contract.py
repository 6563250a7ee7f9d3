"""Whether a graph keeps the contract of `ops`: operators, bodies, attributes, and the values of packed constants.

node of the mbq domain   all attributes, agreeing with the shapes of its constants
    with a body          words in rows; the body is the registered one, unchanged
    of the plugin form   words in tiles, no body anywhere in the file: `plugin_contract`
constants                no type that a runtime widens or refuses; scales positive; zero points in range
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

import onnx
from onnx import TensorProto

from mbq_export.errors import FormatError, located
from mbq_export.export import functions, ops
from mbq_export.export.dequantize_contract import check_dequantized, check_products
from mbq_export.export.external_data import Place, read_array
from mbq_export.export.packed_contract import (
    attributes_of,
    check_facts,
    check_range,
    check_scales,
    constant_of,
    unknown,
)
from mbq_export.export.plugin_contract import (
    check_bodiless,
    check_layers,
    check_tiles,
    is_plugin,
    value_types,
)
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.layouts.dense import LAYOUT, words_per_row

NEVER: Final = {
    TensorProto.UINT8: "UINT8",
    TensorProto.UINT32: "UINT32",
    TensorProto.UINT2: "UINT2",
}
"""Widened fourfold, or refused, by TensorRT; nothing of ours needs them anywhere."""
NOT_IN_TENSORRT: Final = {**NEVER, TensorProto.UINT4: "UINT4", TensorProto.INT2: "INT2"}
_AGAIN: Final = "export the model again"


def check_operators(model: onnx.ModelProto, *, allowed: frozenset[str] | None = None) -> None:
    """Check that every node is a known operator, and every custom one brings its body.

    Args:
        model: Graph of checked structure.
        allowed: Standard operators that the op level has; None for any.

    Raises:
        FormatError: E4408 for an operator, E4412 for a body that is not the registered one.
    """
    opset = _opset(model)
    bodies = {function.name: function for function in model.functions}
    used = {node.op_type for node in model.graph.node if node.domain == ops.DOMAIN}
    for node in model.graph.node:
        with located(node.name or node.op_type):
            if node.domain == ops.DOMAIN:
                _check_custom(node, model, bodies)
            else:
                _check_standard(node, opset, allowed)
    check_layers(model)
    for name, function in bodies.items():
        with located(f"function {name}"):
            op = ops.op_named(name) if function.domain == ops.DOMAIN else None
            if op is None or name not in used:
                unknown(
                    f"Function {name} of domain {function.domain!r} belongs to no node of ours."
                )
            elif signature(function) != signature(functions.body(op, opset=opset)):
                raise FormatError(
                    "E4412",
                    f"The body of {name} is not the registered one.",
                    why="a changed body would compute something else under the same name",
                    fix=_AGAIN,
                )


def check_constants(
    model: onnx.ModelProto, places: Mapping[str, Place], *, target: str | None = None
) -> None:
    """Check types, shapes and values of the constants of packed linears.

    Args:
        model: Graph of checked structure and operators.
        places: Checked places of external constants.
        target: ``trt`` to refuse what TensorRT cannot read.

    Raises:
        FormatError: E4409 for attributes that contradict shapes, E4410 for a type, E4411 for a value, E4414 for a
            product that TensorRT may get wrong.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in constants.values():
        refused = (NOT_IN_TENSORRT if target == "trt" else NEVER).get(tensor.data_type)
        if refused:
            raise FormatError(
                "E4410",
                f"Constant {tensor.name!r} is {refused}.",
                why="TensorRT widens UINT8 fourfold and refuses UINT32, UINT4 and 2-bit types",
                fix="--lowering qdq with the target it is for",
            )
    types = value_types(model)
    for node in model.graph.node:
        with located(node.name or node.op_type):
            if is_plugin(node):
                check_tiles(node, constants, places, types)
            elif node.domain == ops.DOMAIN:
                _check_packed(node, constants, places)
            elif node.op_type == "DequantizeLinear":
                check_dequantized(node, constants, places, target=target)
    check_products(model)


def signature(function: onnx.FunctionProto) -> tuple[Any, ...]:
    """What a function computes, without names of nodes and documentation."""
    nodes = tuple(
        (
            node.op_type,
            node.domain,
            tuple(node.input),
            tuple(node.output),
            tuple(sorted(_attribute(each) for each in node.attribute)),
        )
        for node in function.node
    )
    imports = tuple(sorted((each.domain, each.version) for each in function.opset_import))
    ports = (tuple(function.input), tuple(function.output), tuple(sorted(function.attribute)))
    return (function.domain, function.name, *ports, imports, nodes)


def _attribute(attribute: onnx.AttributeProto) -> tuple[str, str, bytes]:
    plain = onnx.AttributeProto()
    plain.CopyFrom(attribute)
    for field in ("doc_string", "name", "ref_attr_name"):
        plain.ClearField(field)
    if plain.HasField("t"):
        plain.t.ClearField("name")
    return attribute.name, attribute.ref_attr_name, plain.SerializeToString(deterministic=True)


def _opset(model: onnx.ModelProto) -> int:
    return next(int(each.version) for each in model.opset_import if each.domain in {"", "ai.onnx"})


def _check_standard(node: onnx.NodeProto, opset: int, allowed: frozenset[str] | None) -> None:
    if node.domain not in {"", "ai.onnx"}:
        unknown(f"Operator {node.op_type} is of the unknown domain {node.domain!r}.")
    if not onnx.defs.has(node.op_type, opset, ""):
        unknown(f"Opset {opset} has no operator {node.op_type!r}.")
    if allowed is not None and node.op_type not in allowed:
        unknown(f"Operator {node.op_type} is above the op level of this graph.")


def _check_custom(node: onnx.NodeProto, model: onnx.ModelProto, bodies: Collection[str]) -> None:
    imports = {each.domain: each.version for each in model.opset_import}
    op = ops.op_named(node.op_type)
    if op is None:
        unknown(f"Domain {ops.DOMAIN!r} has no operator {node.op_type!r}.")
    if imports.get(ops.DOMAIN) != ops.DOMAIN_VERSION:
        unknown(f"Domain {ops.DOMAIN!r} is imported in version {imports.get(ops.DOMAIN)}.")
    if is_plugin(node):
        check_bodiless(node, bodies)
    elif node.op_type not in bodies:
        unknown(f"Operator {node.op_type} has no body in this file.")
    known = set(ops.PLUGIN_ATTRIBUTES if is_plugin(node) else ops.ATTRIBUTES)
    names = {each.name for each in node.attribute}
    if names != known:
        missing, extra = sorted(known - names), sorted(names - known)
        unknown(
            f"Attributes of {node.op_type}: {missing or 'none'} missing, {extra or 'none'} unknown."
        )
    wrong = [each.name for each in node.attribute if each.type != _kind(each.name)]
    if wrong:
        unknown(f"Attribute {wrong[0]} of {node.op_type} is of another type.")
    bias = attributes_of(node)["has_bias"] if is_plugin(node) else 0
    if len(node.input) != len(op.inputs) + bias or len(node.output) != 1:
        unknown(f"{node.op_type} has {len(node.input)} inputs and {len(node.output)} outputs.")


def _kind(name: str) -> int:
    kinds = onnx.AttributeProto
    return kinds.STRING if name in ops.STRING_ATTRIBUTES else kinds.INT


def _check_packed(
    node: onnx.NodeProto, constants: Mapping[str, TensorProto], places: Mapping[str, Place]
) -> None:
    has = attributes_of(node)
    op = ops.op_named(node.op_type)
    assert op is not None
    check_facts(has, op, layout=LAYOUT)
    rows, columns = has["N"], has["K"]
    channel = has["group_size"] == CHANNEL
    groups = 1 if channel else columns // has["group_size"]
    kind = TensorProto.FLOAT if channel else TensorProto.FLOAT16
    wanted = {
        "qweight": (TensorProto.INT32, [rows, words_per_row(columns, op.bits)]),
        "scales": (kind, [rows] if channel else [rows, groups]),
        "zeros": (TensorProto.INT32, [rows, groups]),
    }
    tensors = {
        port: constant_of(constants.get(name), name, *wanted[port])
        for port, name in zip(op.inputs[1:], node.input[1:], strict=True)
    }
    scales, zeros = tensors["scales"], tensors.get("zeros")
    check_scales(read_array(scales, places.get(scales.name)), scales.name)
    if zeros is not None:
        array = read_array(zeros, places.get(zeros.name))
        check_range(array, largest=2**op.bits - 1, name=zeros.name)
