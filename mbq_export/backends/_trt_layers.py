"""The layer table of an engine, read from the build log.

Without a GPU an engine cannot be loaded, so there is no inspector. But a verbose build prints the table::

    Name: <id>, LayerType: <type>, Inputs: [ {T}, .. ], Constants: [ {T}, .. ], Outputs: [ {T}, .. ],
        TacticName: <s>, StreamId: <int>[, EventId: <int>], Metadata: [ONNX Layer: a][ONNX Layer: b]
    T = Name: <id>, Dimensions: [..], Strides: [..], StrideOrder: [..], Datatype: <type>, Format: ..
    Name: <id>, LayerType: <type>, Inputs: [ {S}, .. ], Outputs: [ {S}, .. ], ParameterType: <type>, ..,
        StreamId: <int>, Metadata: ..                       no kernel: a size that the host hands over, for example
    S = Name: <id>, Location: <place>, Dimensions: [..], Datatype: <type>, Format: ..
    I/O Tensors:
     Name: <id>, IOMode: Input, DataType: <type>, Dimensions: [..], .., ProfileInfo: [ {MinShape: [..], .. }]

A row lists every ONNX node that was merged into it. A log in another format is an error, never an empty table.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

from mbq_export.backends.base import EngineGraph, SizeRange, TensorSpec
from mbq_export.errors import BuildError

SCHEMA: Final = 1
ROW_MARK: Final = "LayerType:"
IO_MARK: Final = "IOMode:"

BITS: Final = {
    "Bool": 8, "UInt8": 8, "Int8": 8, "FP8": 8, "Int4": 4, "FP4": 4,
    "Half": 16, "BFloat16": 16, "Float": 32, "Int32": 32, "Int64": 64,
}  # fmt: skip
"""Width of an element by TensorRT's name of its type."""

NUMPY_NAMES: Final = {
    "Half": "float16", "Float": "float32", "BFloat16": "bfloat16",
    "Int64": "int64", "Int32": "int32", "Int8": "int8", "Bool": "bool",
}  # fmt: skip
FLOATS: Final = frozenset({"Half", "Float", "BFloat16"})
PLUGIN_ROW: Final = "custom_layer"
"""Type of the row of a plugin."""

_ROW = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<in>.*?)\], Constants: \[(?P<const>.*?)\], "
    r"Outputs: \[(?P<out>.*?)\], TacticName: (?P<tactic>.*?), StreamId: -?\d+(?:, \w+: -?\w+)*, Metadata:(?P<meta>.*)$"
)
_SHAPE_ROW = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<in>.*?)\], Outputs: \[(?P<out>.*?)\], "
    r"ParameterType: (?P<tactic>\w+), .*?StreamId: -?\d+(?:, \w+: -?\w+)*, Metadata:(?P<meta>.*)$"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?),(?: Location: \w+,)? Dimensions: \[(?P<dims>[^\]]*)\], "
    r"(?:Strides: \[(?P<strides>[^\]]*)\], .*?)?Datatype: (?P<type>\w+), "
)
_IO = re.compile(
    r"Name: (?P<name>.*?), IOMode: (?P<mode>\w+), DataType: (?P<type>\w+), Dimensions: \[(?P<dims>[^\]]*)\]"
)
_SHAPES = re.compile(r"MinShape: \[([^\]]*)\], OptShape: \[([^\]]*)\], MaxShape: \[([^\]]*)\]")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]?\[|[\x1e\x1f]?\s*$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensor:
    """A tensor in a row: ``dims`` hold -1 where a size varies, ``strides`` where one depends on it or are not told."""

    name: str
    type: str
    dims: tuple[int, ...]
    strides: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements; sizes that vary count as one."""
        return math.prod(abs(size) for size in self.dims)

    @property
    def by_rows(self) -> bool:
        """Whether it lies row after row, as far as the sizes that do not vary tell; not, if no strides are told."""
        if len(self.strides) != len(self.dims):
            return False
        wanted = 1
        for size, stride in reversed(list(zip(self.dims, self.strides, strict=True))):
            if size != 1 and stride != wanted:
                return False
            wanted = wanted * size if size > 0 and wanted > 0 else -1
        return True

    @property
    def size(self) -> int:
        """Bytes."""
        return (self.elements * BITS[self.type] + 7) // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One row: a kernel, and the ONNX nodes that became it."""

    name: str
    type: str
    onnx: tuple[str, ...]
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    tactic: str


@dataclass(frozen=True, kw_only=True, slots=True)
class IoTensor:
    """An input or output of the engine; ``profile`` has min, opt and max shape of an input that varies."""

    name: str
    mode: str
    type: str
    dims: tuple[int, ...]
    profile: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTable:
    """All rows of an engine."""

    layers: tuple[Layer, ...]
    io: tuple[IoTensor, ...]

    @classmethod
    def parse(cls, lines: Iterable[str]) -> Self:
        """Read the table out of a verbose build log.

        Args:
            lines: The log; other lines are skipped.

        Raises:
            BuildError: E6012 if no row was recognised, or a row is written otherwise than the grammar says.
        """
        layers: list[Layer] = []
        tensors: list[IoTensor] = []
        count = 0
        for line in lines:
            count += 1
            if ROW_MARK in line:
                layers.append(_layer(line))
            elif IO_MARK in line:
                tensors.append(_io_tensor(line))
        if not layers or not tensors:
            raise _unreadable(
                f"{len(layers)} layers and {len(tensors)} inputs and outputs recognised "
                f"in a log with {count} lines"
            )
        return cls(layers=tuple(layers), io=tuple(tensors))

    def as_json(self) -> dict[str, Any]:
        """Form of ``layers.json``, one engine of it."""
        return {
            "layers": [
                {
                    "name": layer.name,
                    "type": layer.type,
                    "onnx": list(layer.onnx),
                    "in": [[each.name, each.type, list(each.dims)] for each in layer.inputs],
                    "const": [[each.name, each.type, list(each.dims)] for each in layer.constants],
                    "out": [[each.name, each.type, list(each.dims)] for each in layer.outputs],
                    "tactic": layer.tactic,
                }
                for layer in self.layers
            ],
            "io": [
                {
                    "name": each.name,
                    "mode": each.mode,
                    "type": each.type,
                    "dims": list(each.dims),
                    "profile": [list(shape) for shape in each.profile],
                }
                for each in self.io
            ],
        }

    def rows_of(self, node: str) -> tuple[Layer, ...]:
        """Return the rows that an ONNX node was merged into."""
        return tuple(layer for layer in self.layers if node in layer.onnx)


def profile_shapes(spec: TensorSpec, graph: EngineGraph) -> tuple[tuple[int, ...], ...]:
    """Smallest, typical and largest shape of an input, each symbol replaced from ``graph.sizes``."""
    ranges = [
        SizeRange(smallest=size, typical=size, largest=size)
        if isinstance(size, int)
        else graph.sizes[size]
        for size in spec.shape
    ]
    return (
        tuple(each.smallest for each in ranges),
        tuple(each.typical for each in ranges),
        tuple(each.largest for each in ranges),
    )


def _layer(line: str) -> Layer:
    match = _ROW.search(line) or _SHAPE_ROW.search(line)
    if match is None:
        raise _unreadable(f"a row is written in an unknown way: {line.strip()[:200]}")
    texts = {"const": "", **match.groupdict()}
    inputs, constants, outputs = (_tensors(texts[part], line) for part in ("in", "const", "out"))
    return Layer(
        name=match["name"],
        type=match["type"],
        onnx=tuple(_NODE.findall(match["meta"])),
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        tactic=match["tactic"],
    )


def _tensors(text: str, line: str) -> tuple[LayerTensor, ...]:
    tensors = tuple(
        LayerTensor(
            name=each["name"],
            type=each["type"],
            dims=_sizes(each["dims"]),
            strides=_sizes(each["strides"] or ""),
        )
        for each in _TENSOR.finditer(text)
    )
    unknown = {each.type for each in tensors} - BITS.keys()
    if len(tensors) != text.count("{ Name: ") or unknown:
        raise _unreadable(f"tensors are written in an unknown way: {line.strip()[:200]}")
    return tensors


def _io_tensor(line: str) -> IoTensor:
    match = _IO.search(line)
    if match is None:
        raise _unreadable(f"an input or output is written in an unknown way: {line.strip()[:200]}")
    shapes = _SHAPES.search(line)
    return IoTensor(
        name=match["name"],
        mode=match["mode"],
        type=match["type"],
        dims=_sizes(match["dims"]),
        profile=tuple(_sizes(shape) for shape in shapes.groups()) if shapes else (),
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size.strip())


def _unreadable(found: str) -> BuildError:
    return BuildError(
        "E6012",
        f"The layer table in TensorRT's build log cannot be read: {found}.",
        why="the format of the log is not promised and may change with the library",
        fix='pip install "mbq-export[rtx]" installs the version this release reads',
    )
