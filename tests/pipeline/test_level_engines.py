"""Engines from graphs of the lower op levels: TensorRT for RTX reads them too, so it stands in for 10.3 and 10.14 here.

It shows that the graphs parse and compile with every plugin in place. What the parser of 10.3 itself makes of them
nobody has seen.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.backends import rtx
from mbq_export.backends.base import EngineGraph, EngineRequest
from mbq_export.export import ExportRecord, GraphForm, export
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.engines import engine_graph
from mbq_export.pipeline.levels import engine_level, growing_sizes
from mbq_export.progress import silent
from mbq_export.target import Target
from tests.backends import plugin_graphs
from tests.export import decoders

pytestmark = [pytest.mark.trt, pytest.mark.slow, pytest.mark.timeout(300)]

CONTEXT = 256
ATTENTION_LAYERS = {(10, 3): 0, (10, 14): 2}
"""Fused attention that an engine must have, by the version that its graphs are for."""
PLANNED = {"W3Linear": 8}
"""Two blocks of q|k|v, o, gate|up and down."""


def graphs_of(record: ExportRecord, onnx: Path, lowering: str) -> tuple[EngineGraph, ...]:
    options = EngineOptions(max_tiles=3)
    sizes = growing_sizes(options.decoder_sizes(CONTEXT), CONTEXT)
    found = []
    for graph in record.graphs:
        if graph.form is not None and graph.form.lowering == lowering:
            found.append(engine_graph("decoder", graph, onnx, sizes))
        elif graph.name == "vision_encoder" and lowering == "plugin":
            tiles = options.vision_sizes(str(graph.inputs[0].shape[0]))
            found.append(engine_graph("vision", graph, onnx, tiles))
    return tuple(found)


@pytest.mark.parametrize("version", ATTENTION_LAYERS, ids=str)
def test_engines_hold_what_the_level_promises(version: tuple[int, int], tmp_path: Path) -> None:
    level = engine_level("auto", None, targets=[replace(Target.parse("orin"), version=version)])
    plugin = GraphForm(
        lowering="plugin",
        target="trt",
        dtype="fp16",
        kv=level.kv,
        op_level=level.op_level,
        logits="last",
        max_context=CONTEXT,
    )
    forms = plugin, replace(plugin, lowering="qdq")
    onnx = tmp_path / "onnx"
    source = decoders.checkpoint("w3a16", 64)
    record = export(source, onnx, family=decoders.FAMILY, forms=forms)
    for lowering in ("plugin", "qdq"):
        request = EngineRequest(
            graphs=graphs_of(record, onnx, lowering),
            target=Target.parse("rtx4090:rtx"),
            out=tmp_path / lowering,
            plugins=plugin_graphs.emulated(),
        )
        built = rtx.build(request, silent)
        assert [(check.name, check.why) for check in built.failed] == []
        entry = json.loads((tmp_path / lowering / "engine.json").read_text())["engines"]["decoder"]
        assert (entry["kv"], entry["lowering"]) == ("concat", lowering)
        assert entry["op_level"] == (
            "opset21" if (level.op_level, lowering) == ("opset20", "qdq") else level.op_level
        )
        wanted = PLANNED if lowering == "plugin" else {}
        assert entry["plugin_layers_expected"] == entry["plugin_layers_found"] == wanted
        attention = [each for each in entry["checks"] if each["name"] == "engine.A6.attention"]
        assert [each["value"] for each in attention] == [2] * (ATTENTION_LAYERS[version] // 2)
        assert entry["profiles"][0]["past_key_values.0.key"] == [
            [1, 2, 1, 32], [1, 2, 128, 32], [1, 2, 256, 32],
        ]  # fmt: skip
        assert entry["profiles"][0]["attention_mask"] == [[1, 2], [1, 129], [1, 512]]
