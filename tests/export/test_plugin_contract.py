"""Graphs that would make an engine slow, wrong or impossible are refused before any builder sees them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mbq_export.errors import FormatError, IncompatibleError
from mbq_export.export import functions, ops
from mbq_export.export.check import Limits, check_graph
from mbq_export.export.graph import Emitter, packed_node
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.export.profile import OPSET23
from mbq_export.export.save import save_graph
from mbq_export.export.weights import plain_tensor
from tests.export.one_linear import (
    edit,
    one_node,
    random_packed,
    random_symmetric,
    source_of,
    write_one,
)
from tests.export.test_contract import attribute, drop, overwrite, refusal

TRT = Limits(target="trt")
Change = Callable[[onnx.ModelProto], object]


def plugin(folder: Path) -> Path:
    """A sound plugin graph of 64 x 128 3-bit codes in groups of 32."""
    return write_one(folder, lowering="plugin")


def one_more_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("tactic", 1))


def with_body(model: onnx.ModelProto) -> None:
    model.functions.append(functions.body(ops.OPS["w3a16"], opset=23))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_body, "W3Linear is a plugin, but the file holds a body of W3Linear."),
        (drop("plugin_namespace"), "['plugin_namespace'] missing, none unknown."),
        (drop("plugin_version"), "['plugin_version'] missing, none unknown."),
        (drop("act_bits"), "['act_bits'] missing, none unknown."),
        (one_more_attribute, "none missing, ['tactic'] unknown."),
        (lambda m: m.graph.node[0].input.pop(), "W3Linear has 3 inputs and 1 outputs."),
        (lambda m: setattr(attribute(m, "has_bias"), "i", 1), "W3Linear has 4 inputs and 1 outputs."),
        (lambda m: setattr(attribute(m, "N"), "type", onnx.AttributeProto.FLOAT), "Attribute N of W3Linear is of another type."),
    ],
)  # fmt: skip
def test_a_node_that_a_parser_would_resolve_otherwise_is_refused(
    change: Change, message: str, tmp_path: Path
) -> None:
    assert message in refusal(edit(plugin(tmp_path), change), "E4408", TRT).message


def test_a_body_is_refused_even_of_an_operator_that_is_no_plugin_here(tmp_path: Path) -> None:
    """Reference and plugin nodes in one file would need a parser that knows which is which."""

    def change(model: onnx.ModelProto) -> None:
        model.functions.append(functions.body(ops.OPS["w4a16"], opset=23))

    message = refusal(edit(plugin(tmp_path), change), "E4408", TRT).message
    assert message == "W3Linear is a plugin, but the file holds a body of W4A16Linear."


def test_a_plugin_node_without_any_attribute_of_its_form_has_no_body(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        for name in ops.PLUGIN_INT_ATTRIBUTES:
            drop(name)(model)

    assert refusal(edit(plugin(tmp_path), change), "E4408", TRT).message.startswith(
        "Operator W3Linear has no body"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("N", 80, "Linear.qweight_tiles is INT32 [4, 1, 192], N, K and group_size ask for INT32 [5, 1, 192]."),
        ("K", 256, "Linear.qweight_tiles is INT32 [4, 1, 192], N, K and group_size ask for INT32 [4, 2, 192]."),
        ("K", 96, "Linear.scales_tiles has scales beyond row 64 or column 96."),
        ("N", 63, "Linear.scales_tiles has scales beyond row 63 or column 128."),
        ("N", 0, "N is 0 and K is 128."),
        ("N", -16, "N is -16 and K is 128."),
        ("K", 100, "Groups of 32 do not divide K = 100."),
        ("group_size", 64, "Linear.scales_tiles is FLOAT16 [4, 4, 8, 2], N, K and group_size ask for FLOAT16 [4, 2, 8, 2]."),
        ("group_size", 0, "Group_size is 0."),
        ("group_size", 48, "Group_size is 48."),
        ("bits", 4, "Bits is 4, W3Linear has 3."),
        ("act_bits", 8, "Act_bits is 8, W3Linear has 16."),
        ("epilogue", 1, "Epilogue is 1."),
        ("row_order", 1, "Row_order is 1."),
    ],
)  # fmt: skip
def test_attributes_that_contradict_the_tiles_are_refused(
    name: str, value: int, message: str, tmp_path: Path
) -> None:
    path = edit(plugin(tmp_path), lambda m: setattr(attribute(m, name), "i", value))
    found = refusal(path, "E4409", TRT)
    assert found.message == message
    assert found.where == ["one.onnx", "linear"]


@pytest.mark.parametrize("value", [-1, 2])
def test_has_bias_is_a_yes_or_no(value: int, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        attribute(model, "has_bias").i = value
        node = model.graph.node[0]
        node.input.extend([node.input[2]] * value) if value > 0 else node.input.pop()

    assert refusal(edit(plugin(tmp_path), change), "E4409", TRT).message == f"Has_bias is {value}."


@pytest.mark.parametrize("layout", ["dense", "w4t"])
def test_words_of_another_layout_are_refused(layout: str, tmp_path: Path) -> None:
    path = edit(plugin(tmp_path), lambda m: setattr(attribute(m, "layout"), "s", layout.encode()))
    assert refusal(path, "E4409", TRT).message == f"Layout is '{layout}'."


@pytest.mark.parametrize(("name", "other"), [("plugin_namespace", b"nv"), ("plugin_version", b"2")])
def test_another_namespace_or_version_is_refused(name: str, other: bytes, tmp_path: Path) -> None:
    """TensorRT would not find the plugin, or find somebody else's."""
    path = edit(plugin(tmp_path), lambda m: setattr(attribute(m, name), "s", other))
    assert refusal(path, "E4409", TRT).message == f"P{name[1:]} is another."


def test_tiles_of_a_newer_version_name_the_version_that_is_known(tmp_path: Path) -> None:
    path = edit(plugin(tmp_path), lambda m: setattr(attribute(m, "layout_version"), "i", 2))
    with pytest.raises(IncompatibleError, match="Layout w3t version 2 is unknown here"):
        check_graph(path, TRT)


def test_words_of_a_type_that_tensorrt_widens_are_refused(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if "qweight" in each.name)
        tensor.data_type = TensorProto.UINT32

    assert "is UINT32" in refusal(edit(plugin(tmp_path), change), "E4410", TRT).message


def test_a_tile_tensor_that_is_computed_is_refused(tmp_path: Path) -> None:
    path = edit(plugin(tmp_path), lambda m: m.graph.node[0].input.__setitem__(1, "x"))
    assert refusal(path, "E4409", TRT).message == "X is no constant."


def test_activations_of_32_bits_are_refused(tmp_path: Path) -> None:
    weight = random_packed(np.random.default_rng(1), n=64, k=128, bits=3, group_size=32)
    path = tmp_path / "one.onnx"
    save_graph(one_node(weight, lowering="plugin", target="trt", dtype="fp32"), path)
    assert refusal(path, "E4409", TRT).message == "Y is FLOAT, not of 16 bits."


def test_a_bias_of_another_type_than_x_is_refused(tmp_path: Path) -> None:
    g = Emitter(profile=OPSET23, dtype="fp16")
    weight = random_packed(np.random.default_rng(2), n=16, k=128, bits=3, group_size=128)
    x, rows = g.input("x", [1, "rows", 128]), g.value("linear.rows", [1, "rows", 16])
    g.append(packed_node(g.constant, x, name="linear", source=source_of(weight), out=rows))
    bias = plain_tensor("bias", lambda: np.ones(16), shape=(16,), dtype=g.dtype)
    y = g.op("Add", [rows, g.constant(bias)], g.value("y", [1, "rows", 16]), name="linear.add_bias")
    model = g.model("biased", [y])
    LOWERINGS["plugin"].lower(model, "trt")
    path = tmp_path / "one.onnx"
    save_graph(model, path)
    check_graph(path, TRT)

    def change(model: onnx.ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if each.name == "bias")
        tensor.data_type = TensorProto.BFLOAT16

    message = refusal(edit(path, change), "E4409", TRT).message
    assert message.startswith("Bias is BFLOAT16 [16], N, K and group_size ask for FLOAT16 [16]")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -0.5])
def test_a_scale_that_is_no_positive_number_is_refused(bad: float, tmp_path: Path) -> None:
    path = overwrite(plugin(tmp_path), ".scales_tiles", np.array([0.5, bad], np.float16))
    message = refusal(path, "E4411", TRT).message
    assert message == (
        "linear.scales_tiles holds 1 scales that are not positive numbers, the first at (8, 0)."
    )


def test_a_zero_point_beyond_the_codes_is_refused(tmp_path: Path) -> None:
    """The second nibble of the first byte belongs to row 8."""
    path = tmp_path / "one.onnx"
    weight = random_packed(np.random.default_rng(3), n=1024, k=128, bits=3, group_size=128)
    save_graph(one_node(weight, lowering="plugin", target="trt", dtype="fp16"), path)
    overwrite(path, ".zeros_tiles", np.array([0x93], np.uint8))
    assert "holds the zero point 9 at" in refusal(path, "E4411", TRT).message


def test_scales_of_a_channel_beyond_the_last_row_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    weight = random_symmetric(np.random.default_rng(4), n=200, k=128)
    save_graph(one_node(weight, lowering="plugin", target="trt", dtype="fp16", scheme="w4a8"), path)
    check_graph(path, TRT)
    overwrite(path, ".scales_tiles", np.full(208, 0.5, np.float32))
    message = refusal(path, "E4409", TRT).message
    assert message == "Linear.scales_tiles has scales beyond row 200 or column 128."


def test_an_operator_without_a_plugin_in_that_form_is_refused(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "W8A16Linear"
        model.graph.node[0].input.pop()  # zero points, of which it has none
        model.metadata_props[0].value = '{"W8A16Linear":["linear"]}'

    path = edit(plugin(tmp_path), change)
    assert refusal(path, "E4409", TRT).message == "There is no plugin W8A16Linear."


@pytest.mark.parametrize(
    "value",
    [None, '{"W3Linear":["another"]}', '{"W3Linear":[]}', "{}", "not json", '{"W4A16Linear":["linear"]}'],
)  # fmt: skip
def test_metadata_that_names_other_plugins_is_refused(value: str | None, tmp_path: Path) -> None:
    """Whoever builds an engine counts by it: a plugin it does not name could go missing unseen."""

    def change(model: onnx.ModelProto) -> None:
        del model.metadata_props[:]
        if value is not None:
            model.metadata_props.add(key=ops.PLUGIN_LAYERS, value=value)

    error = refusal(edit(plugin(tmp_path), change), "E4409", TRT)
    assert error.message == "Metadata 'mbq.plugin_layers' does not name the 1 plugins of the graph."


def test_metadata_that_names_plugins_of_a_graph_without_any_is_refused(tmp_path: Path) -> None:
    path = edit(
        write_one(tmp_path),
        lambda m: m.metadata_props.add(key=ops.PLUGIN_LAYERS, value='{"W3Linear":["linear"]}'),
    )
    message = refusal(path, "E4409").message
    assert message == "Metadata 'mbq.plugin_layers' does not name the 0 plugins of the graph."


def test_the_error_says_how_to_mend_it(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        check_graph(edit(plugin(tmp_path), with_body), TRT)
    assert caught.value.fix == ("export the model again",)
