"""Files that are no graphs, and graphs that no runtime should see (FAULTS F067 to F070)."""

import gzip
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from mbq_export.errors import FormatError
from mbq_export.export import structure
from mbq_export.export.structure import load_proto
from tests.export.one_linear import edit, external, write_one

Change = Callable[[onnx.ModelProto], object]


def refusal(path: Path, code: str) -> str:
    with pytest.raises(FormatError) as caught:
        load_proto(path)
    assert caught.value.code == code
    return caught.value.message


def test_sound_graph_is_returned_without_its_constants(tmp_path: Path) -> None:
    model = load_proto(write_one(tmp_path))
    assert external(model, ".qweight").data_location == TensorProto.EXTERNAL


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html></html>", "it is a web page"),
        (b"\n  <html>", "it is a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "it is a download pointer of Git LFS",
        ),
        (b'{"error": "not found"}', "it is a JSON document"),
        (gzip.compress(b"x", mtime=0), "it is a gzip archive"),
        (b"\x80\x81\x82 random", "it is no ONNX file, or a truncated one"),
    ],
)
def test_what_is_no_graph_is_called_by_its_name(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    assert refusal(path, "E4404") == f"g.onnx is no ONNX graph: {what}."


def test_graph_without_nodes_is_refused(tmp_path: Path) -> None:
    path = edit(write_one(tmp_path), lambda model: model.graph.ClearField("node"))
    assert "it holds no operators and outputs" in refusal(path, "E4404")


def test_file_beyond_the_limit_of_the_format_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "LARGEST_FILE", 100)
    assert "a graph file cannot have more than 100" in refusal(write_one(tmp_path), "E4404")


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([2**31, 2**31], "would have 18,446,744,073,709,551,616 bytes with the sizes"),
        ([-64, 12], "has the sizes [-64, 12]"),
        ([1] * 1000, "has the sizes [1, 1,"),
    ],
)
def test_impossible_sizes_are_refused(dims: list[int], message: str, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        del external(model, ".qweight").dims[:]
        external(model, ".qweight").dims.extend(dims)

    assert message in refusal(edit(write_one(tmp_path), change), "E4405")


def test_inline_constant_of_another_size_is_refused(tmp_path: Path) -> None:
    for tensor in (
        TensorProto(name="c", data_type=TensorProto.INT64, dims=[3], raw_data=b"\0" * 8),
        TensorProto(name="c", data_type=TensorProto.INT64, dims=[3], int64_data=[1, 2]),
        TensorProto(name="c", data_type=TensorProto.INT4, dims=[3], int32_data=[1]),
    ):
        path = edit(write_one(tmp_path), lambda m, t=tensor: m.graph.initializer.append(t))  # type: ignore[misc]
        assert "Constant 'c' holds" in refusal(path, "E4405")


def test_unknown_element_type_is_refused(tmp_path: Path) -> None:
    path = edit(write_one(tmp_path), lambda m: setattr(external(m, ".scales"), "data_type", 99))
    assert refusal(path, "E4405") == "Constant 'linear.scales' has the element type 99."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.opset_import[0], "version", 27), "The graph is of opset 27."),
        (lambda m: setattr(m.opset_import[0], "version", 999), "The graph is of opset 999."),
        (lambda m: setattr(m, "ir_version", 99), "The file has IR version 99."),
        (
            lambda m: m.opset_import.append(helper.make_opsetid("", 24)),
            "Opset '' is imported twice.",
        ),
        (
            lambda m: setattr(m.functions[0].opset_import[0], "version", 17),
            "Function W3Linear imports opset 17 of '', the graph 23.",
        ),
    ],
)
def test_versions_outside_what_runtimes_read_are_refused(
    change: Change, message: str, tmp_path: Path
) -> None:
    assert refusal(edit(write_one(tmp_path), change), "E4406") == message


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["b"], ["a"], name="first"))
    model.graph.node.append(helper.make_node("Identity", ["a"], ["b"], name="second"))


def recursion(model: onnx.ModelProto) -> None:
    call = helper.make_node(
        "W3Linear", ["x", "qweight", "scales", "zeros"], ["again"], domain="mbq"
    )
    model.functions[0].node.append(call)


def branch(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, name="if"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cycle, "Node 'first' (Identity) reads 'b', which nothing before it computes."),
        (
            lambda m: m.graph.node.append(helper.make_node("Identity", ["x"], ["y"])),
            "Two values of the graph are named 'y'.",
        ),
        (
            lambda m: m.graph.node[0].input.__setitem__(0, "nowhere"),
            "Node 'linear' (W3Linear) reads 'nowhere', which nothing before it computes.",
        ),
        (
            lambda m: m.graph.input.append(m.graph.input[0]),
            "Two values of the graph are named 'x'.",
        ),
        (
            lambda m: setattr(m.graph.output[0], "name", "nothing"),
            "Nothing computes the output 'nothing' of the graph.",
        ),
        (recursion, "Function W3Linear calls function W3Linear."),
        (branch, "Node 'if' (If) holds a graph of its own."),
    ],
)
def test_names_and_order_are_checked(change: Change, message: str, tmp_path: Path) -> None:
    assert refusal(edit(write_one(tmp_path), change), "E4407") == message


def test_a_million_nodes_are_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "MOST_NODES", 3)
    assert "The graph has" in refusal(write_one(tmp_path), "E4407")
