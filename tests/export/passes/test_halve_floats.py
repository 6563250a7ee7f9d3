"""Every float of a graph becomes fp16, or none does."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from mbq_export.backends.ort import open_graph
from mbq_export.export.graph import INT64, Emitter
from mbq_export.export.passes.halve_floats import halve
from mbq_export.export.profile import OPSET23
from mbq_export.export.save import save_graph


def scaled(*, cast: bool = False) -> ir.Model:
    """``y = x * w`` and the shape of x, which is no float."""
    g = Emitter(profile=OPSET23, dtype="fp32")
    x = g.input("x", ["n", 2])
    weight = g.numbers("w", np.array([0.1, 3.0], np.float32))
    y = g.op("Mul", [x, weight], g.value("y", ["n", 2]))
    shape = g.op("Shape", [x], g.value("shape", [2], dtype=INT64))
    outputs = [y, shape]
    if cast:
        outputs.append(g.op("Cast", [x], g.value("z", ["n", 2]), to=ir.DataType.FLOAT))
    return g.model("scaled", outputs)


def test_floats_become_half_and_whole_numbers_stay(tmp_path: Path) -> None:
    model = scaled()
    assert halve(model) == []
    save_graph(model, tmp_path / "g.onnx")
    with open_graph(tmp_path / "g.onnx", threads=1) as engine:
        found = engine.run({"x": np.ones((3, 2), np.float16)})
    assert found["y"].dtype == np.float16
    np.testing.assert_array_equal(found["y"][0], np.array([0.1, 3.0], np.float16))
    np.testing.assert_array_equal(found["shape"], [3, 2])


def test_a_graph_that_casts_on_purpose_is_left_alone() -> None:
    model = scaled(cast=True)
    assert halve(model) == ["z chooses a type of its own"]
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT
