"""The validator as a whole: which file, which node, and that nothing runs before it."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from mbq_export.errors import FormatError, IncompatibleError, InternalError
from mbq_export.export.check import check_graph, check_written
from mbq_export.export.record import GraphRecord, Port
from tests.export.one_linear import edit, write_one


def test_refusal_names_file_and_node(tmp_path: Path) -> None:
    path = edit(write_one(tmp_path), lambda m: setattr(m.graph.node[0], "op_type", "W9Linear"))
    with pytest.raises(FormatError) as caught:
        check_graph(path)
    assert caught.value.where == ["one.onnx", "linear"]


def test_shapes_that_disagree_are_found_by_inference(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 63

    with pytest.raises(FormatError) as caught:
        check_graph(edit(write_one(tmp_path), change))
    assert caught.value.code == "E4407"
    assert "The checker of onnx refuses it" in caught.value.message


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = write_one(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 64)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            check_graph(path)


def test_flipped_bits_give_an_answer_or_an_error_of_ours(tmp_path: Path) -> None:
    path = write_one(tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.integers(0, 8 * len(whole), 150):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bytes(damaged))
        # A bit may turn the file into one for another layout version.
        with suppress(FormatError, IncompatibleError):
            check_graph(path)


def record(**changes: tuple[Port, ...]) -> GraphRecord:
    ports = {
        "inputs": (Port(name="x", dtype="float32", shape=(1, "rows", 128)),),
        "outputs": (Port(name="y", dtype="float32", shape=(1, "rows", 64)),),
        **changes,
    }
    return GraphRecord(
        name="one_linear",
        file="one.onnx",
        data=("one.onnx_data",),
        dtype="fp32",
        opset=23,
        nodes={},
        weight_bytes=0,
        sha256={},
        **ports,
    )


def test_written_graph_has_the_ports_of_its_record(tmp_path: Path) -> None:
    model = check_graph(write_one(tmp_path))
    check_written(model, record())
    with pytest.raises(InternalError, match="The outputs of one_linear are not logits"):
        check_written(model, record(outputs=(Port(name="logits", dtype="float32", shape=(1,)),)))


def test_written_graph_has_a_type_for_every_value(tmp_path: Path) -> None:
    model = check_graph(write_one(tmp_path))
    model.graph.node.append(helper.make_node("Identity", ["x"], ["untyped"]))
    with pytest.raises(InternalError, match="Value 'untyped' of one_linear has no type"):
        check_written(model, record())
