"""What a graph file holds, and what the record of an export says of each: nodes, and plugins that an engine needs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

from mbq_export.errors import FormatError
from mbq_export.evaluate.description import Description, Table
from mbq_export.reading import read_json
from mbq_export.runtime import RECORD

LARGEST_PROTO_BYTES: Final = 100 << 20
"""Graphs of ours keep weights outside; a larger file is not read whole to look at it."""


PLUGIN_LAYERS: Final = "mbq.plugin_layers"
"""As `export.ops` names it; a test holds the two together: looking at a record must not load what writes it."""


def describe_graphs(folder: Path) -> Description:
    """Describe a folder of graphs by its record.

    Raises:
        FormatError: E4604 for a damaged record.
    """
    record = _record(folder)
    facts = {name: record.get(name) for name in ("family", "scheme", "group_size", "versions")}
    rows = [
        (graph["file"], op, name)
        for graph in record["graphs"]
        for op, names in graph.get("plugin_layers", {}).items()
        for name in names
    ]
    header = ("graph", "operator", "node")
    plugins = Table(title="expected plugin layers", header=header, rows=rows)
    tables = [*graph_table(folder), *([plugins] if rows else [])]
    return Description(kind="graphs", facts=facts, tables=tables)


def graph_table(folder: Path) -> list[Table]:
    """One row per graph: its size, and how many layers of an engine must be plugins. Empty without a record."""
    if not (folder / RECORD).is_file():
        return []
    rows = [
        (
            graph["file"],
            sum(graph["nodes"].values()),
            graph["opset"],
            graph["weight_bytes"],
            sum(map(len, graph.get("plugin_layers", {}).values())),
        )
        for graph in _record(folder)["graphs"]
    ]
    header = ("graph", "nodes", "opset", "weight bytes", "plugins")
    return [Table(title="graphs", header=header, rows=rows)]


def plugin_operators(folder: Path) -> dict[str, str]:
    """Operator of every node that an engine must hold as a plugin, by node. Empty without a record."""
    if not (folder / RECORD).is_file():
        return {}
    return {
        name: op
        for graph in _record(folder)["graphs"]
        for op, names in graph.get("plugin_layers", {}).items()
        for name in names
    }


def _record(folder: Path) -> dict[str, Any]:
    found = read_json(folder / RECORD, code="E4604")
    wanted = {"file": str, "nodes": dict, "opset": int, "weight_bytes": int}
    graphs = found.get("graphs")
    whole = isinstance(graphs, list) and all(
        isinstance(graph, dict)
        and all(isinstance(graph.get(key), kind) for key, kind in wanted.items())
        for graph in graphs
    )
    if not whole:
        raise FormatError(
            "E4604",
            f"{RECORD} does not list graphs.",
            why=f"each has {', '.join(wanted)}",
            fix="export the model again",
        )
    return found


def describe_graph(path: Path) -> Description:
    """Describe one graph file without its external data.

    Raises:
        FormatError: E4404 if it is none, E4409 if its metadata names plugins in another form.
    """
    import onnx  # noqa: PLC0415 (only this kind needs it)
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: PLC0415

    size = path.stat().st_size
    if not 0 < size <= LARGEST_PROTO_BYTES:
        raise FormatError(
            "E4404",
            f"{path.name} has {size} bytes.",
            why=f"a graph has 1 to {LARGEST_PROTO_BYTES} bytes, its weights lie outside",
            fix="export the graph again",
        )
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise FormatError(
            "E4404",
            f"{path.name} is no ONNX file; it starts with {path.read_bytes()[:16]!r}.",
            why="a protobuf message was expected",
            fix="export the graph again",
        ) from error
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model.graph.node
    )
    facts = {
        "producer": model.producer_name,
        "ir version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": len(model.graph.node),
        "functions": [function.name for function in model.functions],
        "initializers": len(model.graph.initializer),
    }
    plugins = _expected({entry.key: entry.value for entry in model.metadata_props})
    if plugins:
        facts["expected plugin layers"] = dict(Counter(op_type for op_type, _ in plugins))
    ports = [
        (
            kind,
            value.name,
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            _dims(value),
        )
        for kind, values in (("input", model.graph.input), ("output", model.graph.output))
        for value in values
    ]
    return Description(
        kind="graph",
        facts=facts,
        tables=[
            Table(title="operators", header=("operator", "count"), rows=sorted(operators.items())),
            Table(
                title="inputs and outputs", header=("kind", "name", "dtype", "shape"), rows=ports
            ),
            *(
                [Table(title="plugins", header=("operator", "node"), rows=plugins)]
                if plugins
                else []
            ),
        ],
    )


def _expected(metadata: dict[str, str]) -> list[tuple[str, str]]:
    """Operator and name of every node that an engine must hold as a plugin, as the graph's metadata say."""
    try:
        layers = json.loads(metadata.get(PLUGIN_LAYERS, "{}"))
        return [(str(op), str(name)) for op, names in layers.items() for name in names]
    except (ValueError, AttributeError, TypeError) as error:
        raise FormatError(
            "E4409",
            f"Metadata {PLUGIN_LAYERS!r} is {metadata[PLUGIN_LAYERS][:60]!r}.",
            why="it is a JSON object of node names by operator",
            fix="export the graph again",
        ) from error


def _dims(value: Any) -> str:
    dims = value.type.tensor_type.shape.dim
    return "[" + ", ".join(dim.dim_param or str(dim.dim_value) for dim in dims) + "]"
