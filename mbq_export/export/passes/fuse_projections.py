"""Packed linears that read the same value become one node: q, k, v and gate, up.

    x ─┬─ q_proj ─(+ bias)─► q            x ── qkv_proj ─(+ bias)── Split ─┬─► q
       ├─ k_proj ─(+ bias)─► k     ==>                                     ├─► k
       └─ v_proj ─(+ bias)─► v                                             └─► v

Exact, because a row's codes depend on no other row. At one token per call small matrices are bound by launches,
and a plugin cannot be merged by the runtime. The values q, k, v keep their names.

A group is left as it is (with the reason) when its linears differ in width of codes or group size, when only some
have a bias, or when a part has a number of rows that is no multiple of 16, the height of a kernel tile.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import reduce
from typing import Final

import numpy as np
import onnx_ir as ir

from mbq_export.export.graph import (
    add_constant,
    bias_addition,
    dims_of,
    packed_node,
    packed_nodes,
    packed_source,
)
from mbq_export.export.passes.base import Pass
from mbq_export.export.weights import PackedSource, StreamedTensor

TILE_ROWS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Branch:
    """One linear of a group: its node, the Add of its bias if there is one, and the value both end in."""

    node: ir.Node
    add: ir.Node | None

    @property
    def out(self) -> ir.Value:
        return (self.add or self.node).outputs[0]

    @property
    def bias(self) -> ir.TensorProtocol:
        assert self.add is not None
        constant = self.add.inputs[1]
        assert constant is not None
        assert constant.const_value is not None
        return constant.const_value

    @property
    def role(self) -> str:
        return str(self.node.name).rpartition(".")[2]


def fuse(model: ir.Model) -> list[str]:
    """Fuse every group that can be fused and say why the others cannot."""
    groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in packed_nodes(model):
        x = node.inputs[0]
        assert x is not None
        groups[x].append(node)
    declined = []
    for nodes in groups.values():
        if len(nodes) < 2:
            continue
        branches = [_Branch(node=node, add=bias_addition(node)) for node in nodes]
        reason = _obstacle(branches)
        if reason is None:
            _rewrite(model.graph, branches)
        else:
            declined.append(f"{', '.join(str(node.name) for node in nodes)}: {reason}")
    return declined


def _obstacle(branches: list[_Branch]) -> str | None:
    """Why a group must stay as it is."""
    sources = [packed_source(branch.node) for branch in branches]
    formats = {(source.scheme, source.group_size, source.symmetric) for source in sources}
    if len(formats) > 1:
        return "the linears have different number formats"
    if len({branch.add is None for branch in branches}) > 1:
        return "only some of the linears have a bias"
    for branch, source in zip(branches, sources, strict=True):
        if source.n % TILE_ROWS:
            return f"{branch.node.name} has a number of rows that is no multiple of {TILE_ROWS}"
    return None


def _rewrite(graph: ir.Graph, branches: list[_Branch]) -> None:
    sources = [packed_source(branch.node) for branch in branches]
    whole = reduce(PackedSource.stacked, sources)
    first = branches[0]
    name = (
        f"{str(first.node.name).rpartition('.')[0]}.{_fused_role([each.role for each in branches])}"
    )
    x = first.node.inputs[0]
    assert x is not None
    rows = _like(first.node.outputs[0], f"{name}.rows", whole.n)
    node = packed_node(
        lambda tensor: add_constant(graph, tensor), x, name=name, source=whole, out=rows
    )
    added = [node]
    if first.add is not None:
        biases = [branch.bias for branch in branches]
        bias = add_constant(graph, _stacked(f"{name}.bias", biases, rows=whole.n))
        rows = _like(first.out, f"{name}.out", whole.n)
        added.append(
            ir.Node("", "Add", [node.outputs[0], bias], outputs=[rows], name=f"{name}.add_bias")
        )
    sizes = ir.Tensor(np.array(whole.row_counts, np.int64), name=f"{name}.split_sizes")
    parts = [_like(each.out, str(each.out.name), dims_of(each.out)[-1]) for each in branches]
    added.append(
        ir.Node(
            "",
            "Split",
            [rows, add_constant(graph, sizes)],
            ir.convenience.convert_attributes({"axis": -1}),
            outputs=parts,
            name=f"{name}.split",
        )
    )
    graph.insert_before(first.node, added)
    for branch, part in zip(branches, parts, strict=True):
        ir.convenience.replace_all_uses_with(branch.out, part, replace_graph_outputs=True)
        doomed = [branch.node] if branch.add is None else [branch.add, branch.node]
        graph.remove(doomed, safe=True)


def _fused_role(roles: list[str]) -> str:
    """Name of a fused linear: q_proj, k_proj, v_proj make qkv_proj; gate_proj, up_proj make gate_up_proj."""
    stems = [role.removesuffix("_proj") for role in roles]
    joint = "" if all(len(stem) == 1 for stem in stems) else "_"
    return f"{joint.join(stems)}_proj"


def _like(value: ir.Value, name: str, columns: int | ir.SymbolicDim) -> ir.Value:
    """A new value of the same type with another last axis."""
    return ir.Value(name=name, type=value.type, shape=ir.Shape([*dims_of(value)[:-1], columns]))


def _stacked(name: str, biases: list[ir.TensorProtocol], *, rows: int) -> StreamedTensor:
    """(N,) biases of all parts, one after the other."""
    return StreamedTensor(
        name,
        dtype=biases[0].dtype,
        shape=(rows,),
        blocks=lambda: (bias.numpy() for bias in biases),
    )


PASS: Final = Pass(name="fuse_projections", run=fuse)
