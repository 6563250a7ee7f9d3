"""A graph of fp32 becomes a graph of 16 bits: every value and every constant, nothing else.

Norms keep fp32 statistics by their own rule (``stash_type`` 1). A graph that casts to a float type on purpose, or
takes one from an attribute, is left as it is: its author wanted other precisions inside.
"""

from typing import Any, Final

import numpy as np
import onnx_ir as ir

from mbq_export.export.passes.base import Pass
from mbq_export.export.weights import StreamedTensor, plain_tensor

TYPED: Final = frozenset({"Cast", "Constant", "ConstantOfShape", "RandomNormal", "EyeLike"})
"""Operators that choose a type themselves."""


def halve(model: ir.Model, dtype: ir.DataType = ir.DataType.FLOAT16) -> list[str]:
    """Turn FLOAT into FLOAT16 (or BFLOAT16) everywhere, or say which node forbids it."""
    graph = model.graph
    typed = [str(node.name) for node in graph if node.op_type in TYPED]
    if typed:
        return [f"{name} chooses a type of its own" for name in typed]
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            value.const_value = _half(tensor, dtype)
            value.type = ir.TensorType(dtype)
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(dtype)
    return []


def _half(tensor: ir.TensorProtocol, dtype: ir.DataType) -> StreamedTensor:
    shape = tuple(tensor.shape.numpy())

    def read() -> np.ndarray[Any, Any]:
        return np.atleast_1d(tensor.numpy())

    return plain_tensor(str(tensor.name), read, shape=shape, dtype=dtype)


PASS: Final = Pass(name="halve_floats", run=halve)
