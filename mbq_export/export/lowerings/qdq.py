"""Standard operators on 4-bit constants: DequantizeLinear in blocks along K, then MatMul.

    w = DequantizeLinear(Q [K, N], S [K/G, N]; axis 0, block_size G)        y = MatMul(x, w)

| codes          | ONNX Runtime                     | TensorRT                                  |
|----------------|----------------------------------|-------------------------------------------|
| 3 bits         | INT4 q - z, exact                | the same                                  |
| 4 bits, middle | INT4 q - 8, exact                | the same                                  |
| 4 bits         | UINT4 q with UINT4 zero points   | INT4 q - 8 and a correction in fp32       |

TensorRT refuses UINT4 and zero points other than 0, and q - z of 4-bit codes spans -15 .. 15. There

    y = x . (q - 8) s - sum over groups (sum of x in the group) * (z - 8) s

with sums and products of the correction in fp32. Constants are [K, N]: [N, K] with a Transpose costs ONNX Runtime
its fused kernel (44 times slower at 2048 x 2048).
"""

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx_ir as ir

from mbq_export.export import ops, weights
from mbq_export.export.graph import FLOAT, add_constant, packed_nodes, packed_source
from mbq_export.export.lowerings.base import Lowering
from mbq_export.schemes.base import QuantScheme

if TYPE_CHECKING:
    from mbq_export.export.weights import PackedSource


def supports(scheme: QuantScheme, target: str) -> str | None:
    """Weight-only schemes of 3 or 4 bits, both targets."""
    del target
    if scheme.act_bits != 16:
        return f"{scheme.name} quantizes activations, which this form does not write"
    if scheme.name not in ops.OPS:
        return f"there is no mbq operator for {scheme.name}"
    return None


def lower(model: ir.Model, target: str) -> None:
    """Replace every ``mbq`` node; the MatMul takes its name and its output."""
    for node in packed_nodes(model):
        _Rewrite(model.graph, node).run(target)
    model.opset_imports.pop(ops.DOMAIN, None)


class _Rewrite:
    """One node on its way to standard operators."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph = graph
        self.node = node
        self.name = str(node.name)
        self.source: PackedSource = packed_source(node)
        x, out = node.inputs[0], node.outputs[0]
        assert x is not None
        assert x.dtype is not None
        assert out.shape is not None
        self.x = x
        self.dtype = x.dtype
        self.leading = list(out.shape.dims[:-1])
        self.added: list[ir.Node] = []

    def run(self, target: str) -> None:
        """Emit the form of the target and remove the node."""
        signed = self.source.bits == 3 or self.source.symmetric
        if signed:
            inputs = [self.signed(minus_zero=not self.source.symmetric), self.scales()]
        elif target == "ort":
            inputs = [self.unsigned(), self.scales(), self.zero_points()]
        else:
            inputs = [self.signed(minus_zero=False), self.scales()]
        rows = self.matmul(inputs)
        if not signed and target != "ort":
            rows = self.corrected(rows)
        old = self.node.outputs[0]
        name = old.name
        self.graph.insert_before(self.node, self.added)
        ir.convenience.replace_all_uses_with(old, rows, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        rows.name = name

    def matmul(self, inputs: list[ir.Value]) -> ir.Value:
        source = self.source
        weight = self.op(
            "DequantizeLinear",
            inputs,
            "weight",
            [source.k, source.n],
            axis=0,
            block_size=source.group_size,
        )
        rows = self.op("MatMul", [self.x, weight], "product", [*self.leading, source.n], name="")
        self.added[-1].metadata_props.update(self.node.metadata_props)
        return rows

    def corrected(self, rows: ir.Value) -> ir.Value:
        """Subtract what the codes minus 8 get wrong."""
        source, lead = self.source, self.leading
        wide = [*lead, source.n]
        shape = ir.Tensor(
            np.array([0, 0, source.groups, source.group_size], np.int64),
            name=f"{self.name}.grouped",
        )
        last = ir.Tensor(np.array([-1], np.int64), name=f"{self.name}.last_axis")
        x = self.op("Cast", [self.x], "x_fp32", [*lead, source.k], dtype=FLOAT, to=FLOAT)
        grouped = self.op(
            "Reshape",
            [x, self.constant(shape)],
            "x_groups",
            [*lead, source.groups, source.group_size],
            dtype=FLOAT,
        )
        sums = self.op(
            "ReduceSum",
            [grouped, self.constant(last)],
            "group_sums",
            [*lead, source.groups],
            dtype=FLOAT,
            keepdims=0,
        )
        offsets = self.constant(weights.offsets_tensor(f"{self.name}.offsets", source))
        wrong = self.op("MatMul", [sums, offsets], "correction", wide, dtype=FLOAT)
        exact = self.op("Cast", [rows], "product_fp32", wide, dtype=FLOAT, to=FLOAT)
        right = self.op("Sub", [exact, wrong], "corrected", wide, dtype=FLOAT)
        return self.op("Cast", [right], "rounded", wide, to=self.dtype)

    def op(
        self, op_type: str, inputs: list[ir.Value], suffix: str, dims: list[Any], **attributes: Any
    ) -> ir.Value:
        """Append a node named after the linear; ``name=""`` gives it the linear's own name."""
        dtype = attributes.pop("dtype", self.dtype)
        own = attributes.pop("name", suffix) == ""
        out = ir.Value(
            name=f"{self.name}.{suffix}", type=ir.TensorType(dtype), shape=ir.Shape(dims)
        )
        self.added.append(
            ir.Node(
                "",
                op_type,
                inputs,
                ir.convenience.convert_attributes(attributes),
                outputs=[out],
                name=self.name if own else f"{self.name}.{suffix}",
            )
        )
        return out

    def constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        return add_constant(self.graph, tensor)

    def signed(self, *, minus_zero: bool) -> ir.Value:
        name = f"{self.name}.qweight_int4"
        return self.constant(weights.signed_codes_tensor(name, self.source, minus_zero=minus_zero))

    def unsigned(self) -> ir.Value:
        return self.constant(
            weights.unsigned_codes_tensor(f"{self.name}.qweight_uint4", self.source)
        )

    def scales(self) -> ir.Value:
        name = f"{self.name}.block_scales"
        return self.constant(weights.block_scales_tensor(name, self.source, self.dtype))

    def zero_points(self) -> ir.Value:
        return self.constant(weights.unsigned_zeros_tensor(f"{self.name}.zeros_uint4", self.source))


LOWERING: Final = Lowering(
    name="qdq", dtypes=("fp32", "fp16"), keeps_functions=False, supports=supports, lower=lower
)
