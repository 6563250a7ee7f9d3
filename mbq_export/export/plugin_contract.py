"""Whether a graph keeps the contract of the plugin form (`ops`, "Plugin").

bodies       none in the file: a parser that prefers one builds a slow engine without a word
attributes   those of the form, with values that a plugin of this release takes
constants    whole tiles, scales and zero points beside them; padding is 0, everything else in range
metadata     names every such node: what an engine must hold
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from mbq_export.export import ops
from mbq_export.export.external_data import Place, read_array
from mbq_export.export.packed_contract import (
    attributes_of,
    check_facts,
    check_range,
    check_scales,
    constant_of,
    contradiction,
    unknown,
)
from mbq_export.export.tiled_weights import scales_shape, tiles_shape, zeros_shape
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, WHOLE_WORDS
from mbq_export.schemes.layouts import LAYOUTS
from mbq_export.schemes.layouts.tiles import TILE_COLUMNS, TILE_ROWS, padded

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
"""Types of activations that plugins take."""


def is_plugin(node: onnx.NodeProto) -> bool:
    """Whether a node is of the plugin form: it has an attribute that the reference form has not."""
    own = set(ops.PLUGIN_INT_ATTRIBUTES)
    return node.domain == ops.DOMAIN and any(each.name in own for each in node.attribute)


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value that a graph gives one."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def check_bodiless(node: onnx.NodeProto, bodies: Collection[str]) -> None:
    """Refuse a graph that holds plugins and bodies.

    Raises:
        FormatError: E4408.
    """
    if bodies:
        unknown(f"{node.op_type} is a plugin, but the file holds a body of {min(bodies)}.")


def check_layers(model: onnx.ModelProto) -> None:
    """Check that the metadata names the plugins that the graph has.

    Raises:
        FormatError: E4409.
    """
    found = ops.plugin_layers(
        (node.op_type, node.name) for node in model.graph.node if is_plugin(node)
    )
    written = {entry.key: entry.value for entry in model.metadata_props}.get(ops.PLUGIN_LAYERS)
    try:
        named = None if written is None else json.loads(written)
    except ValueError:
        named = written
    if named != (found or None) and (found or named):
        count = sum(map(len, found.values()))
        contradiction(
            f"metadata {ops.PLUGIN_LAYERS!r} does not name the {count} plugins of the graph"
        )


def check_tiles(
    node: onnx.NodeProto,
    constants: Mapping[str, TensorProto],
    places: Mapping[str, Place],
    types: Mapping[str, int],
) -> None:
    """Check attributes and constants of one plugin.

    Args:
        node: Of the plugin form, with all attributes.
        constants: Of the graph, by name.
        places: Checked places of external constants.
        types: Element types of the graph's values (`value_types`).

    Raises:
        FormatError: E4409 or E4411.
        IncompatibleError: E7005 for another version of the layout.
    """
    has, op = attributes_of(node), ops.op_named(node.op_type)
    assert op is not None
    if op.tiles is None:
        contradiction(f"there is no plugin {op.name}")
    check_facts(has, op, layout=LAYOUTS[op.tiles])
    _check_plugin_facts(has, op)
    n, k, group_size = has["N"], has["K"], has["group_size"]
    kind = types.get(node.output[0], TensorProto.UNDEFINED)
    if kind not in HALVES:
        contradiction(f"{node.output[0]} is {TensorProto.DataType.Name(kind)}, not of 16 bits")
    wanted = {
        "qweight": (TensorProto.INT32, tiles_shape(n, k, scheme=SCHEMES[ops.scheme_of(op)])),
        "scales": (
            TensorProto.FLOAT if group_size == CHANNEL else TensorProto.FLOAT16,
            scales_shape(n, k, group_size=group_size),
        ),
        "bias": (kind, (n,)),
    }
    if not op.symmetric:
        wanted["zeros"] = (TensorProto.INT32, zeros_shape(n, k, group_size=group_size))
    ports = (*op.inputs, "bias")[1 : len(node.input)]
    tensors = {
        port: constant_of(constants.get(name), name, wanted[port][0], list(wanted[port][1]))
        for port, name in zip(ports, node.input[1:], strict=True)
    }
    scales, zeros = tensors["scales"], tensors.get("zeros")
    _check_scales(read_array(scales, places.get(scales.name)), has, scales.name)
    if zeros is not None:
        words = read_array(zeros, places.get(zeros.name)).astype("<i4")
        nibbles = words.view(np.uint8)
        largest = 2**op.bits - 1
        check_range(np.stack([nibbles & 15, nibbles >> 4], -1), largest=largest, name=zeros.name)


def _check_plugin_facts(has: Mapping[str, Any], op: ops.LinearOp) -> None:
    facts = (
        (has["act_bits"] == op.act_bits, f"act_bits is {has['act_bits']}, {op.name} has {op.act_bits}"),
        (has["has_bias"] in {0, 1}, f"has_bias is {has['has_bias']}"),
        (has["epilogue"] == ops.NO_EPILOGUE, f"epilogue is {has['epilogue']}"),
        (has["row_order"] == ops.CONCATENATED_ROWS, f"row_order is {has['row_order']}"),
        (has["K"] % WHOLE_WORDS == 0, f"K = {has['K']} is no multiple of {WHOLE_WORDS}"),
    )  # fmt: skip
    for right, what in facts:
        if not right:
            contradiction(what)


def _check_scales(scales: NDArray[Any], has: Mapping[str, Any], name: str) -> None:
    """Positive where there is a weight, 0 in the padding of tiles."""
    n = has["N"]
    if has["group_size"] == CHANNEL:
        rows, columns = scales[:, None], 1
    else:
        rows = scales.transpose(0, 3, 2, 1).reshape(padded(n, TILE_ROWS), -1)
        columns = has["K"] // has["group_size"]
        assert rows.shape[1] == padded(has["K"], TILE_COLUMNS) // has["group_size"]
    check_scales(rows[:n, :columns], name)
    if rows[n:].any() or rows[:, columns:].any():
        contradiction(f"{name} has scales beyond row {n} or column {has['K']}")
