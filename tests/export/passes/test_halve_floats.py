"""Every float of a graph becomes fp16, or none does."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mbq_export.backends.ort import open_graph
from mbq_export.export.check import check_graph
from mbq_export.export.graph import INT64, Emitter
from mbq_export.export.passes.halve_floats import halve
from mbq_export.export.profile import OPSET23, PROFILES
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


@pytest.mark.parametrize(("opset", "inside"), [(20, "FLOAT"), (24, "BFLOAT16")])
def test_conv_stays_wide_where_its_opset_has_no_bfloat16(
    opset: int, inside: str, tmp_path: Path
) -> None:
    profile = next(each for each in PROFILES.values() if each.opset == opset)
    g = Emitter(profile=profile, dtype="fp32")
    x = g.input("x", ["n", 1, 2, 2])
    weight = g.numbers("w", np.full((1, 1, 2, 2), 1 + 2**-10, np.float32))
    y = g.op("Conv", [x, weight], g.value("y", ["n", 1, 1, 1]))
    model = g.model("one", [g.op("Neg", [y], g.value("z", ["n", 1, 1, 1]))])
    assert halve(model, ir.DataType.BFLOAT16) == []
    assert model.graph.initializers["w"].dtype == ir.DataType[inside]
    assert {each.dtype for each in (*model.graph.inputs, *model.graph.outputs)} == {
        ir.DataType.BFLOAT16
    }
    save_graph(model, tmp_path / "g.onnx")
    check_graph(tmp_path / "g.onnx")
