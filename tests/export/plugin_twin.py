"""A plugin graph whose nodes are replaced by the reference function, fed from the graph's own tiles: for ONNX Runtime.

Only constants and node are rebuilt; everything around them stays what the exporter wrote.
"""

from pathlib import Path

import onnx
import onnx_ir as ir

from mbq_export.export import ops
from mbq_export.export.graph import add_constant, packed_node
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.export.save import save_graph
from mbq_export.export.untiled import plugin_weights
from tests.export.one_linear import source_of


def write_twin(graph: Path, path: Path) -> Path:
    """Write the reference form of a plugin graph."""
    weights = {node.name: weight for node, weight in plugin_weights(graph)}
    model = ir.from_proto(onnx.load(graph))
    for node in [each for each in model.graph if each.domain == ops.DOMAIN]:
        name, old = str(node.name), node.outputs[0]
        op = ops.op_named(node.op_type)
        assert op is not None
        biased = node.attributes["has_bias"].as_int() == 1
        dims = ir.Shape(old.shape.dims)  # type: ignore[union-attr]
        rows = ir.Value(name=f"{name}.twin", type=old.type, shape=dims)
        source = source_of(weights[name], name, ops.scheme_of(op))
        new = [
            packed_node(
                lambda tensor: add_constant(model.graph, tensor),
                node.inputs[0],  # type: ignore[arg-type]
                name=name,
                source=source,
                out=rows,
            )
        ]
        last = rows
        if biased:
            last = ir.Value(name=f"{name}.twin_biased", type=old.type, shape=dims)
            new.append(
                ir.Node("", "Add", [rows, node.inputs[-1]], outputs=[last], name=f"{name}.add")
            )
        model.graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(old, last, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        last.name = old.name
    model.metadata_props.pop(ops.PLUGIN_LAYERS)
    LOWERINGS["reference"].lower(model, "ort")
    save_graph(model, path)
    return path
