"""The emitter: nodes, values and constants with a name, a dtype and a shape each, in the order of first use."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mbq_export import __version__
from mbq_export.errors import InternalError
from mbq_export.export import ops
from mbq_export.export.profile import OpProfile
from mbq_export.export.weights import PackedSource, scales_tensor, words_tensor, zeros_tensor
from mbq_export.schemes.layouts import dense

Dims = Sequence[int | str | ir.SymbolicDim]
"""Sizes of a value; a string is the symbol of a size that varies."""

DTYPES: Final = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
INT64: Final = ir.DataType.INT64
BOOL: Final = ir.DataType.BOOL
FLOAT: Final = ir.DataType.FLOAT
PRODUCER: Final = "mbq-export"


class Emitter:
    """A graph under construction.

    Attributes:
        profile: Op level that the nodes belong to.
        dtype: Type T of activations.
    """

    def __init__(self, *, profile: OpProfile, dtype: str) -> None:
        """Begin an empty graph."""
        self.profile = profile
        self.dtype = DTYPES[dtype]
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}

    def has(self, op_type: str) -> bool:
        """Whether the op level has an operator; if not, it is spelled out."""
        return op_type in self.profile.ops

    def input(self, name: str, shape: Dims, *, dtype: ir.DataType | None = None) -> ir.Value:
        """Declare the next graph input; T unless a dtype is given."""
        value = _value(name, dtype or self.dtype, shape)
        self._inputs.append(value)
        return value

    def constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Add an initializer under the tensor's own name, or return the one that has it."""
        name = str(tensor.name)
        if name not in self._constants:
            self._constants[name] = _initializer(tensor)
        return self._constants[name]

    def numbers(self, name: str, values: NDArray[Any] | Sequence[int] | int) -> ir.Value:
        """Add a small constant; Python integers become INT64."""
        array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
        return self.constant(ir.Tensor(array, name=name))

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        output: ir.Value,
        *,
        name: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Append a node of the standard operators with one output.

        Args:
            op_type: Operator.
            inputs: What it reads.
            output: What it computes, made with `value`.
            name: Name of the node; by default the output's, without a last ``.out``.
            **attributes: Attributes of the node.

        Returns:
            The output.
        """
        self.append(
            ir.Node(
                "",
                op_type,
                inputs,
                ir.convenience.convert_attributes(attributes),
                outputs=[output],
                name=name or str(output.name).removesuffix(".out"),
            )
        )
        return output

    def append(self, node: ir.Node) -> None:
        """Append a node made elsewhere."""
        self._nodes.append(node)

    def value(self, name: str, shape: Dims, *, dtype: ir.DataType | None = None) -> ir.Value:
        """Name a value that a node will compute; T unless a dtype is given."""
        return _value(name, dtype or self.dtype, shape)

    def model(self, name: str, outputs: Iterable[ir.Value]) -> ir.Model:
        """Close the graph.

        Raises:
            InternalError: E9001 if two nodes have the same name.
        """
        names = [node.name for node in self._nodes]
        if len(set(names)) != len(names):
            twice = sorted({str(each) for each in names if names.count(each) > 1})
            raise InternalError("E9001", f"Two nodes of {name} are named {', '.join(twice)}.")
        imports = {"": self.profile.opset}
        if any(node.domain == ops.DOMAIN for node in self._nodes):
            imports[ops.DOMAIN] = ops.DOMAIN_VERSION
        graph = ir.Graph(
            self._inputs,
            list(outputs),
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports=imports,
            name=name,
        )
        return ir.Model(
            graph,
            ir_version=self.profile.ir_version,
            producer_name=PRODUCER,
            producer_version=__version__,
        )


def dims_of(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    """Sizes of a value of ours, which always has a shape."""
    assert value.shape is not None
    return value.shape.dims


def columns_of(value: ir.Value | None) -> int:
    """Size of the last axis, always a number in graphs of ours."""
    assert value is not None
    last = dims_of(value)[-1]
    assert isinstance(last, int)
    return last


def _value(name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


SOURCE_KEY: Final = "mbq.packed"
"""Key under which a node of the domain remembers its `PackedSource` until it is saved."""


def packed_node(
    constant: Callable[[ir.TensorProtocol], ir.Value],
    x: ir.Value,
    *,
    name: str,
    source: PackedSource,
    out: ir.Value,
) -> ir.Node:
    """Make the ``mbq`` node of a packed weight.

    Args:
        constant: Turns a tensor into an initializer of the graph that will hold the node.
        x: (B, T, K) input.
        name: Name of the node; its constants are ``<name>.qweight``, ``.scales`` and, where it has any, ``.zeros``.
        source: The weight.
        out: (B, T, N) output.
    """
    op = ops.OPS[source.scheme]
    tensors = [words_tensor(f"{name}.qweight", source), scales_tensor(f"{name}.scales", source)]
    if not op.symmetric:
        tensors.append(zeros_tensor(f"{name}.zeros", source))
    attributes: dict[str, int | str] = {
        "N": source.n,
        "K": source.k,
        "group_size": source.group_size,
        "bits": source.bits,
        "signed_codes": int(source.symmetric),
        "layout_version": dense.LAYOUT.version,
        "layout": dense.LAYOUT.name,
        "plugin_namespace": ops.PLUGIN_NAMESPACE,
        "plugin_version": ops.PLUGIN_VERSION,
    }
    node = ir.Node(
        ops.DOMAIN,
        op.name,
        [x, *(constant(tensor) for tensor in tensors)],
        ir.convenience.convert_attributes(attributes),
        outputs=[out],
        name=name,
    )
    node.metadata_props[ops.SOURCE] = ",".join(source.modules)
    node.meta[SOURCE_KEY] = source
    return node


def packed_source(node: ir.Node) -> PackedSource:
    """The weight of a node made by `packed_node`."""
    source = node.meta[SOURCE_KEY]
    assert isinstance(source, PackedSource)
    return source


def packed_nodes(model: ir.Model) -> list[ir.Node]:
    """All nodes of the ``mbq`` domain, in graph order."""
    return [node for node in model.graph if node.domain == ops.DOMAIN]


def bias_addition(node: ir.Node) -> ir.Node | None:
    """The node that adds the bias of a linear, if it has one that nothing bypasses."""
    if node.outputs[0].is_graph_output():
        return None
    users = [use.node for use in node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add" and str(users[0].name).endswith(".add_bias"):
        return users[0]
    return None


def add_constant(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initializer to a finished graph."""
    value = _initializer(tensor)
    graph.register_initializer(value)
    return value


def _initializer(tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )


def settle_constants(graph: ir.Graph) -> None:
    """Drop constants that nothing reads and put the others into the order of their first use."""
    used: dict[str, ir.Value] = {}
    for node in graph:
        for value in node.inputs:
            if value is not None and value.is_initializer():
                used.setdefault(str(value.name), value)
    graph.initializers.clear()
    for value in used.values():
        graph.register_initializer(value)
