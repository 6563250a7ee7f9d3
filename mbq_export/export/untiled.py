"""A graph of the plugin form read back: which weights its tiles are, without a GPU and without a plugin.

    tiles, scales, zero points ──► `tiles.untile` ──► PackedWeight of the node ── rows of each part ──► checkpoint?

A plugin computes what its constants say, so a graph whose constants are those of the checkpoint, bit for bit, is one of
two halves of the proof; that the plugin's kernels compute `linear_reference` is the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mbq_export.errors import FormatError, located
from mbq_export.export import ops
from mbq_export.export.external_data import checked_places, read_array
from mbq_export.export.packed_contract import attributes_of
from mbq_export.export.plugin_contract import is_plugin
from mbq_export.export.structure import load_proto
from mbq_export.schemes.layouts.tiles import TiledWeight, untile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray
    from onnx import TensorProto

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.export.external_data import Place
    from mbq_export.schemes.base import PackedWeight


def plugin_weights(path: Path) -> Iterator[tuple[onnx.NodeProto, PackedWeight]]:
    """Yield every plugin of a checked graph with its weight, bias left out, one at a time.

    Args:
        path: A graph that `check_graph` accepts.
    """
    model = load_proto(path)
    places = checked_places(model, path.parent)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if is_plugin(node):
            yield node, untile(tiled_weight(node, constants, places))


def tiled_weight(
    node: onnx.NodeProto, constants: Mapping[str, TensorProto], places: Mapping[str, Place]
) -> TiledWeight:
    """Read the constants of one plugin, bias left out.

    Args:
        node: Of the plugin form, checked.
        constants: Of the graph, by name.
        places: Checked places of external constants.
    """
    op, has = ops.op_named(node.op_type), attributes_of(node)
    assert op is not None
    arrays: dict[str, NDArray[Any]] = {
        port: read_array(constants[name], places.get(name))
        for port, name in zip(op.inputs[1:], node.input[1 : len(op.inputs)], strict=True)
    }
    scales: NDArray[np.float16] | NDArray[np.float32] = arrays["scales"]
    return TiledWeight(
        scheme=ops.scheme_of(op),
        n=has["N"],
        k=has["K"],
        group_size=has["group_size"],
        codes=arrays["qweight"].astype(np.int32),
        scales=scales,
        zeros=None if op.symmetric else arrays["zeros"].astype(np.int32),
    )


def check_same_weights(path: Path, checkpoint: QuantCheckpoint) -> int:
    """Check that the plugins of a graph hold the weights of a checkpoint, bit for bit.

    Args:
        path: A graph that `check_graph` accepts.
        checkpoint: What it was exported from.

    Returns:
        Linears of the checkpoint that were compared.

    Raises:
        FormatError: E4415, located at the node, for another weight, E4103 for a linear that the checkpoint has not.
    """
    compared = 0
    for node, weight in plugin_weights(path):
        sources = {entry.key: entry.value for entry in node.metadata_props}.get(ops.SOURCE, "")
        with located(path.name), located(node.name):
            start = 0
            for module in filter(None, sources.split(",")):
                wanted = checkpoint.packed(module)
                _compare(weight, wanted, slice(start, start + wanted.n), module)
                start, compared = start + wanted.n, compared + 1
            if start != weight.n:
                _other(f"{weight.n} rows, its sources {start}")
    return compared


def _compare(found: PackedWeight, wanted: PackedWeight, rows: slice, module: str) -> None:
    pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
        "codes": (found.words[rows], wanted.words),
        "scales": (found.scales[rows], wanted.scales),
    }
    if found.zeros is not None:
        zeros = np.full_like(found.zeros[rows], 2 ** (wanted.bits - 1))
        pairs["zero points"] = (found.zeros[rows], zeros if wanted.zeros is None else wanted.zeros)
    for what, (ours, theirs) in pairs.items():
        if not np.array_equal(ours, theirs):
            _other(f"other {what} than {module}")


def _other(what: str) -> None:
    raise FormatError(
        "E4415",
        f"The plugin has {what}.",
        why="its tiles hold the weights of the checkpoint, bit for bit",
        fix="export the model again",
    )
