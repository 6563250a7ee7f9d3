"""The emitter: names, order of constants, and what it refuses."""

import numpy as np
import onnx_ir as ir
import pytest

from mbq_export.errors import InternalError
from mbq_export.export.graph import (
    Emitter,
    add_constant,
    columns_of,
    packed_node,
    packed_source,
    settle_constants,
)
from mbq_export.export.profile import OPSET23
from tests.export.one_linear import random_packed, source_of


@pytest.fixture
def g() -> Emitter:
    return Emitter(profile=OPSET23, dtype="fp16")


def test_values_have_the_graphs_dtype_unless_told_otherwise(g: Emitter) -> None:
    assert g.input("x", [1, "n"]).dtype == ir.DataType.FLOAT16
    assert g.value("ids", [1], dtype=ir.DataType.INT64).dtype == ir.DataType.INT64


def test_node_is_named_after_its_output(g: Emitter) -> None:
    x = g.input("x", [2])
    y = g.op("Sigmoid", [x], g.value("gate.out", [2]))
    producer = y.producer()
    assert producer is not None
    assert (producer.name, y.name) == ("gate", "gate.out")


def test_constant_of_one_name_exists_once(g: Emitter) -> None:
    assert g.numbers("axes", [0, 1]) is g.numbers("axes", [0, 1])


def test_two_nodes_of_one_name_are_a_bug_of_ours(g: Emitter) -> None:
    x = g.input("x", [2])
    outputs = [g.op("Sigmoid", [x], g.value(f"y{i}", [2]), name="same") for i in range(2)]
    with pytest.raises(InternalError, match="Two nodes of graph are named same"):
        g.model("graph", outputs)


def test_model_says_who_made_it_and_imports_what_it_uses(g: Emitter) -> None:
    weight = source_of(random_packed(np.random.default_rng(0), n=16, k=32, bits=3, group_size=32))
    x, out = g.input("x", [1, 1, 32]), g.value("y", [1, 1, 16])
    g.append(packed_node(g.constant, x, name="linear", source=weight, out=out))
    model = g.model("graph", [out])
    assert (model.producer_name, model.ir_version) == ("mbq-export", 11)
    assert dict(model.opset_imports) == {"": 23, "mbq": 1}
    assert packed_source(model.graph[0]) is weight


def test_packed_node_describes_its_weight(g: Emitter) -> None:
    weight = source_of(random_packed(np.random.default_rng(0), n=16, k=64, bits=4, group_size=32))
    x, out = g.input("x", [1, 1, 64]), g.value("y", [1, 1, 16])
    node = packed_node(g.constant, x, name="linear", source=weight, out=out)
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    assert found == {
        "N": 16,
        "K": 64,
        "group_size": 32,
        "bits": 4,
        "signed_codes": 0,
        "layout_version": 1,
        "layout": "dense",
        "plugin_namespace": "mbq",
        "plugin_version": "1",
    }
    assert [str(value.name) for value in node.inputs if value is not None][1:] == [
        "linear.qweight",
        "linear.scales",
        "linear.zeros",
    ]


def test_settling_drops_what_nothing_reads_and_orders_by_first_use(g: Emitter) -> None:
    x = g.input("x", [2])
    later = g.numbers("later", np.ones(2, np.float16))
    first = g.numbers("first", np.ones(2, np.float16))
    middle = g.op("Add", [x, first], g.value("middle.out", [2]))
    model = g.model("graph", [g.op("Mul", [middle, later], g.value("y", [2]))])
    add_constant(model.graph, ir.Tensor(np.ones(2), name="unread"))
    settle_constants(model.graph)
    assert list(model.graph.initializers) == ["first", "later"]


def test_columns_are_the_last_axis(g: Emitter) -> None:
    assert columns_of(g.input("x", ["batch", 7])) == 7
