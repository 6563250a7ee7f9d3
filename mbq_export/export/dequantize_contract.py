"""Whether DequantizeLinear nodes are of the forms that runtimes multiply from, and never of the one they may get wrong.

blocks    Q INT4 or UINT4 [K, N], scales [K / G, N], axis 0           weights alone are quantized
channel   Q INT4 or INT8 [K, N], scales [N], axis 1                   activations too, or weights of 8 bits
both      blocks of weights times activations of 8 bits               refused: TensorRT for RTX 1.7.1 multiplies over
                                                                      all of K at once, whatever the blocks
"""

from collections.abc import Mapping
from typing import Final

import onnx
from onnx import TensorProto

from mbq_export.errors import FormatError, located
from mbq_export.export.external_data import Place, read_array
from mbq_export.export.packed_contract import attributes_of, check_scales, contradiction

NIBBLES: Final = frozenset({TensorProto.INT4, TensorProto.UINT4})
CODES: Final = NIBBLES | {TensorProto.INT8}
_PASSED_THROUGH: Final = frozenset(
    {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that leave a product the same pattern."""


def check_dequantized(
    node: onnx.NodeProto,
    constants: Mapping[str, TensorProto],
    places: Mapping[str, Place],
    *,
    target: str | None,
) -> None:
    """Check a DequantizeLinear whose codes are a constant; others round activations.

    Args:
        node: The node.
        constants: By name.
        places: Checked places of external constants.
        target: ``trt`` to refuse zero points of signed codes.

    Raises:
        FormatError: E4409 for sizes or attributes, E4410 for a zero point, E4411 for a scale.
    """
    weight, scales, points = (constants.get(name) for name in [*node.input, "", "", ""][:3])
    if weight is None or weight.data_type not in CODES:
        return
    has = attributes_of(node)
    axis, size = has.get("axis", 1), has.get("block_size", 0)
    signed = weight.data_type != TensorProto.UINT4
    if len(weight.dims) != 2 or not isinstance(size, int):
        contradiction(f"blocks of {size} along axis {axis} of sizes {list(weight.dims)}")
    if size == 0 and axis == 1 and signed:
        shape = [weight.dims[1]]
    elif size > 0 and axis == 0 and weight.data_type in NIBBLES and not weight.dims[0] % size:
        shape = [weight.dims[0] // size, weight.dims[1]]
    else:
        contradiction(f"blocks of {size} along axis {axis} of sizes {list(weight.dims)}")
    for tensor in (scales, points):
        if tensor is not None and list(tensor.dims) != shape:
            contradiction(
                f"{tensor.name} has the sizes {list(tensor.dims)}, blocks ask for {shape}"
            )
    if scales is None:
        contradiction("scales are no constant")
    check_scales(read_array(scales, places.get(scales.name)), scales.name)
    if points is not None and signed and target == "trt":
        _check_no_points(points, places)


def _check_no_points(points: TensorProto, places: Mapping[str, Place]) -> None:
    if read_array(points, places.get(points.name)).any():
        raise FormatError(
            "E4410",
            f"{points.name} holds zero points other than 0.",
            why="TensorRT has none for signed codes; the exact form is the code minus the middle of its range, and a "
            "product of the group's sum of inputs for the rest",
            fix="--lowering qdq with the target it is for",
        )


def check_products(model: onnx.ModelProto) -> None:
    """Refuse blocks of weights times activations of 8 bits, whoever wrote the graph.

    Raises:
        FormatError: E4414.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in {"MatMul", "Gemm"}:
            continue
        sources = [_dequantize(producers, name) for name in node.input[:2]]
        if None in sources:
            continue
        blocks = [
            attributes_of(source).get("block_size", 0) for source in sources if source is not None
        ]
        activations = [source.input[0] not in constants for source in sources if source is not None]
        if any(blocks) and any(activations):
            with located(node.name or node.op_type):
                raise FormatError(
                    "E4414",
                    f"It multiplies weights in blocks of {max(blocks)} with activations of 8 bits.",
                    why="group-wise W4A8 needs the plugin lowering; TensorRT may compile this pattern to a wrong result",
                    fix=("--group-size channel", "--lowering plugin"),
                )


def _dequantize(producers: Mapping[str, onnx.NodeProto], name: str) -> onnx.NodeProto | None:
    """The DequantizeLinear that a value comes from, if it does."""
    node = producers.get(name)
    while node is not None and node.op_type in _PASSED_THROUGH:
        node = producers.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None
