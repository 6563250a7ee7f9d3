"""A graph of fp32 becomes a graph of 16 bits: every value and every constant, nothing else.

Norms keep fp32 statistics by their own rule (``stash_type`` 1). A graph that casts to a float type on purpose, or
takes one from an attribute, is left as it is: its author wanted other precisions inside.

Conv knows BFLOAT16 from opset 22 on; before, it stays in fp32 between two casts.
"""

from typing import Any, Final

import numpy as np
import onnx_ir as ir

from mbq_export.export.passes.base import Pass
from mbq_export.export.weights import StreamedTensor, plain_tensor

TYPED: Final = frozenset({"Cast", "Constant", "ConstantOfShape", "RandomNormal", "EyeLike"})
"""Operators that choose a type themselves."""
CONV: Final = "Conv"
CONV_IN_BFLOAT16: Final = 22
"""First opset whose Conv takes that type."""


def halve(model: ir.Model, dtype: ir.DataType = ir.DataType.FLOAT16) -> list[str]:
    """Turn FLOAT into FLOAT16 (or BFLOAT16) everywhere, or say which node forbids it."""
    graph = model.graph
    typed = [str(node.name) for node in graph if node.op_type in TYPED]
    if typed:
        return [f"{name} chooses a type of its own" for name in typed]
    early = model.opset_imports[""] < CONV_IN_BFLOAT16 and dtype == ir.DataType.BFLOAT16
    wide = [node for node in graph if early and node.op_type == CONV]
    kept = {value for node in wide for value in node.inputs[1:]}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and value not in kept:
            value.const_value = _half(tensor, dtype)
            value.type = ir.TensorType(dtype)
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(dtype)
    for node in wide:
        _widen(graph, node, dtype)
    return []


def _widen(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    """Put a node between two casts: FLOAT inside, ``dtype`` outside."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    before = _cast(x, f"{node.name}.fp32", ir.DataType.FLOAT, shape=x.shape)
    node.replace_input_with(0, before.outputs[0])
    graph.insert_before(node, before)
    after = _cast(y, f"{node.name}.narrow", dtype, shape=y.shape)
    ir.convenience.replace_all_uses_with(y, after.outputs[0], replace_graph_outputs=True)
    after.replace_input_with(0, y)
    y.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(node, after)


def _cast(x: ir.Value, name: str, dtype: ir.DataType, *, shape: ir.Shape | None) -> ir.Node:
    to = ir.convenience.convert_attributes({"to": dtype})
    out = ir.Value(name=f"{name}.out", type=ir.TensorType(dtype), shape=shape)
    return ir.Node("", "Cast", [x], to, outputs=[out], name=name)


def _half(tensor: ir.TensorProtocol, dtype: ir.DataType) -> StreamedTensor:
    shape = tuple(tensor.shape.numpy())

    def read() -> np.ndarray[Any, Any]:
        return np.atleast_1d(tensor.numpy())

    return plain_tensor(str(tensor.name), read, shape=shape, dtype=dtype)


PASS: Final = Pass(name="halve_floats", run=halve)
