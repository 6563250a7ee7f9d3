"""The layer table of an engine, read from the build log, and what must hold in it.

Without a GPU an engine cannot be loaded, so there is no inspector. But a verbose build prints the table::

    Name: <id>, LayerType: <type>, Inputs: [ {T}, .. ], Constants: [ {T}, .. ], Outputs: [ {T}, .. ],
        TacticName: <s>, StreamId: <int>[, EventId: <int>], Metadata: [ONNX Layer: a][ONNX Layer: b]
    T = Name: <id>, Dimensions: [..], Strides: [..], StrideOrder: [..], Datatype: <type>, Format: ..
    I/O Tensors:
     Name: <id>, IOMode: Input, DataType: <type>, Dimensions: [..], .., ProfileInfo: [ {MinShape: [..], .. }]

A row lists every ONNX node that was merged into it. A log in another format is an error, never an empty table.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

from mbq_export.backends.base import EngineGraph, QuantizedLinear, SizeRange, TensorSpec
from mbq_export.errors import BuildError
from mbq_export.report import Check

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

BYTES_TOLERANCE: Final = 0.02
"""A7: share by which constants may differ from the exporter's count."""

DROPPED_TYPES: Final = frozenset({"Int64", "Int32", "Bool"})
"""Constants of these types are shapes, indices and masks, which the builder folds away: not counted."""

_ROW = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<in>.*?)\], Constants: \[(?P<const>.*?)\], "
    r"Outputs: \[(?P<out>.*?)\], TacticName: (?P<tactic>.*?), StreamId: -?\d+(?:, \w+: -?\w+)*, Metadata:(?P<meta>.*)$"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dims>[^\]]*)\], .*?Datatype: (?P<type>\w+), "
)
_IO = re.compile(
    r"Name: (?P<name>.*?), IOMode: (?P<mode>\w+), DataType: (?P<type>\w+), Dimensions: \[(?P<dims>[^\]]*)\]"
)
_SHAPES = re.compile(r"MinShape: \[([^\]]*)\], OptShape: \[([^\]]*)\], MaxShape: \[([^\]]*)\]")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]?\[|[\x1e\x1f]?\s*$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensor:
    """A tensor in a row: ``Dimensions`` hold -1 where a size varies."""

    name: str
    type: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements; sizes that vary count as one."""
        return math.prod(abs(size) for size in self.dims)

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


def checks(table: LayerTable, graph: EngineGraph) -> tuple[Check, ...]:
    """Compare an engine with what was asked for.

    ``A2`` each quantized linear multiplies from an Int4 constant, ``A3`` no row writes dequantized weights to
    memory, ``A5`` no other constant of a quantized linear is as large as its weights, ``A6`` attention is fused
    and the cache is updated in place, ``A7`` all constants together weigh what the exporter counted, ``A8``
    inputs, outputs and profile are the contract's.
    """
    found = [_weights_stay_int4(table, graph.linears), _no_slow_dequantize(table)]
    found.append(_weights_stay_packed(table, graph.linears))
    if graph.attention_layers is not None:
        found.append(_count("A6.attention", len(_fused_attention(table)), graph.attention_layers))
    if graph.kv_updates is not None:
        found.append(_count("A6.cache", len(_updated_in_place(table)), graph.kv_updates))
    if graph.weight_bytes is not None:
        found.append(_weighs(table, graph.weight_bytes))
    found.append(_same_interface(table, graph))
    return tuple(found)


def _weights_stay_int4(table: LayerTable, linears: tuple[QuantizedLinear, ...]) -> Check:
    """A2."""

    def holds(linear: QuantizedLinear) -> bool:
        rows = table.rows_of(linear.node)
        return any(each.type == "Int4" for row in rows for each in row.constants)

    return _none_of(
        "A2", [linear.node for linear in linears if not holds(linear)], "no Int4 constant"
    )


def _no_slow_dequantize(table: LayerTable) -> Check:
    """A3: a row that reads Int4 and writes as many halves puts a dequantized weight into memory."""
    bad: list[str] = []
    for row in table.layers:
        packed = {each.elements for each in row.constants if each.type == "Int4"}
        written = {each.elements for each in row.outputs if each.type in FLOATS}
        if packed & written:
            bad.extend(row.onnx or (row.name,))
    return _none_of("A3", bad, "dequantized to memory before the multiplication")


def _weights_stay_packed(table: LayerTable, linears: tuple[QuantizedLinear, ...]) -> Check:
    """A5: beside its scales a row of linears needs no float constant longer than a bias or a norm's weight."""
    named = {linear.node: linear for linear in linears}
    bad = []
    for row in table.layers:
        here = [named[node] for node in row.onnx if node in named]
        allowed = sum(_scales_of(here))
        for each in row.constants:
            as_long = any(linear.shape[1] in each.dims for linear in here)
            if each.type in FLOATS and as_long and each.elements > allowed:
                nodes = ", ".join(linear.node for linear in here)
                bad.append(f"{nodes} ({each.elements} elements, {allowed} allowed)")
    return _none_of("A5", bad, "a float constant as large as weights")


def _scales_of(linears: list[QuantizedLinear]) -> list[int]:
    """Elements that each linear's scales, or a vector of its inputs or outputs, may have."""
    return [
        max(n * math.ceil(k / linear.group_size), n, k)
        for linear in linears
        for n, k in (linear.shape,)
    ]


def _fused_attention(table: LayerTable) -> list[Layer]:
    """Rows that are one fused attention kernel; the compiler calls them ``_gemm_mha_v2_..``."""
    return [row for row in table.layers if "_mha_" in row.name]


def _updated_in_place(table: LayerTable) -> list[str]:
    """Outputs that some row reads and writes: cache and output share memory."""
    outputs = {each.name for each in table.io if each.mode == "Output"}
    return [
        each.name
        for row in table.layers
        for each in row.outputs
        if each.name in outputs and each.name in {read.name for read in row.inputs}
    ]


def _weighs(table: LayerTable, expected: int) -> Check:
    """A7."""
    constants = {
        each.name: each.size
        for row in table.layers
        for each in row.constants
        if each.type not in DROPPED_TYPES
    }
    found = sum(constants.values())
    difference = abs(found - expected) / max(expected, 1)
    return Check(
        name="engine.A7",
        ok=difference <= BYTES_TOLERANCE,
        tier="engine",
        value=difference,
        threshold=BYTES_TOLERANCE,
        why=f"constants weigh {found} bytes, the exporter counted {expected}",
    )


def _same_interface(table: LayerTable, graph: EngineGraph) -> Check:
    """A8: names, types and profile shapes."""
    found = {each.name: each for each in table.io}
    wrong = sorted(found.keys() ^ {spec.name for spec in (*graph.inputs, *graph.outputs)})
    for spec in (*graph.inputs, *graph.outputs):
        tensor = found.get(spec.name)
        if tensor is not None and NUMPY_NAMES.get(tensor.type) != spec.dtype:
            wrong.append(f"{spec.name} is {tensor.type}, not {spec.dtype}")
    for spec in graph.inputs:
        shapes = profile_shapes(spec, graph)
        if spec.name in found and found[spec.name].profile not in {(), shapes}:
            wrong.append(f"{spec.name} has profile {found[spec.name].profile}, not {shapes}")
    return _none_of("A8", wrong, "differs from the graph's contract")


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


def _count(name: str, found: int, expected: int) -> Check:
    return Check(
        name=f"engine.{name}",
        ok=found == expected,
        tier="engine",
        value=found,
        threshold=expected,
        why="" if found == expected else f"expected {expected}, found {found}",
    )


def _none_of(rule: str, bad: list[str], what: str) -> Check:
    """A check that a list of offenders is empty."""
    return Check(
        name=f"engine.{rule}",
        ok=not bad,
        tier="engine",
        value=len(bad),
        threshold=0,
        place=", ".join(bad[:3]),
        why=f"{what}: {', '.join(bad[:3])}{', ..' if len(bad) > 3 else ''}" if bad else "",
    )


def _layer(line: str) -> Layer:
    match = _ROW.search(line)
    if match is None:
        raise _unreadable(f"a row is written in an unknown way: {line.strip()[:200]}")
    inputs, constants, outputs = (_tensors(match[part], line) for part in ("in", "const", "out"))
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
        LayerTensor(name=each["name"], type=each["type"], dims=_sizes(each["dims"]))
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
