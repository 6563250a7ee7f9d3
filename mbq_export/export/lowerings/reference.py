"""``mbq`` nodes with their bodies: the truth that the other forms are checked against.

Runtimes inline the body and most fold it to float weights, so a reference graph takes ten times the memory of its
packed constants. It is meant for small models and for checks.
"""

from typing import Final

import onnx_ir as ir

from mbq_export.errors import UsageError
from mbq_export.export import functions, ops
from mbq_export.export.graph import packed_nodes, packed_source
from mbq_export.export.lowerings.base import Lowering
from mbq_export.schemes.base import QuantScheme

LARGEST_WEIGHTS: Final = 300_000_000
"""Quantized weights beyond which folding the bodies would need more than 3 GB."""


def supports(scheme: QuantScheme, target: str) -> str | None:
    """Any scheme with an operator, any target."""
    del target
    return None if scheme.name in ops.OPS else f"there is no mbq operator for {scheme.name}"


def lower(model: ir.Model, target: str) -> None:
    """Add one body per operator that the graph uses, sorted by name.

    Raises:
        UsageError: E2002 for a model that is too large to be run in this form.
    """
    del target
    nodes = packed_nodes(model)
    weights = sum(packed_source(node).n * packed_source(node).k for node in nodes)
    if weights > LARGEST_WEIGHTS:
        raise UsageError(
            "E2002",
            f"A reference graph of {weights:,} quantized weights would not fit in memory when it runs.",
            why=f"runtimes unpack it to floats; the limit is {LARGEST_WEIGHTS:,}",
            fix="--lowering qdq",
        )
    opset = model.opset_imports[""]
    for name in sorted({node.op_type for node in nodes}):
        op = ops.op_named(name)
        assert op is not None
        body = ir.serde.deserialize_function(functions.body(op, opset=opset))
        model.functions[body.identifier()] = body


LOWERING: Final = Lowering(
    name="reference",
    dtypes=("fp32", "fp16"),
    keeps_functions=True,
    supports=supports,
    lower=lower,
)
