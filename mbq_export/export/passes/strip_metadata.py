"""Names that say where a node stands in the model, instead of a trace's counters and stack traces.

    node_MatMul_7   scope layers.0.self_attn.q_proj   ==>   layers.0.self_attn.q_proj.MatMul
    val_8, its folded weight                          ==>   layers.0.self_attn.q_proj.MatMul.weight

A traced graph holds the tracer's stack traces in the metadata of every node: six times the size of the graph, and
paths of the machine that wrote it.
"""

import ast
from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from mbq_export.export.passes.base import Pass

SCOPES: Final = "pkg.torch.onnx.name_scopes"


def strip(model: ir.Model) -> list[str]:
    """Rename nodes and values of a traced graph and drop every doc string and metadata entry."""
    graph = model.graph
    taken: dict[str, int] = {}
    for node in graph:
        scope = _scope(node)
        node.name = _unique(f"{scope}.{node.op_type}" if scope else node.op_type, taken)
    kept = {str(value.name) for value in graph.inputs} | {
        str(value.name) for value in graph.outputs
    }
    for node in graph:
        _name_values(node, kept)
    for thing in _everything(model):
        thing.metadata_props.clear()
        thing.doc_string = None
    return []


def _scope(node: ir.Node) -> str:
    """Path of the module that a node was traced in; empty for a node that a rewrite of the tracer made."""
    recorded = node.metadata_props.get(SCOPES)
    if not recorded:
        return ""
    # The last entry is the call itself; the one before is the module.
    path = ast.literal_eval(recorded)[:-1]
    return str(path[-1]) if path else ""


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}.{taken[name]}"


def _name_values(node: ir.Node, kept: set[str]) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and value.is_initializer() and _is_counter(str(value.name)):
            value.name = (
                f"{node.name}.{'weight' if node.op_type == 'MatMul' else f'constant{index}'}"
            )
    for index, value in enumerate(node.outputs):
        if value.name not in kept:
            value.name = f"{node.name}.out" if index == 0 else f"{node.name}.out{index}"


def _is_counter(name: str) -> bool:
    """Whether the tracer made a name up: parameters keep the dots of their path."""
    return "." not in name


def _everything(model: ir.Model) -> Iterator[ir.Model | ir.Graph | ir.Node | ir.Value]:
    graph = model.graph
    yield model
    yield graph
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield node
        yield from node.outputs


PASS: Final = Pass(name="strip_metadata", run=strip)
