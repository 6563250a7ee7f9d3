"""Graphs on disk: one ``.onnx`` file, one data file beside it, the same bytes for the same input.

<name>.onnx         protobuf: nodes, shapes, constants below 256 bytes
<name>.onnx_data    the other constants, each at a multiple of 4096, in the order of first use
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import onnx_ir as ir

from mbq_export.errors import InternalError
from mbq_export.export.graph import settle_constants
from mbq_export.export.record import Port
from mbq_export.writing import explained

ALIGNMENT: Final = 4096
SMALLEST_EXTERNAL: Final = 256
LARGEST_PROTO: Final = 100 << 20
"""Bytes; graphs of ours have kilobytes, and 2 GB is where the format ends."""


def save_graph(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write a graph and its constants, a block of one constant at a time.

    Args:
        model: Constants may be computed while they are written.
        path: Final name, in a folder that is not published yet.

    Returns:
        The data files.

    Raises:
        ResourceError: E5001 or E5008.
        InternalError: E9001 if the graph itself is far larger than any of ours.
    """
    settle_constants(model.graph)
    data = path.with_name(f"{path.name}_data")
    with explained(path):
        ir.save(
            model,
            path,
            external_data=data.name,
            size_threshold_bytes=SMALLEST_EXTERNAL,
            alignment=ALIGNMENT,
            align_threshold=0,
        )
        files = (data,) if data.exists() else ()
        for file in (path, *files):
            file.chmod(0o644)
    if path.stat().st_size > LARGEST_PROTO:
        raise InternalError("E9001", f"{path.name} has {path.stat().st_size:,} bytes of graph.")
    return files


def ports_of(values: Sequence[ir.Value]) -> tuple[Port, ...]:
    """Inputs or outputs of a graph as the record lists them."""
    return tuple(_port(value) for value in values)


def node_counts(model: ir.Model) -> dict[str, int]:
    """Number of nodes by operator, with the domain in front where it is not the standard one."""
    names = (
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph
    )
    return dict(sorted(Counter(names).items()))


def constant_bytes(model: ir.Model) -> int:
    """Bytes of all constants."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _port(value: ir.Value) -> Port:
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape.dims)
    return Port(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape)
