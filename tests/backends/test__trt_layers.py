"""The layer table, on tables that TensorRT for RTX 1.7.1.116 printed for `trt_graphs.decoder_block`.

``packed`` is what we want, ``slow`` has one scale per column (dequantized at run time), ``float`` was built from
fp16 weights. The recorded files hold the table alone, without the times in front of its messages.
"""

from pathlib import Path

import pytest

from mbq_export.backends._trt_layers import LayerTable, profile_shapes
from mbq_export.backends.base import EngineGraph, SizeRange, TensorSpec
from mbq_export.errors import BuildError

RECORDED = Path(__file__).parents[1] / "golden" / "trt_layers"


def table_of(name: str) -> LayerTable:
    return LayerTable.parse(lines_of(name))


def lines_of(name: str) -> list[str]:
    return (RECORDED / f"rtx_1.7.1_{name}.log").read_text().split("\n")


def test_every_row_of_the_log_is_read() -> None:
    lines = lines_of("packed")
    table = LayerTable.parse(lines)
    assert len(table.layers) == sum("LayerType:" in line for line in lines) > 5
    assert len(table.io) == sum("IOMode:" in line for line in lines) == 8


def test_row_holds_nodes_types_and_shapes() -> None:
    (row,) = table_of("packed").rows_of("layers.0.o_proj")
    assert row.type == "runtime_fusion"
    assert row.onnx == ("n.layers.0.o_proj.w", "layers.0.o_proj")
    assert [(each.type, each.dims) for each in row.inputs] == [("Half", (1, -1, 128))]
    assert [(each.type, each.dims) for each in row.constants] == [
        ("Int4", (1, 128, 128)),
        ("Half", (1, 2, 128)),
    ]
    assert [each.size for each in row.constants] == [128 * 128 // 2, 2 * 128 * 2]


def test_merged_projections_are_found_under_each_name() -> None:
    table = table_of("float")
    rows = [table.rows_of(f"layers.0.{role}_proj") for role in "qkv"]
    assert len(rows[0]) == 1
    assert rows[0] == rows[1] == rows[2]


def test_io_row_holds_the_profile() -> None:
    tensor = next(each for each in table_of("packed").io if each.name == "x")
    assert (tensor.mode, tensor.type) == ("Input", "Half")
    assert tensor.profile == ((1, 1, 128), (1, 1, 128), (1, 64, 128))


def test_node_names_are_split_with_and_without_a_separator() -> None:
    row = (
        "Name: a, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
        "Metadata: [ONNX Layer: one]{}[ONNX Layer: two]"
    )
    io = "Name: x, IOMode: Input, DataType: Half, Dimensions: [1,8]"
    for separator in ("", "\x1e", "\x1f"):
        table = LayerTable.parse([row.format(separator), io])
        assert table.layers[0].onnx == ("one", "two")


def test_row_of_a_second_stream_names_its_event() -> None:
    """As printed for a decoder of 24 layers."""
    line = (
        "Name: __mye205441_myl0_4, LayerType: signal, Inputs: [], Constants: [], Outputs: [], "
        "TacticName: , StreamId: 0, EventId: 1, Metadata:"
    )
    table = LayerTable.parse([line, *lines_of("packed")])
    assert (table.layers[0].type, table.layers[0].onnx) == ("signal", ())


def test_row_that_hands_over_a_size_has_another_form() -> None:
    """As printed for a decoder whose cache grows."""
    line = (
        "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: mask.past, "
        "Location: Device, Dimensions: [1], Datatype: Int64, Format: Format not available due to dynamic shapes }], "
        "ParameterType: ShapeH2D, shapeValues0: [-35], TacticValue: 0x0000000000000000, StreamId: 0, Metadata: "
    )
    row = LayerTable.parse([line, *lines_of("packed")]).layers[0]
    assert (row.type, row.tactic, row.onnx) == ("ShapeHostToDevice", "ShapeH2D", ())
    assert (row.inputs, row.constants) == ((), ())
    (size,) = row.outputs
    assert (size.name, size.type, size.dims, size.strides) == ("mask.past", "Int64", (1,), ())
    assert not size.by_rows, "nothing says so"
    with pytest.raises(BuildError, match="a row is written in an unknown way"):
        LayerTable.parse([line.replace(", ParameterType: ", ", Parameter: "), *lines_of("packed")])


def test_log_without_a_table_is_an_error_not_an_empty_table() -> None:
    with pytest.raises(
        BuildError, match=r"0 layers and 0 inputs .* in a log with 3 lines"
    ) as error:
        LayerTable.parse(["[TRT] [V] Layers:", "", "Engine generation completed"])
    assert error.value.code == "E6012"


def test_rows_without_the_io_table_are_an_error() -> None:
    rows = [line for line in lines_of("packed") if "IOMode:" not in line]
    with pytest.raises(BuildError, match=r"\d+ layers and 0 inputs and outputs recognised"):
        LayerTable.parse(rows)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (", TacticName: ", ", Tactic: ", "a row is written in an unknown way"),
        ("Datatype: Int4", "Datatype: Int3", "tensors are written in an unknown way"),
        ("Dimensions: [1,128,128]", "Shape: [1,128,128]", "tensors are written in an unknown way"),
        (
            "IOMode: Input, DataType",
            "IOMode: Input, Type",
            "an input or output is written in an unknown",
        ),
    ],
)
def test_changed_grammar_is_an_error(old: str, new: str, words: str) -> None:
    lines = [line.replace(old, new) for line in lines_of("packed")]
    assert lines != lines_of("packed")
    with pytest.raises(BuildError, match=words) as error:
        LayerTable.parse(lines)
    assert error.value.code == "E6012"


def test_json_form_is_what_readers_expect() -> None:
    entry = table_of("packed").as_json()
    assert set(entry) == {"layers", "io"}
    row = next(each for each in entry["layers"] if "layers.0.o_proj" in each["onnx"])
    assert row["const"][0][1:] == ["Int4", [1, 128, 128]]
    assert set(row) == {"name", "type", "onnx", "in", "const", "out", "tactic"}


def test_profile_replaces_every_symbol() -> None:
    spec = TensorSpec(name="pixel_values", dtype="float16", shape=("tiles", 3, 48, 48))
    tiles = {"tiles": SizeRange(smallest=1, typical=5, largest=10)}
    graph = EngineGraph(name="v", onnx=Path("v.onnx"), inputs=(spec,), outputs=(), sizes=tiles)
    assert profile_shapes(spec, graph) == ((1, 3, 48, 48), (5, 3, 48, 48), (10, 3, 48, 48))
