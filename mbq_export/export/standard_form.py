"""One ``mbq`` node on its way to standard operators; which ones, and why, is said in `lowerings.qdq`."""

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mbq_export.export import weights
from mbq_export.export.graph import FLOAT, add_constant, packed_source
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.integers import LARGEST_ACTIVATION, SMALLEST_ABSMAX

if TYPE_CHECKING:
    from mbq_export.export.weights import PackedSource


def to_standard(graph: ir.Graph, node: ir.Node, target: str) -> None:
    """Replace a node by standard operators; the MatMul takes its name, the last of them its output.

    Args:
        graph: Of the node.
        node: Made by `packed_node`.
        target: ``ort`` or ``trt``.
    """
    _Rewrite(graph, node).run(target)


class _Rewrite:
    """One node on its way to standard operators."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph = graph
        self.node = node
        self.name = str(node.name)
        self.source: PackedSource = packed_source(node)
        self.rounds = SCHEMES[self.source.scheme].rounds_activations
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
        rows = self.rounded_product(target) if self.rounds else self.weight_only(target)
        old = self.node.outputs[0]
        name = old.name
        self.graph.insert_before(self.node, self.added)
        ir.convenience.replace_all_uses_with(old, rows, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        rows.name = name

    def weight_only(self, target: str) -> ir.Value:
        if self.source.group_size == CHANNEL:
            return self.by_channel(target)
        signed = self.source.bits == 3 or self.source.symmetric
        if signed:
            inputs = [self.signed(minus_zero=not self.source.symmetric), self.scales()]
        elif target == "ort":
            inputs = [self.unsigned(), self.scales(), self.zero_points()]
        else:
            inputs = [self.signed(minus_zero=False), self.scales()]
        size = [self.source.k, self.source.n]
        weight = self.op(
            "DequantizeLinear", inputs, "weight", size, axis=0, block_size=self.source.group_size
        )
        rows = self.matmul(self.x, weight)
        return rows if signed or target == "ort" else self.corrected(rows)

    def by_channel(self, target: str) -> ir.Value:
        """Symmetric codes with one scale per column of the constant."""
        inputs = self.channels(target)
        size = [self.source.k, self.source.n]
        narrow = self.dtype != FLOAT
        weight = self.float_op("DequantizeLinear", inputs, "weight", size, axis=1)
        if narrow:
            weight = self.op("Cast", [weight], "weight_narrow", size, to=self.dtype)
        return self.matmul(self.x, weight)

    def matmul(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        dims = [*self.leading, self.source.n]
        rows = self.op("MatMul", [x, weight], "product", dims, name="", dtype=weight.dtype)
        self.added[-1].metadata_props.update(self.node.metadata_props)
        return rows

    def rounded_product(self, target: str) -> ir.Value:
        """Integers times integers, then both scales, in FLOAT."""
        source, wide = self.source, [*self.leading, self.source.n]
        narrow = self.dtype != FLOAT
        x_dims = [*self.leading, source.k]
        x = self.float_op("Cast", [self.x], "x_fp32", x_dims, to=FLOAT) if narrow else self.x
        step = self.token_scale(x, x_dims)
        quotient = self.float_op("Div", [x, step], "x_steps", x_dims)
        unit = [self.shared("unit_scale", np.float32(1)), self.shared("unit_zero", np.int8(0))]
        codes = self.op(
            "QuantizeLinear", [quotient, *unit], "x_codes", x_dims, dtype=ir.DataType.INT8
        )
        rounded = self.float_op("DequantizeLinear", [codes, *unit], "x_rounded", x_dims)
        inputs = self.channels(target)
        weight = self.float_op("DequantizeLinear", inputs, "weight", [source.k, source.n], axis=1)
        sums = self.matmul(rounded, weight)
        scaled = self.float_op("Mul", [sums, step], "scaled", wide)
        return self.op("Cast", [scaled], "rounded", wide, to=self.dtype) if narrow else scaled

    def token_scale(self, x: ir.Value, dims: list[Any]) -> ir.Value:
        """(.., 1) scale of each token."""
        one = [*self.leading, 1]
        sizes = self.float_op("Abs", [x], "x_sizes", dims)
        last = self.shared("last_axis", np.array([-1], np.int64))
        largest = self.float_op("ReduceMax", [sizes, last], "x_largest", one, keepdims=1)
        smallest = self.shared("smallest_absmax", np.float32(SMALLEST_ABSMAX))
        bounded = self.float_op("Max", [largest, smallest], "x_bounded", one)
        steps = self.shared("largest_code", np.float32(LARGEST_ACTIVATION))
        return self.float_op("Div", [bounded, steps], "x_scale", one)

    def float_op(
        self, op_type: str, inputs: list[ir.Value], suffix: str, dims: list[Any], **attributes: Any
    ) -> ir.Value:
        """An operator whose result is FLOAT whatever T is."""
        return self.op(op_type, inputs, suffix, dims, dtype=FLOAT, **attributes)

    def shared(self, name: str, number: np.generic | NDArray[Any]) -> ir.Value:
        """A constant that all linears of the graph read."""
        full = f"activations.{name}"
        known = self.graph.initializers.get(full)
        return known or self.constant(ir.Tensor(np.asarray(number), name=full))

    def channels(self, target: str) -> list[ir.Value]:
        """What a weight with one scale per column is dequantized from."""
        inputs = [self.signed_channels(target), self.channel_scales()]
        if target == "ort" or self.source.bits == 8:
            # Where it turns INT8 weights into UINT8, for CPUs without VNNI, it takes missing zero points for one.
            points = ir.Tensor(np.zeros(self.source.n, np.int8), name=f"{self.name}.channel_zeros")
            inputs.append(self.constant(points))
        return inputs

    def signed_channels(self, target: str) -> ir.Value:
        wide = target == "ort" or self.source.bits == 8
        dtype = ir.DataType.INT8 if wide else ir.DataType.INT4
        name = f"{self.name}.qweight_{dtype.name.lower()}"
        tensor = weights.signed_codes_tensor(name, self.source, minus_zero=False, dtype=dtype)
        return self.constant(tensor)

    def channel_scales(self) -> ir.Value:
        return self.constant(weights.scales_tensor(f"{self.name}.channel_scales", self.source))

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
