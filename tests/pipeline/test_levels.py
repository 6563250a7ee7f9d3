"""Operators and cache of the decoder for engines, by what the targets read, and engines from such graphs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.backends import BACKENDS, rtx
from mbq_export.backends.base import Availability, Backend, EngineGraph, EngineRequest
from mbq_export.errors import UsageError
from mbq_export.export import ExportRecord, GraphForm, export
from mbq_export.export.profile import profile_for
from mbq_export.native import LocalGpu
from mbq_export.pipeline import request as request_module
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.engines import engine_graph
from mbq_export.pipeline.levels import Level, engine_level, growing_sizes
from mbq_export.pipeline.plan import Plan, make_plan
from mbq_export.pipeline.request import BuildRequest
from mbq_export.pipeline.stages import graph_forms
from mbq_export.progress import silent
from mbq_export.target import Target
from tests.backends import plugin_graphs
from tests.export import decoders

ORIN = Target.parse("orin:trt")
CARD = Target.parse("rtx4090:rtx")
QDQ = GraphForm(lowering="qdq", target="trt", dtype="fp16")


@pytest.mark.parametrize(
    ("version", "level", "profile"),
    [
        ((10, 3), Level(op_level="opset20", kv="concat"), "opset21"),
        ((10, 13), Level(op_level="opset20", kv="concat"), "opset21"),
        ((10, 14), Level(op_level="opset23-attention", kv="concat"), "opset23-attention"),
        ((10, 15), Level(op_level="auto", kv="static"), "opset24"),
        ((11, 4), Level(op_level="auto", kv="static"), "opset24"),
    ],
)
def test_each_version_gets_the_most_that_it_reads(
    version: tuple[int, int], level: Level, profile: str
) -> None:
    target = replace(ORIN, version=version)
    assert engine_level("auto", None, targets=[target]) == level
    found = profile_for(replace(QDQ, op_level=level.op_level, kv=level.kv))
    assert (found.name, found.level) == (profile, target.op_level)


def test_one_graph_serves_the_oldest_of_several_targets() -> None:
    level = engine_level("auto", None, targets=[CARD, ORIN])
    assert level == Level(op_level="opset20", kv="concat")


def test_without_targets_graphs_are_for_the_newest_or_as_asked_for() -> None:
    assert engine_level("auto", None, targets=[]) == Level(op_level="auto", kv="static")
    assert engine_level("opset20", None, targets=[]) == Level(op_level="opset20", kv="concat")


def test_a_lower_level_and_the_other_cache_can_be_asked_for() -> None:
    assert engine_level("auto", "concat", targets=[CARD]) == Level(op_level="auto", kv="concat")
    assert engine_level("opset20", None, targets=[CARD]).op_level == "opset20"


def test_a_cache_of_8_bits_is_refused_with_what_tells_its_cost() -> None:
    with pytest.raises(UsageError, match="No graph here has a cache of 8 bits") as caught:
        engine_level("auto", "int8", targets=[CARD])
    assert caught.value.code == "E2006"
    assert "validate BUNDLE --kv-bits 8" in caught.value.fix[0]


def test_a_level_above_the_targets_is_refused_with_what_they_read() -> None:
    with pytest.raises(UsageError) as caught:
        engine_level("opset23", None, targets=[CARD, ORIN])
    assert str(caught.value) == (
        "MBQ-E2012: orin:trt does not read op level opset23.\n"
        "  why     version 10.3 of its parser reads up to opset21\n"
        "  fix     --op-level auto"
    )


@pytest.mark.parametrize(
    ("op_level", "kv", "code", "words"),
    [
        ("opset19", None, "E2001", "Unknown op level 'opset19'"),
        ("auto", "paged", "E2001", "Unknown kv 'paged'"),
        ("auto", "static", "E2002", "Op level opset20 has no static cache"),
        ("opset20", "static", "E2002", "Op level opset20 has no static cache"),
    ],
)
def test_what_does_not_exist_is_refused(
    op_level: str, kv: str | None, code: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        engine_level(op_level, kv, targets=[ORIN])
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("target", "kv", "lowering", "told"),
    [
        (CARD, None, "plugin", "opset24 (TensorRT 10.15 and newer), static cache"),
        (CARD, "concat", "qdq", "opset23 (TensorRT 10.15 and newer), concat cache"),
        (ORIN, None, "plugin", "opset20 (TensorRT 10.3 and newer), concat cache"),
        (ORIN, None, "qdq", "opset21 (TensorRT 10.3 and newer), concat cache"),
    ],
)
def test_level_is_told_by_its_profile_and_cache(
    target: Target, kv: str | None, lowering: str, told: str
) -> None:
    assert engine_level("auto", kv, targets=[target]).told(lowering, packed=True) == told


def test_sizes_of_a_growing_cache_add_up_at_every_end() -> None:
    sizes = growing_sizes(EngineOptions(opt_tokens=2).decoder_sizes(1000), 1000)
    new, past = sizes["sequence_length"], sizes["past_sequence_length"]
    total = sizes["total_sequence_length"]
    assert (past.smallest, past.typical, past.largest) == (1, 500, 1000)
    assert (total.smallest, total.typical, total.largest) == (2, 502, 1512)
    for end in ("smallest", "typical", "largest"):
        assert getattr(total, end) == getattr(new, end) + getattr(past, end)
    small = growing_sizes(EngineOptions().decoder_sizes(1), 1)["past_sequence_length"]
    assert (small.smallest, small.typical, small.largest) == (1, 1, 1)


class Installed:
    """The registry of backends on a device with some version of TensorRT."""

    def __init__(self, version: str) -> None:
        self.version = version

    def __getitem__(self, flavour: str) -> Backend:
        told = Availability(ok=True, found=f"trt {self.version}", needed="", version=self.version)
        return replace(BACKENDS[flavour], available=lambda: told)


def planned(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str, **options: object) -> Plan:
    """Plan a build on an Orin."""
    gpu = LocalGpu(name="Orin", sm=87, driver="540.4")
    monkeypatch.setattr(request_module, "BACKENDS", Installed(version))
    monkeypatch.setattr(request_module, "local_gpu", lambda: gpu)
    fixed = {"model": "tiny-llava-ov", "out": folder / "out", "samples": 4, "lowering": "qdq"}
    return make_plan(BuildRequest(targets=("orin:trt",), **{**fixed, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "op_level", "kv"),
    [
        ("10.3.0.26", "opset20", "concat"),
        ("10.13.3.9", "opset20", "concat"),
        ("10.14.1.48", "opset23-attention", "concat"),
        ("10.15.1.29", "auto", "static"),
    ],
)
def test_plan_on_a_device_follows_the_version_that_is_installed(
    version: str, op_level: str, kv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(monkeypatch, tmp_path, version)
    form = graph_forms(plan)[-1]
    assert (form.target, form.op_level, form.kv) == ("trt", op_level, kv)
    assert plan.fingerprint["graphs"]["op_level"] == op_level  # type: ignore[index]
    assert plan.fingerprint["graphs"]["kv"] == kv  # type: ignore[index]


def test_plan_refuses_a_level_that_the_device_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="does not read op level opset24") as caught:
        planned(monkeypatch, tmp_path, "10.3.0.26", op_level="opset24")
    assert caught.value.code == "E2012"


def test_plan_refuses_a_version_older_than_any_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as caught:
        planned(monkeypatch, tmp_path, "8.6.2")
    assert str(caught.value) == (
        "MBQ-E2012: trt 8.6.2 reads no graph that this release writes for orin:trt.\n"
        "  why     graphs are written for version 10.3 and newer\n"
        "  fix     install version 10.3 or newer\n"
        "  fix     --target cpu: the bundle runs on ONNX Runtime"
    )


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


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", ATTENTION_LAYERS, ids=str)
def test_engines_hold_what_the_level_promises(version: tuple[int, int], tmp_path: Path) -> None:
    """TensorRT for RTX stands in for 10.3 and 10.14: it shows that the graphs parse and compile with every plugin in
    place. What the parser of 10.3 itself makes of them nobody has seen.
    """
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
