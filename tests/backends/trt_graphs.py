"""Small graphs for TensorRT: one decoder block with 4-bit linears and a static cache, and graphs it must refuse."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mbq_export.backends.base import EngineGraph, QuantizedLinear, SizeRange, TensorSpec

HIDDEN, HEADS, HEAD_DIM, CONTEXT, GROUP = 128, 2, 64, 128, 64
F16 = TensorProto.FLOAT16


@dataclass
class Draft:
    """Nodes and constants in the making."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    linears: list[QuantizedLinear] = field(default_factory=list)

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"n.{output}", **attributes))
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def linear(self, name: str, x: str, shape: tuple[int, int], *, group: int = GROUP) -> str:
        """INT4 (K, N) with scales (K/G, N); ``group`` 0 is one scale per column, TensorRT's slow path."""
        n, k = shape
        draws = np.random.default_rng(len(self.linears))
        self.constant(f"{name}.q", draws.integers(-7, 8, (k, n)).astype(ml_dtypes.int4))
        rows = (k // group,) if group else ()
        self.constant(f"{name}.s", draws.uniform(0.01, 0.02, (*rows, n)).astype(np.float16))
        blocks = {"axis": 0, "block_size": group} if group else {"axis": 1}
        self.node("DequantizeLinear", [f"{name}.q", f"{name}.s"], f"{name}.w", **blocks)
        self.nodes.append(helper.make_node("MatMul", [x, f"{name}.w"], [f"{name}.out"], name=name))
        self.linears.append(QuantizedLinear(node=name, shape=shape, group_size=group or GROUP))
        return f"{name}.out"


def decoder_block(folder: Path, *, group: int = GROUP, float_weights: bool = False) -> EngineGraph:
    """q, k, v, cache update, attention, o: what a decoder of ours consists of, once.

    Args:
        folder: Where the file goes.
        group: Columns per scale; 0 for one scale per output column.
        float_weights: Write fp16 weights where the contract still promises Int4.
    """
    draft = Draft()
    heads = draft.constant("heads", np.array([0, 0, HEADS, HEAD_DIM], np.int64))
    for role in ("q", "k", "v"):
        out = draft.linear(f"layers.0.{role}_proj", "x", (HIDDEN, HIDDEN), group=group)
        split = draft.node("Reshape", [out, heads], f"{role}.split")
        draft.node("Transpose", [split], f"{role}.heads", perm=[0, 2, 1, 3])
    for role, part in (("k", "key"), ("v", "value")):
        names = [f"past_key_values.0.{part}", f"{role}.heads", "write_indices"]
        draft.node("TensorScatter", names, f"present.0.{part}", axis=-2, mode="linear")
    cache = ["present.0.key", "present.0.value"]
    draft.node("Cast", ["mask"], "mask.bool", to=TensorProto.BOOL)
    draft.node("Attention", ["q.heads", *cache, "mask.bool"], "attended")
    joined = draft.constant("joined", np.array([0, 0, HIDDEN], np.int64))
    draft.node("Transpose", ["attended"], "attended.rows", perm=[0, 2, 1, 3])
    draft.node("Reshape", ["attended.rows", joined], "attended.joined")
    out = draft.linear("layers.0.o_proj", "attended.joined", (HIDDEN, HIDDEN), group=group)
    draft.node("Cast", [out], "y", to=TensorProto.FLOAT)
    if float_weights:
        _widen(draft)
    slots = ("batch_size", HEADS, CONTEXT, HEAD_DIM)
    inputs = (
        TensorSpec(name="x", dtype="float16", shape=("batch_size", "sequence_length", HIDDEN)),
        TensorSpec(name="mask", dtype="int64", shape=("batch_size", 1, "sequence_length", CONTEXT)),
        TensorSpec(name="write_indices", dtype="int64", shape=("batch_size",)),
        TensorSpec(name="past_key_values.0.key", dtype="float16", shape=slots),
        TensorSpec(name="past_key_values.0.value", dtype="float16", shape=slots),
    )
    outputs = (
        TensorSpec(name="y", dtype="float32", shape=("batch_size", "sequence_length", HIDDEN)),
        TensorSpec(name="present.0.key", dtype="float16", shape=slots),
        TensorSpec(name="present.0.value", dtype="float16", shape=slots),
    )
    packed = 4 * (HIDDEN * HIDDEN // 2 + HIDDEN * (HIDDEN // GROUP) * 2)
    graph = EngineGraph(
        name="decoder",
        onnx=folder / "block.onnx",
        inputs=inputs,
        outputs=outputs,
        sizes={
            "batch_size": SizeRange(smallest=1, typical=1, largest=1),
            "sequence_length": SizeRange(smallest=1, typical=1, largest=64),
        },
        linears=tuple(draft.linears),
        attention_layers=1,
        kv_updates=2,
        weight_bytes=packed,
    )
    return save(graph, draft)


def relu(folder: Path, *, op: str = "Relu", name: str = "vision") -> EngineGraph:
    """y = relu(x) in fp16; any other op of one input and output in its place."""
    draft = Draft()
    draft.node(op, ["x"], "y")
    specs = [TensorSpec(name=each, dtype="float16", shape=("rows", 8)) for each in "xy"]
    graph = EngineGraph(
        name=name,
        onnx=folder / f"{name}.onnx",
        inputs=(specs[0],),
        outputs=(specs[1],),
        sizes={"rows": SizeRange(smallest=1, typical=2, largest=4)},
    )
    return save(graph, draft)


def wide(folder: Path, *, columns: int) -> EngineGraph:
    """x . w with 16 bytes of fp16 weights per column."""
    draft = Draft()
    draft.constant("w", np.ones((8, columns), np.float16))
    draft.node("MatMul", ["x", "w"], "y")
    graph = relu(folder)
    output = TensorSpec(name="y", dtype="float16", shape=("rows", columns))
    return save(replace(graph, outputs=(output,)), draft)


def fp32_attention(folder: Path) -> EngineGraph:
    """A graph that the parser reads and for which TensorRT for RTX has no kernel."""
    draft = Draft()
    draft.node("Attention", ["q", "k", "v"], "y")
    shape = (1, HEADS, "rows", HEAD_DIM)
    graph = EngineGraph(
        name="vision",
        onnx=folder / "attention.onnx",
        inputs=tuple(TensorSpec(name=each, dtype="float32", shape=shape) for each in "qkv"),
        outputs=(TensorSpec(name="y", dtype="float32", shape=shape),),
        sizes={"rows": SizeRange(smallest=1, typical=2, largest=4)},
    )
    return save(graph, draft)


def save(graph: EngineGraph, draft: Draft) -> EngineGraph:
    """Write the draft under the graph's name, with its contract as inputs and outputs."""
    ports = [
        [
            helper.make_tensor_value_info(
                spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape
            )
            for spec in specs
        ]
        for specs in (graph.inputs, graph.outputs)
    ]
    body = helper.make_graph(draft.nodes, "g", *ports, draft.constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    onnx.save(model, graph.onnx)
    return graph


def with_sizes(graph: EngineGraph, symbol: str, *sizes: int) -> EngineGraph:
    """The same graph with another range for one symbol."""
    smallest, typical, largest = sizes
    ranges = {**graph.sizes, symbol: SizeRange(smallest=smallest, typical=typical, largest=largest)}
    return replace(graph, sizes=ranges)


def _widen(draft: Draft) -> None:
    """Replace every dequantization by the fp16 weight it would produce."""
    draws = np.random.default_rng(1)
    for node in [each for each in draft.nodes if each.op_type == "DequantizeLinear"]:
        draft.nodes.remove(node)
        shape = next(tuple(c.dims) for c in draft.constants if c.name == node.input[0])
        draft.constants[:] = [c for c in draft.constants if c.name not in node.input]
        draft.constant(node.output[0], draws.uniform(-0.1, 0.1, shape).astype(np.float16))
