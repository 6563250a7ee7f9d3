"""Whether a file is an ONNX graph at all: what it looks like, its versions, sizes, names and order.

Checked before any library loads it: one of them reports a web page as a network of 0 layers, another loads cycles.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from mbq_export.errors import FormatError
from mbq_export.export import ops
from mbq_export.export.external_data import BITS, check_regular, elements, size_of

LARGEST_FILE: Final = (1 << 31) - 1
"""Bytes; a protobuf message cannot be larger."""
MOST_NODES: Final = 1_000_000
LARGEST_RANK: Final = 16
LARGEST_TENSOR: Final = 1 << 40
"""Bytes; more than any constant of a model we could load."""
OLDEST_IR: Final = 8

_LOOKALIKES: Final = (
    (b"version https://git-lfs", "a download pointer of Git LFS"),
    (b"<", "a web page"),
    (b"{", "a JSON document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK", "a zip archive"),
    (b"\x7fELF", "a program"),
)


def load_proto(path: Path) -> onnx.ModelProto:
    """Read a graph file without its external data and check that it is one.

    Raises:
        FormatError: E4402 for a link, E4404 for anything that is no ONNX graph, E4405 for impossible sizes,
            E4406 for versions, E4407 for names and order.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > LARGEST_FILE:
        _no_graph(
            path, f"it has {size:,} bytes and a graph file cannot have more than {LARGEST_FILE:,}"
        )
    data = path.read_bytes()
    for start, what in _LOOKALIKES:
        if data.lstrip()[: len(start)] == start:
            _no_graph(path, f"it is {what}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        _no_graph(path, "it is no ONNX file, or a truncated one")
    if not model.graph.node or not model.graph.output:
        _no_graph(path, "it is empty" if not data else "it holds no operators and outputs")
    if not _is_text(model):
        _no_graph(path, "a name in it is not UTF-8")
    check_versions(model)
    check_sizes(model)
    check_order(model)
    return model


def _is_text(message: Any) -> bool:
    """Whether every string of a message is one; the parser hands on what is none as bytes."""
    for field, value in message.ListFields():
        values = (
            value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        )
        if field.type == field.TYPE_STRING and any(isinstance(each, bytes) for each in values):
            return False
        if field.type == field.TYPE_MESSAGE and not all(map(_is_text, values)):
            return False
    return True


def check_versions(model: onnx.ModelProto) -> None:
    """Check file format, opsets, and that functions agree with the model.

    Raises:
        FormatError: E4406.
    """
    imports: dict[str, int] = {}
    for entry in model.opset_import:
        if imports.setdefault(entry.domain, entry.version) != entry.version:
            _versions(f"Opset {entry.domain!r} is imported twice.")
    if not OLDEST_IR <= model.ir_version <= onnx.IR_VERSION:
        _versions(f"The file has IR version {model.ir_version}.")
    opset = imports.get("", 0)
    if not 1 <= opset <= ops.LARGEST_OPSET:
        _versions(f"The graph is of opset {opset}.")
    for function in model.functions:
        for entry in function.opset_import:
            if imports.get(entry.domain) != entry.version:
                _versions(
                    f"Function {function.name} imports opset {entry.version} of {entry.domain!r}, "
                    f"the graph {imports.get(entry.domain)}."
                )


def check_sizes(model: onnx.ModelProto) -> None:
    """Check dtype, shape and inline bytes of every constant, without allocating anything.

    Raises:
        FormatError: E4405.
    """
    for tensor in model.graph.initializer:
        dims = list(tensor.dims)
        if tensor.data_type not in BITS:
            _sizes(tensor, f"has the element type {tensor.data_type}")
        if len(dims) > LARGEST_RANK or any(size < 0 for size in dims):
            _sizes(tensor, f"has the sizes {dims[:LARGEST_RANK]}")
        if elements(tensor) * BITS[tensor.data_type] > 8 * LARGEST_TENSOR:
            _sizes(tensor, f"would have {size_of(tensor):,} bytes with the sizes {dims}")
        if tensor.data_location != TensorProto.EXTERNAL:
            _check_inline(tensor)


def _check_inline(tensor: TensorProto) -> None:
    """A constant in the graph file itself: as many bytes, or numbers, as its sizes say."""
    found, needed = len(tensor.raw_data), size_of(tensor)
    if not found:
        # Numbers of up to a byte lie one per entry, except nibbles, which lie in pairs.
        found = sum(
            len(numbers)
            for numbers in (
                tensor.float_data,
                tensor.int32_data,
                tensor.int64_data,
                tensor.double_data,
                tensor.uint64_data,
            )
        )
        needed = elements(tensor) if BITS[tensor.data_type] >= 8 else needed
    if found != needed:
        _sizes(tensor, f"holds {found} entries for the sizes {list(tensor.dims)}")


def check_order(model: onnx.ModelProto) -> None:
    """Check that every value has one source, standing before its users.

    Raises:
        FormatError: E4407.
    """
    graph = model.graph
    inner = sum(len(function.node) for function in model.functions)
    if len(graph.node) + inner > MOST_NODES:
        _order(f"The graph has {len(graph.node) + inner:,} nodes.")
    outer = [value.name for value in graph.input]
    outer += [tensor.name for tensor in graph.initializer if tensor.name not in set(outer)]
    _check_nodes("the graph", graph.node, known=outer, results=(v.name for v in graph.output))
    for function in model.functions:
        _check_nodes(function.name, function.node, known=function.input, results=function.output)
    _check_calls(model)


def _check_nodes(
    where: str, nodes: Iterable[onnx.NodeProto], *, known: Iterable[str], results: Iterable[str]
) -> None:
    defined: set[str] = set()
    _define(known, defined, where)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type in {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}:
                _order(f"Node {node.name!r} ({node.op_type}) holds a graph of its own.")
        unknown = [name for name in node.input if name and name not in defined]
        if unknown:
            _order(
                f"Node {node.name!r} ({node.op_type}) reads {unknown[0]!r}, which nothing before it computes."
            )
        _define(filter(None, node.output), defined, where)
    for name in results:
        if name not in defined:
            _order(f"Nothing computes the output {name!r} of {where}.")


def _define(names: Iterable[str], defined: set[str], where: str) -> None:
    for name in names:
        if name in defined:
            _order(f"Two values of {where} are named {name!r}.")
        defined.add(name)


def _check_calls(model: onnx.ModelProto) -> None:
    """Functions may not call functions: none of ours does, and so none can call itself."""
    functions = {(function.domain, function.name) for function in model.functions}
    for function in model.functions:
        for node in function.node:
            if (node.domain, node.op_type) in functions:
                _order(f"Function {function.name} calls function {node.op_type}.")


def _no_graph(path: Path, what: str) -> NoReturn:
    raise FormatError(
        "E4404",
        f"{path.name} is no ONNX graph: {what}.",
        why="an ONNX file is a protobuf message with at least one operator",
        fix=("download or copy the file again", "export the model again"),
    )


def _versions(what: str) -> NoReturn:
    raise FormatError(
        "E4406",
        what,
        why=f"runtimes read opsets up to {ops.LARGEST_OPSET} and IR versions {OLDEST_IR} to {onnx.IR_VERSION}, "
        "and a function imports what its graph imports",
        fix="export the model again with --op-level auto",
    )


def _sizes(tensor: TensorProto, what: str) -> NoReturn:
    raise FormatError(
        "E4405",
        f"Constant {tensor.name!r} {what}.",
        why="sizes are not negative, and their product is what the constant holds",
        fix="export the model again",
    )


def _order(what: str) -> NoReturn:
    raise FormatError(
        "E4407",
        what,
        why="every value is computed once, before it is read, by a node of the same graph",
        fix="export the model again",
    )
