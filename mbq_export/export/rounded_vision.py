"""A vision graph whose linears are codes: products of the traced graph become ``mbq`` nodes, which lowering knows.

    traced, each product of such a linear marked with its module path ── halved or not ──► nodes ── lowering ──► file

A graph in 16 bits is halved before, because scales of channels stay in fp32.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir

from mbq_export.errors import InternalError
from mbq_export.export import ops
from mbq_export.export.graph import add_constant, packed_node, settle_constants
from mbq_export.export.weights import PackedSource
from mbq_export.families.tower import scopes_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.families.base import LoadedModel


def packed(model: ir.Model, checkpoint: QuantCheckpoint) -> ir.Model:
    """Copy a graph and put ``mbq`` nodes in the place of products with weights that are codes.

    Args:
        model: From `vision.vision_graph`, or a copy of it in 16 bits.
        checkpoint: Has the codes.
    """
    model = model.clone()
    for node in [node for node in model.graph if ops.SOURCE in node.metadata_props]:
        module = node.metadata_props[ops.SOURCE]
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        out = ir.Value(name=old.name, type=old.type, shape=old.shape)
        source = PackedSource.of(checkpoint, module)
        new = packed_node(
            partial(add_constant, model.graph), x, name=str(node.name), source=source, out=out
        )
        model.graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(old, out)
        model.graph.remove(node, safe=True)
        model.opset_imports[ops.DOMAIN] = ops.DOMAIN_VERSION
    settle_constants(model.graph)
    return model


def mark(traced: ir.Model, model: LoadedModel, tower: nn.Module, names: Collection[str]) -> None:
    """Write the module path of every linear that is codes to its product.

    Raises:
        InternalError: E9001 for a linear that the graph does not have.
    """
    nodes, scopes = {str(node.name): node for node in traced.graph}, scopes_of(model, tower)
    for module in names:
        node = nodes.get(f"{scopes.get(module)}.MatMul")
        if node is None:
            raise InternalError("E9001", f"The vision graph has no product of {module}.")
        node.metadata_props[ops.SOURCE] = module
