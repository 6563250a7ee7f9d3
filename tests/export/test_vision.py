"""The traced tower against the torch tower, for numbers of tiles that the trace did not see."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mbq_export.backends.ort import open_graph
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError
from mbq_export.evaluate.tolerances import BLOCK_FP16, BLOCK_FP32
from mbq_export.export.check import check_graph
from mbq_export.export.graph import Emitter
from mbq_export.export.parser_ops import read_by
from mbq_export.export.profile import OPSET20, OPSET23, OpProfile
from mbq_export.export.record import DTYPES
from mbq_export.export.save import save_graph
from mbq_export.export.vision import halved, vision_graph
from mbq_export.schemes.base import PackedWeight
from tests.export import decoders
from tests.export.one_linear import relative_error


@pytest.fixture(scope="module", params=[OPSET20, OPSET23], ids=lambda level: level.name)
def level(request: pytest.FixtureRequest) -> OpProfile:
    found: OpProfile = request.param
    return found


@pytest.fixture(scope="module")
def graphs(level: OpProfile) -> Iterator[dict[str, Path]]:
    """One trace, saved in every dtype; no packed linear may be read for it."""
    checkpoint = decoders.checkpoint()

    def fail(*_: object) -> PackedWeight:
        raise AssertionError("a packed linear was read")

    with TemporaryDirectory() as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QuantCheckpoint, "packed", fail)
            traced = vision_graph(checkpoint, family=decoders.FAMILY, profile=level)
        paths = {dtype: Path(folder) / f"{dtype}.onnx" for dtype in DTYPES}
        save_graph(traced, paths["fp32"])
        for dtype in ("fp16", "bf16"):
            save_graph(halved(traced, dtype), paths[dtype])
        yield paths


@pytest.mark.parametrize("tiles", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", BLOCK_FP32), ("fp16", BLOCK_FP16)])
def test_features_are_those_of_torch(
    tiles: int, dtype: str, limit: float, graphs: dict[str, Path]
) -> None:
    model = decoders.oracle()
    pixels = torch.randn(tiles, 3, 48, 48, generator=torch.Generator().manual_seed(tiles))
    with torch.no_grad():
        wanted = model.family.vision_module(model)(pixels).numpy()
    with open_graph(graphs[dtype], threads=1) as engine:
        (port,) = engine.inputs
        found = engine.run({port.name: pixels.numpy().astype(port.dtype)})["image_features"]
    assert found.shape == wanted.shape == (tiles, 36, 128)
    assert relative_error(found, wanted) <= limit


def test_bfloat16_is_rounded_once_and_from_fp32(graphs: dict[str, Path]) -> None:
    """Not from what fp16 left over: the copies share no constants."""
    wide, narrow = (
        {each.name: each for each in onnx.load(graphs[dtype]).graph.initializer}
        for dtype in ("fp32", "bf16")
    )
    name = next(name for name in wide if name.endswith("q_proj.MatMul.weight"))
    rounded = onnx.numpy_helper.to_array(wide[name]).astype(ml_dtypes.bfloat16)
    assert narrow[name].data_type == onnx.TensorProto.BFLOAT16
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(narrow[name]), rounded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_passes_the_validator_and_tells_no_place(dtype: str, graphs: dict[str, Path]) -> None:
    check_graph(graphs[dtype])
    content = graphs[dtype].read_bytes()
    assert b"stack_trace" not in content
    assert b"site-packages" not in content


def test_attention_is_one_node_per_layer_where_the_level_has_it(
    level: OpProfile, graphs: dict[str, Path]
) -> None:
    graph = onnx.load(graphs["fp32"], load_external_data=False).graph
    assert sum(node.op_type == "Attention" for node in graph.node) == level.level // 2


def test_tower_of_the_lowest_level_has_operators_that_the_oldest_parser_documents(
    level: OpProfile, graphs: dict[str, Path]
) -> None:
    graph = onnx.load(graphs["fp16"], load_external_data=False)
    assert graph.opset_import[0].version == level.opset
    assert {node.op_type for node in graph.graph.node} <= read_by(level.first)


def test_nodes_say_which_module_they_belong_to(graphs: dict[str, Path]) -> None:
    graph = onnx.load(graphs["fp32"], load_external_data=False).graph
    names = {node.name for node in graph.node}
    assert {"layers.0.self_attn.q_proj.MatMul", "projector.linear_2.Add"} <= names


def test_a_tower_of_mixed_precision_is_not_halved() -> None:
    g = Emitter(profile=OPSET23, dtype="fp32")
    x = g.input("x", [2])
    cast = g.op("Cast", [x], g.value("y", [2]), to=ir.DataType.FLOAT)
    with pytest.raises(FormatError, match="cannot be written in fp16: y chooses a type of its own"):
        halved(g.model("mixed", [cast]), "fp16")
