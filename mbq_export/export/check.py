"""The validator: everything that can be said about a graph file without running it.

    1  file, protobuf, versions, sizes, order     `structure`
    2  external data                              `external_data`
    3  operators, bodies, packed constants        `contract`
    4  the library's own checker and shape inference, by path

Run on every graph that was just written and on every graph that a runtime or a builder is about to read. What needs a
runtime (a session, a parser) is done by the callers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import onnx

from mbq_export.errors import FormatError, InternalError, located
from mbq_export.export import ops
from mbq_export.export.contract import check_constants, check_operators
from mbq_export.export.external_data import checked_places
from mbq_export.export.structure import load_proto

if TYPE_CHECKING:
    from pathlib import Path

    from mbq_export.export.record import GraphRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a graph must keep to beyond the rules for all graphs.

    Attributes:
        target: ``trt`` if TensorRT will read it.
        allowed: Standard operators of its op level, None for any.
    """

    target: str | None = None
    allowed: frozenset[str] | None = None


ANY: Final = Limits()


def check_graph(path: Path, limits: Limits = ANY) -> onnx.ModelProto:
    """Check a graph file and its constants.

    Args:
        path: The ``.onnx`` file; external data beside it.
        limits: What its reader can take.

    Returns:
        The graph, external data not loaded.

    Raises:
        FormatError: E4401 to E4412, located at the file and node.
    """
    with located(path.name):
        model = load_proto(path)
        places = checked_places(model, path.parent)
        check_operators(model, allowed=limits.allowed)
        check_constants(model, places, target=limits.target)
        _check_library(path)
    return model


def check_written(model: onnx.ModelProto, record: GraphRecord) -> None:
    """Check a graph of ours against its record: ports in order, and a type for every value.

    Raises:
        InternalError: E9001.
    """
    graph = model.graph
    for kind, ports, found in (
        ("inputs", record.inputs, graph.input),
        ("outputs", record.outputs, graph.output),
    ):
        names = [port.name for port in ports]
        if names != [value.name for value in found]:
            raise InternalError("E9001", f"The {kind} of {graph.name} are not {', '.join(names)}.")
    typed = {value.name for value in (*graph.value_info, *graph.output)}
    for node in graph.node:
        for name in node.output:
            if name not in typed:
                raise InternalError("E9001", f"Value {name!r} of {graph.name} has no type.")


def _check_library(path: Path) -> None:
    """Run onnx's checker with shape inference; it reads the file itself, so constants stay on disk."""
    ops.register()
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise FormatError(
            "E4407",
            f"The checker of onnx refuses it: {lines[0][:300]}",
            why="operators, types and shapes must agree",
            fix="export the model again",
        ) from error
