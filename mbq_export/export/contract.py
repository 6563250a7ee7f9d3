"""Whether a graph keeps the contract of `ops`: operators, bodies, attributes, and the values of packed constants.

node of the mbq domain   all attributes, agreeing with the shapes of its constants
function                 the registered body, unchanged
constants                no type that a runtime widens or refuses; scales positive; zero points in range
"""

from collections.abc import Mapping
from typing import Any, Final, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from mbq_export.errors import FormatError, located
from mbq_export.export import functions, ops
from mbq_export.export.external_data import Place, read_array
from mbq_export.schemes.base import GROUP_SIZES
from mbq_export.schemes.layouts.dense import LAYOUT, words_per_row

NEVER: Final = {
    TensorProto.UINT8: "UINT8",
    TensorProto.UINT32: "UINT32",
    TensorProto.UINT2: "UINT2",
}
"""Widened fourfold, or refused, by TensorRT; nothing of ours needs them anywhere."""
NOT_IN_TENSORRT: Final = {**NEVER, TensorProto.UINT4: "UINT4", TensorProto.INT2: "INT2"}
NIBBLES: Final = frozenset({TensorProto.INT4, TensorProto.UINT4})
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
                _check_custom(node, model, has_body=node.op_type in bodies)
            else:
                _check_standard(node, opset, allowed)
    for name, function in bodies.items():
        with located(f"function {name}"):
            op = ops.op_named(name) if function.domain == ops.DOMAIN else None
            if op is None or name not in used:
                _unknown(
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
        FormatError: E4409 for attributes that contradict shapes, E4410 for a type, E4411 for a value.
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
    for node in model.graph.node:
        with located(node.name or node.op_type):
            if node.domain == ops.DOMAIN:
                _check_packed(node, constants, places)
            elif node.op_type == "DequantizeLinear":
                _check_blocks(node, constants, places)


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


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes of a node by name, strings decoded."""
    values = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


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
        _unknown(f"Operator {node.op_type} is of the unknown domain {node.domain!r}.")
    if not onnx.defs.has(node.op_type, opset, ""):
        _unknown(f"Opset {opset} has no operator {node.op_type!r}.")
    if allowed is not None and node.op_type not in allowed:
        _unknown(f"Operator {node.op_type} is above the op level of this graph.")


def _check_custom(node: onnx.NodeProto, model: onnx.ModelProto, *, has_body: bool) -> None:
    imports = {each.domain: each.version for each in model.opset_import}
    if ops.op_named(node.op_type) is None:
        _unknown(f"Domain {ops.DOMAIN!r} has no operator {node.op_type!r}.")
    if imports.get(ops.DOMAIN) != ops.DOMAIN_VERSION:
        _unknown(f"Domain {ops.DOMAIN!r} is imported in version {imports.get(ops.DOMAIN)}.")
    if not has_body:
        _unknown(f"Operator {node.op_type} has no body in this file.")
    names = {each.name for each in node.attribute}
    if names != set(ops.ATTRIBUTES):
        missing = sorted(set(ops.ATTRIBUTES) - names)
        extra = sorted(names - set(ops.ATTRIBUTES))
        _unknown(
            f"Attributes of {node.op_type}: {missing or 'none'} missing, {extra or 'none'} unknown."
        )
    wrong = [each.name for each in node.attribute if each.type != _kind(each.name)]
    if wrong:
        _unknown(f"Attribute {wrong[0]} of {node.op_type} is of another type.")
    if len(node.input) != 4 or len(node.output) != 1:
        _unknown(f"{node.op_type} has {len(node.input)} inputs and {len(node.output)} outputs.")


def _kind(name: str) -> int:
    kinds = onnx.AttributeProto
    return kinds.INT if name in ops.INT_ATTRIBUTES else kinds.STRING


def _check_packed(
    node: onnx.NodeProto, constants: Mapping[str, TensorProto], places: Mapping[str, Place]
) -> None:
    has = attributes_of(node)
    op = ops.op_named(node.op_type)
    assert op is not None
    facts = (
        (has["bits"] == op.bits, f"bits is {has['bits']}, {op.name} has {op.bits}"),
        (has["group_size"] in GROUP_SIZES, f"group_size is {has['group_size']}"),
        (has["layout"] == LAYOUT.name, f"layout is {has['layout']!r}"),
        (has["plugin_namespace"] == ops.PLUGIN_NAMESPACE, "plugin_namespace is another"),
        (has["plugin_version"] == ops.PLUGIN_VERSION, "plugin_version is another"),
    )
    for right, what in facts:
        if not right:
            _contradiction(what)
    LAYOUT.check_version(has["layout_version"])
    rows, columns = has["N"], has["K"]
    if columns % has["group_size"]:
        _contradiction(f"groups of {has['group_size']} do not divide K = {columns}")
    groups = columns // has["group_size"]
    wanted = (
        (TensorProto.INT32, [rows, words_per_row(columns, op.bits)]),
        (TensorProto.FLOAT16, [rows, groups]),
        (TensorProto.INT32, [rows, groups]),
    )
    tensors = [
        _constant(constants.get(name), name, dtype, shape)
        for name, (dtype, shape) in zip(node.input[1:], wanted, strict=True)
    ]
    _, scales, zeros = tensors
    _check_scales(read_array(scales, places.get(scales.name)), scales.name)
    _check_range(read_array(zeros, places.get(zeros.name)), largest=2**op.bits - 1, name=zeros.name)


def _constant(tensor: TensorProto | None, name: str, dtype: int, shape: list[int]) -> TensorProto:
    if tensor is None:
        _contradiction(f"{name} is no constant")
    if tensor.data_type != dtype or list(tensor.dims) != shape:
        found, asked = TensorProto.DataType.Name(tensor.data_type), TensorProto.DataType.Name(dtype)
        _contradiction(
            f"{name} is {found} {list(tensor.dims)}, N, K and group_size ask for {asked} {shape}"
        )
    return tensor


def _check_blocks(
    node: onnx.NodeProto, constants: Mapping[str, TensorProto], places: Mapping[str, Place]
) -> None:
    weight, scales, points = (constants.get(name) for name in [*node.input, "", "", ""][:3])
    if weight is None or weight.data_type not in NIBBLES:
        return
    has = attributes_of(node)
    axis, size = has.get("axis", 1), has.get("block_size", 0)
    whole = isinstance(size, int) and size > 0 and len(weight.dims) == 2 and axis == 0
    if not whole or weight.dims[0] % size:
        _contradiction(f"blocks of {size} along axis {axis} of sizes {list(weight.dims)}")
    shape = [weight.dims[0] // size, weight.dims[1]]
    for tensor in (scales, points):
        if tensor is not None and list(tensor.dims) != shape:
            _contradiction(
                f"{tensor.name} has the sizes {list(tensor.dims)}, blocks ask for {shape}"
            )
    if scales is None:
        _contradiction("scales are no constant")
    _check_scales(read_array(scales, places.get(scales.name)), scales.name)


def _check_scales(scales: NDArray[Any], name: str) -> None:
    good = np.isfinite(scales) & (scales > 0)
    if not good.all():
        index = tuple(int(each) for each in np.argwhere(~good)[0])
        raise FormatError(
            "E4411",
            f"{name} holds {int((~good).sum())} scales that are not positive numbers, the first at {index}.",
            why="a scale is positive and finite",
            fix="quantize the model again",
        )


def _check_range(zeros: NDArray[Any], *, largest: int, name: str) -> None:
    bad = (zeros < 0) | (zeros > largest)
    if bad.any():
        index = tuple(int(each) for each in np.argwhere(bad)[0])
        raise FormatError(
            "E4411",
            f"{name} holds the zero point {int(zeros[index])} at {index}.",
            why=f"zero points are codes, 0 to {largest}",
            fix="quantize the model again",
        )


def _unknown(what: str) -> NoReturn:
    raise FormatError(
        "E4408",
        what,
        why=f"graphs use standard operators, and {', '.join(op.name for op in ops.OPS.values())} "
        f"of domain {ops.DOMAIN!r} with their bodies",
        fix=_AGAIN,
    )


def _contradiction(what: str) -> NoReturn:
    raise FormatError(
        "E4409",
        f"{what[0].upper()}{what[1:]}.",
        why="attributes of a packed linear describe its constants",
        fix=_AGAIN,
    )
