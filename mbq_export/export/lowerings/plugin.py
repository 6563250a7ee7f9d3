"""``mbq`` nodes as TensorRT's plugins read them: constants in tiles, the bias inside, no bodies.

    x ── W3Linear ── Add (bias) ──►        ==>        x ── W3Linear (has_bias 1) ──►

Bodies go, because some versions of the parser prefer a body over a plugin: the engine would be right, slow, and silent
about it. For the same reason the graph says which nodes must become plugin layers, and whoever builds an engine counts.

A head of 8 bits has no plugin; it is written in standard operators, which TensorRT multiplies from their codes.

Codes stay as they are; padding to whole tiles happens in the constants alone, so N and K are the sizes of y and x.
"""

import json
from typing import Final

import onnx_ir as ir

from mbq_export.errors import located
from mbq_export.export import ops
from mbq_export.export.graph import (
    SOURCE_KEY,
    add_constant,
    bias_addition,
    packed_nodes,
    packed_source,
)
from mbq_export.export.lowerings.base import Lowering
from mbq_export.export.standard_form import to_standard
from mbq_export.export.tiled_weights import tiled_scales_tensor, tiled_zeros_tensor, tiles_tensor
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import QuantScheme
from mbq_export.schemes.layouts import LAYOUTS


def supports(scheme: QuantScheme, target: str) -> str | None:
    """Every scheme whose operator has a plugin, for TensorRT."""
    if scheme.name not in ops.OPS:
        return f"there is no mbq operator for {scheme.name}"
    if scheme.name not in ops.PLUGINS:
        return (
            f"there is no plugin for {scheme.name}, whose engines are built from the qdq lowering"
        )
    return None if target == "trt" else "ONNX Runtime has no plugins, only TensorRT"


def lower(model: ir.Model, target: str) -> None:
    """Replace the constants of every ``mbq`` node, take its bias in, and list the nodes in the metadata.

    Raises:
        UsageError: E2004 or E2007, located at the node, if kernels cannot read its rows.
    """
    for node in packed_nodes(model):
        source = packed_source(node)
        if source.scheme not in ops.PLUGINS:
            to_standard(model.graph, node, target)
            continue
        with located(str(node.name)):
            SCHEMES[source.scheme].check_columns(source.k, source.group_size)
        _rewrite(model.graph, node)
    model.functions.clear()
    layers = ops.plugin_layers((node.op_type, str(node.name)) for node in packed_nodes(model))
    model.metadata_props[ops.PLUGIN_LAYERS] = json.dumps(layers, separators=(",", ":"))


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    """Put the plugin's node in the place of a node and of the addition of its bias."""
    name, source = str(node.name), packed_source(node)
    op, layout = ops.OPS[source.scheme], LAYOUTS[ops.PLUGINS[source.scheme]]
    add = bias_addition(node)
    bias = None if add is None else add.inputs[1]
    last = add or node
    old = last.outputs[0]
    tensors = [
        tiles_tensor(f"{name}.qweight_tiles", source),
        tiled_scales_tensor(f"{name}.scales_tiles", source),
    ]
    if not op.symmetric:
        tensors.append(tiled_zeros_tensor(f"{name}.zeros_tiles", source))
    attributes = {each: node.attributes[each].value for each in ops.ATTRIBUTES} | {
        "layout": layout.name,
        "layout_version": layout.version,
        "has_bias": int(bias is not None),
        "epilogue": ops.NO_EPILOGUE,
        "act_bits": op.act_bits,
        "row_order": ops.CONCATENATED_ROWS,
    }
    new = ir.Node(
        ops.DOMAIN,
        op.name,
        [
            node.inputs[0],
            *(add_constant(graph, tensor) for tensor in tensors),
            *([] if bias is None else [bias]),
        ],
        ir.convenience.convert_attributes(attributes),
        outputs=[ir.Value(name=old.name, type=old.type, shape=old.shape)],
        name=name,
    )
    new.metadata_props.update(node.metadata_props)
    new.meta[SOURCE_KEY] = source
    graph.insert_before(last, new)
    ir.convenience.replace_all_uses_with(old, new.outputs[0], replace_graph_outputs=True)
    graph.remove([node] if add is None else [add, node], safe=True)


LOWERING: Final = Lowering(
    name="plugin", dtypes=("fp16", "bf16"), keeps_functions=False, supports=supports, lower=lower
)
