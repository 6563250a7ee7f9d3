"""Engines of the sample model: both graphs, for three kinds of RTX card, from what the exporter writes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from mbq_export.backends import rtx
from mbq_export.backends.base import EngineRecord
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.errors import GateError
from mbq_export.export import ExportRecord, export
from mbq_export.pipeline.engine_dtype import chosen_dtype
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.engines import build_engines, engine_facts
from mbq_export.pipeline.plan import Plan, make_plan
from mbq_export.pipeline.request import BuildRequest
from mbq_export.pipeline.stages import graph_forms
from mbq_export.progress import silent
from mbq_export.quantize import quantize
from tests.questions import sample_model
from tests.tiny import SAMPLE_WEIGHTS

pytestmark = [pytest.mark.trt, pytest.mark.slow, pytest.mark.timeout(600)]

TARGETS = {"rtx4090:rtx": "sm89", "sm86:rtx": "sm86", "sm120:rtx": "sm120"}
LINEARS = 20
"""Quantized nodes of the sample's decoder: five blocks with q|k|v, o, gate|up and down."""


@dataclass(frozen=True)
class Exported:
    """The sample model at 3 bits and its graphs for TensorRT."""

    plan: Plan
    onnx: Path
    record: ExportRecord


@pytest.fixture(scope="module")
def exported() -> Iterator[Exported]:
    with TemporaryDirectory() as root:
        yield export_rounded(Path(root), targets=tuple(TARGETS))


def export_rounded(root: Path, **changes: Any) -> Exported:
    """Round the sample model, 3 bits unless told otherwise, and write its standard operators for TensorRT."""
    fixed = {
        "model": str(SAMPLE_WEIGHTS),
        "out": root / "bundle",
        "method": "rtn",
        "data": "builtin:shapes",
        "samples": 2,
        "max_context": 512,
        "lowering": "qdq",
    }
    plan = make_plan(BuildRequest(**{**fixed, **changes}))
    rounded = ChannelScales(
        scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
    )
    checkpoint = quantize(
        sample_model(),
        rounded,
        scheme=plan.scheme,
        group_size=plan.group_size,
        out=root / "weights",
        mixed=plan.request.mixed,
    )
    dtype = chosen_dtype(plan, sample_model()).name
    forms = tuple(form for form in graph_forms(plan, dtype) if form.target == "trt")
    onnx = root / "onnx"
    return Exported(plan, onnx, export(checkpoint, onnx, family=plan.family, forms=forms))


@pytest.fixture(scope="module")
def built(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``engines`` folder."""
    folder = tmp_path_factory.mktemp("built")
    records = make(exported, folder)
    assert list(records) == list(TARGETS)
    return folder / "engines"


def make(exported: Exported, folder: Path) -> dict[str, EngineRecord]:
    (folder / "engines").mkdir()
    return build_engines(
        exported.plan,
        exported.record,
        onnx=exported.onnx,
        out=folder / "engines",
        logs=folder / "logs",
        progress=silent,
    )


def test_every_device_gets_both_engines_with_every_check_passed(built: Path) -> None:
    facts = engine_facts(built)
    library = f"rtx-{rtx.available().version}"
    assert {each["folder"] for each in facts} == {f"{library}/{sm}" for sm in TARGETS.values()}
    for device in facts:
        assert (device["verified"], set(device["engines"])) == (False, {"decoder", "vision"})
        for name, engine in device["engines"].items():
            failed = [check["name"] for check in engine["checks"] if not check["pass"]]
            assert failed == [], (device["folder"], name)
            assert (built / device["folder"] / f"{name}.engine").stat().st_size == engine["bytes"]


def test_decoder_multiplies_from_4_bit_constants(built: Path) -> None:
    for path in sorted(built.rglob("layers.json")):
        rows = json.loads(path.read_text())["engines"]["decoder"]["layers"]
        packed = [row for row in rows if any(each[1] == "Int4" for each in row["const"])]
        nodes = {node for row in packed for node in row["onnx"] if node.endswith("_proj")}
        assert len(nodes) == LINEARS
        assert all(row["type"] == "runtime_fusion" for row in packed)


def test_second_build_is_byte_identical(exported: Exported, built: Path, tmp_path: Path) -> None:
    again = replace(exported, plan=replace(exported.plan, targets=exported.plan.targets[:1]))
    make(again, tmp_path)
    files = [path for path in sorted((tmp_path / "engines").rglob("*")) if path.is_file()]
    assert len(files) == 4
    for path in files:
        first = built / path.relative_to(tmp_path / "engines")
        assert path.read_bytes() == first.read_bytes(), path.name


def test_linear_that_is_not_packed_stops_the_build(exported: Exported, tmp_path: Path) -> None:
    """The head is fp16; a record that calls it quantized must not pass as an engine of that record."""
    graphs = tuple(
        replace(
            graph,
            linears=tuple(replace(each, scheme="w3a16", group_size=128) for each in graph.linears),
        )
        for graph in exported.record.graphs
    )
    wrong = replace(
        exported,
        record=replace(exported.record, graphs=graphs),
        plan=replace(exported.plan, targets=exported.plan.targets[:1]),
    )
    with pytest.raises(GateError, match=r"the first is engine\.A2") as error:
        make(wrong, tmp_path)
    assert error.value.code == "E1108"
    assert "no Int4 constant: lm_head" in error.value.why


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounded_activations_become_integer_products(tmp_path: Path, dtype: str) -> None:
    exported = export_rounded(
        tmp_path, targets=("rtx4090:rtx",), scheme="w4a8", engines=EngineOptions(dtype=dtype)
    )
    (record,) = make(exported, tmp_path).values()
    checks = {check.name: check.ok for check in record.engines["decoder"].checks}
    assert checks["engine.A4"] is True
    assert all(checks.values()), checks
    (path,) = (tmp_path / "engines").rglob("layers.json")
    rows = json.loads(path.read_text())["engines"]["decoder"]["layers"]
    products = [row for row in rows if [each[1] for each in row["in"]] == ["Int8", "Int8"]]
    assert len(products) == LINEARS
    assert {row["out"][0][1] for row in products} == {"Float"}
