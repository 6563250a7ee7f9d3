"""A traced graph loses its counters and stack traces, and computes what it computed."""

import numpy as np
import onnx_ir as ir

from mbq_export.export.graph import Emitter
from mbq_export.export.passes.strip_metadata import SCOPES, strip
from mbq_export.export.profile import OPSET23


def traced() -> ir.Model:
    """What a tracer returns for a linear and two additions inside a block."""
    g = Emitter(profile=OPSET23, dtype="fp32")
    x = g.input("x", [2])
    folded = g.numbers("val_8", np.ones((2, 2), np.float32))
    bias = g.numbers("block.fc.bias", np.ones(2, np.float32))
    a = g.op("MatMul", [x, folded], g.value("val_9", [2]), name="node_MatMul_7")
    b = g.op("Add", [a, bias], g.value("linear", [2]), name="node_linear")
    c = g.op("Add", [b, x], g.value("add_1", [2]), name="node_add_1")
    d = g.op("Add", [c, x], g.value("y", [2]), name="node_add_2")
    model = g.model("traced", [d])
    scopes = (
        ["", "block", "block.fc", "linear"],
        ["", "block", "block.fc", "linear"],
        ["", "block", "add_1"],
        ["", "block", "add_2"],
    )
    for node, scope in zip(model.graph, scopes, strict=True):
        node.metadata_props.update({SCOPES: repr(scope), "pkg.torch.onnx.stack_trace": "/home/a"})
        node.doc_string = "words"
    model.graph.inputs[0].metadata_props["note"] = "words"
    return model


def test_nodes_and_values_are_named_after_their_module() -> None:
    model = traced()
    assert strip(model) == []
    assert [node.name for node in model.graph] == [
        "block.fc.MatMul",
        "block.fc.Add",
        "block.Add",
        "block.Add.2",
    ]
    assert [node.outputs[0].name for node in model.graph] == [
        "block.fc.MatMul.out",
        "block.fc.Add.out",
        "block.Add.out",
        "y",
    ]
    assert sorted(model.graph.initializers) == ["block.fc.MatMul.weight", "block.fc.bias"]


def test_nothing_of_the_tracers_notes_is_left() -> None:
    model = traced()
    strip(model)
    text = ir.to_proto(model).SerializeToString()
    for note in (b"/home/a", b"words", b"name_scopes"):
        assert note not in text


def test_a_node_that_no_module_made_keeps_its_operator_as_name() -> None:
    model = traced()
    for node in model.graph:
        node.metadata_props.clear()
    strip(model)
    assert [node.name for node in model.graph] == ["MatMul", "Add", "Add.2", "Add.3"]
