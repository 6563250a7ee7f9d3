"""The embedding without an engine: rows of the table that the embedding graph holds, read from its mapped file.

    embed_tokens_<dtype>.onnx ── one Gather ──► embed_tokens_<dtype>.onnx_data ── rows ──► (1, T, hidden)

The same bytes as the graph's answer, and neither a copy of the table on the device nor a runtime for one Gather.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import onnx
from numpy.typing import NDArray

from mbq_export.backends._dtypes import dtype_of
from mbq_export.backends._feeds import checked_feeds
from mbq_export.backends.base import TensorSpec
from mbq_export.errors import FormatError

LARGEST_PROTO: Final = 1 << 20
"""Bytes of a graph with one node; the table lies outside unless it is tiny."""


class TableEngine:
    """Looks rows up by their number, as the graph would."""

    def __init__(self, table: NDArray[Any], *, ids: str, rows: str, name: str) -> None:
        """Keep the (V, hidden) table and the names of the graph's ports."""
        self._table, self._name = table, name
        self._inputs = (TensorSpec(name=ids, dtype="int64", shape=("batch", "sequence")),)
        width = int(table.shape[1])
        self._outputs = (
            TensorSpec(name=rows, dtype=table.dtype.name, shape=("batch", "sequence", width)),
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` wants."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns."""
        return self._outputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Look (B, T) ids up.

        Returns:
            (B, T, hidden) rows in the table's type.

        Raises:
            FormatError: E4102 for feeds of another form, or a number that no row has.
        """
        (ids,) = checked_feeds(self._inputs, feeds, name=self._name).values()
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._table):
            raise FormatError(
                "E4102",
                f"Token {int(ids.max() if ids.max() >= len(self._table) else ids.min())} has no embedding.",
                why=f"the table has {len(self._table)} rows",
                fix="use the bundle's own processor and graphs together",
            )
        return {self._outputs[0].name: self._table[ids]}

    def close(self) -> None:
        """Nothing is held but a map of a file."""

    def __enter__(self) -> Self:
        """Return the table."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""


def open_table(graph: Path) -> TableEngine:
    """Map the table of an embedding graph.

    Args:
        graph: Its file, the table beside it.

    Raises:
        FormatError: E4404 if there is no such file, E4413 if it is no lookup in one table, E4403 if its table is
            not where it says.
    """
    if not graph.is_file() or graph.stat().st_size > LARGEST_PROTO:
        raise FormatError(
            "E4404",
            f"There is no embedding graph {graph.name} in {graph.parent}.",
            why="rows of the embedding are read from the file beside it",
            fix="mbq-export build, or export, writes it",
        )
    model = onnx.load(graph, load_external_data=False).graph
    if [node.op_type for node in model.node] != ["Gather"] or len(model.initializer) != 1:
        raise FormatError(
            "E4413",
            f"{graph.name} is no lookup in one table.",
            why="an embedding graph has one Gather",
            fix="export the model again",
        )
    return TableEngine(
        _mapped(model.initializer[0], graph),
        ids=model.input[0].name,
        rows=model.output[0].name,
        name=graph.name,
    )


def _mapped(tensor: onnx.TensorProto, graph: Path) -> NDArray[Any]:
    """(V, hidden) view of the table, read-only.

    Raises:
        FormatError: E4403.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    told = {entry.key: entry.value for entry in tensor.external_data}
    location, start = told.get("location", ""), told.get("offset", "0")
    path, offset = graph.parent / Path(location).name, int(start) if start.isdecimal() else -1
    shape, dtype = tuple(tensor.dims), dtype_of(_name_of(tensor))
    size = int(np.prod(shape)) * dtype.itemsize
    inside = offset >= 0 and path.is_file() and offset + size <= path.stat().st_size
    if path.name != location or not inside:
        raise FormatError(
            "E4403",
            f"The table of {graph.name} is not at byte {start[:40]} of {location[:200]}.",
            why=f"{size} bytes are expected there, in a file beside the graph",
            fix=("copy the bundle again", "export the model again"),
        )
    return np.asarray(np.memmap(path, dtype, mode="r", offset=offset, shape=shape))


def _name_of(tensor: onnx.TensorProto) -> str:
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
