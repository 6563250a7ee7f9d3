"""The vision graph of a tower in 8 bits: integer products in every type, and the features of the oracle."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest

from mbq_export.backends.ort import open_graph
from mbq_export.backends.torch import fake_quant_model, vision_engine
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.evaluate.tolerances import PARITY_ROUNDED_FP16, PARITY_ROUNDED_FP32
from mbq_export.export import ExportRecord, GraphForm, export, vision
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.export.profile import traced_profile
from mbq_export.export.rounded_vision import packed
from mbq_export.export.save import save_graph
from mbq_export.quantize import quantize
from mbq_export.schemes import SCHEMES
from tests.export.decoders import FAMILY
from tests.export.one_linear import relative_error
from tests.quantize.seen import samples
from tests.questions import tiny_model

PLUGIN = GraphForm(
    lowering="plugin", target="trt", dtype="fp16", kv="static", logits="last", max_context=64
)
LINEARS = 6
"""Of the one layer of the tiny tower."""


@cache
def checkpoint() -> QuantCheckpoint:
    folder = TemporaryDirectory(prefix="tower-")
    _KEPT.append(folder)
    untouched = ChannelScales(
        scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
    )
    return quantize(
        tiny_model(),
        untouched,
        scheme=SCHEMES["w3a16"],
        group_size=64,
        out=Path(folder.name) / "c",
        samples=samples(tiny_model()),
        tower=SCHEMES["w8a8"],
    )


@cache
def exported() -> tuple[Path, ExportRecord]:
    folder = TemporaryDirectory(prefix="tower-")
    _KEPT.append(folder)
    out = Path(folder.name) / "onnx"
    return out, export(checkpoint(), out, family=FAMILY, forms=(GraphForm(), PLUGIN))


def features(path: Path, tiles: np.ndarray) -> np.ndarray:
    with open_graph(path, threads=1) as engine:
        kind = engine.inputs[0].dtype
        return engine.run({"pixel_values": tiles.astype(kind)})["image_features"]


def pixels() -> np.ndarray:
    return np.concatenate([each.pixel_values for each in samples(tiny_model()).held_out])


@pytest.mark.parametrize(
    ("file", "limit"),
    [
        ("vision_encoder.onnx", PARITY_ROUNDED_FP32.relative_error),
        ("vision_encoder_fp16.onnx", PARITY_ROUNDED_FP16.relative_error),
    ],
)
def test_features_are_those_of_the_oracle(file: str, limit: float) -> None:
    folder, _ = exported()
    tiles = pixels()
    wanted = vision_engine(fake_quant_model(checkpoint())).run({"pixel_values": tiles})
    found = features(folder / file, tiles)
    assert relative_error(found, wanted["image_features"]) <= limit


@pytest.mark.slow
def test_the_base_graph_computes_the_same(tmp_path: Path) -> None:
    """Operators of ours with their bodies, which is what lowering starts from."""
    traced = vision.vision_graph(checkpoint(), family=FAMILY, profile=traced_profile([]))
    graph = packed(traced, checkpoint())
    LOWERINGS["reference"].lower(graph, "ort")
    save_graph(graph, tmp_path / "base.onnx")
    wanted = vision_engine(fake_quant_model(checkpoint())).run({"pixel_values": pixels()})
    found = features(tmp_path / "base.onnx", pixels())
    limit = PARITY_ROUNDED_FP32.relative_error
    assert limit is not None
    assert relative_error(found, wanted["image_features"]) <= limit


@pytest.mark.parametrize("file", ["vision_encoder.onnx", "vision_encoder_fp16.onnx"])
def test_every_product_is_one_of_integers_and_the_rest_stays(file: str) -> None:
    folder, record = exported()
    model = onnx.load(folder / file)
    constants = {each.name: each for each in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    integers = []
    for node in model.graph.node:
        if node.op_type == "MatMul":
            weight = made.get(node.input[1])
            if weight is not None:
                assert weight.op_type == "DequantizeLinear"
                assert constants[weight.input[0]].data_type == onnx.TensorProto.INT8
                assert made[node.input[0]].op_type == "DequantizeLinear"
                integers.append(node.name)
            else:
                assert node.name.startswith("projector.")
    graph = record.graph(file)
    assert [each.node for each in graph.linears] == integers
    assert len(integers) == LINEARS
    assert {each.scheme for each in graph.linears} == {"w8a8"}
    assert [part.module for each in graph.linears for part in each.parts] == list(
        checkpoint().tower
    )
    assert {node.domain for node in model.graph.node} == {""}


def test_a_tower_of_codes_says_nothing_about_the_decoder_s_form() -> None:
    """No plugin multiplies w8a8, and none is asked to: those are the decoder's alone."""
    _, record = exported()
    assert record.graph(PLUGIN.file_name).plugin_layers.keys() == {"W3Linear"}


_KEPT: list[TemporaryDirectory[str]] = []
