"""The form of engines and the library it needs: found, refused, or replaced with the reason."""

import json
import logging
from pathlib import Path

import pytest

from mbq_export.errors import MbqError
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.engines import build_engines, engine_facts
from mbq_export.pipeline.plugins import EngineForm, engine_form, pack_library
from mbq_export.plugin_library import bundle_folder, find_plugin_library
from mbq_export.progress import silent
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_export.target import Target
from tests.backends import plugin_graphs
from tests.pipeline.test_engines import Exported, export_rounded

CARD = Target.parse("rtx4090:rtx")
OLD = Target.parse("sm80:rtx")


def form(
    asked: str,
    named: Path | None = None,
    *,
    scheme: str = "w3a16",
    group_size: int = 128,
    built: tuple[Target, ...] = (CARD,),
) -> EngineForm:
    return engine_form(
        asked,
        targets=(CARD,),
        scheme=SCHEMES[scheme],
        group_size=group_size,
        built=built,
        named=named,
    )


def refusal(asked: str, named: Path | None = None, **changes: object) -> MbqError:
    with pytest.raises(MbqError) as error:
        form(asked, named, **changes)
    return error.value


def test_auto_without_a_library_takes_standard_operators_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = form("auto")
    assert (found.lowering, found.library) == ("qdq", None)
    assert "no compiled plugin library" in found.reason
    assert "mbq-export plugins build --target sm89" in found.reason
    assert found.reason in caplog.text


def test_plugins_that_were_asked_for_are_not_replaced() -> None:
    error = refusal("plugin")
    assert (error.code, error.exit_status) == ("E3005", 3)


def test_format_without_another_form_is_not_replaced() -> None:
    assert refusal("auto", scheme="w4a8").code == "E3005"
    assert form("auto", scheme="w4a8", group_size=CHANNEL).lowering == "qdq"


def test_library_that_is_named_and_no_library_is_an_error_even_for_auto(tmp_path: Path) -> None:
    (tmp_path / "no.so").write_text("text")
    assert refusal("auto", tmp_path / "no.so").code == "E4701"
    assert refusal("auto", tmp_path / "missing.so").code == "E4701"


def test_no_library_is_searched_where_no_engine_is_built() -> None:
    assert form("plugin", built=()) == EngineForm(lowering="plugin")


def test_library_without_code_for_a_target_is_incompatible() -> None:
    error = refusal("plugin", plugin_graphs.emulated().path)
    assert (error.code, error.exit_status) == ("E7008", 7)


@pytest.mark.nvcc
@pytest.mark.slow
def test_named_library_serves_its_devices_and_no_older_ones() -> None:
    library = plugin_graphs.library()
    assert form("auto", library.path) == EngineForm(lowering="plugin", library=library)
    error = refusal("plugin", library.path, built=(OLD,))
    assert (error.code, error.exit_status) == ("E7008", 7)
    assert "sm80" in error.message


def test_packed_library_is_found_in_the_bundle(tmp_path: Path) -> None:
    library = plugin_graphs.emulated()
    folder = pack_library(library, tmp_path)
    assert folder == tmp_path / bundle_folder()
    found = find_plugin_library(bundle=tmp_path, sha256=library.sha256)
    assert (found.found, found.sha256) == ("bundle", library.sha256)
    record = json.loads((folder / "plugin.json").read_text())
    assert record["abi"] == library.abi
    assert str(tmp_path) not in (folder / "plugin.json").read_text()


def test_library_that_was_exchanged_in_the_bundle_is_refused(tmp_path: Path) -> None:
    folder = pack_library(plugin_graphs.emulated(), tmp_path)
    with (folder / "libmbq_trt_plugins.so").open("ab") as file:
        file.write(b"x")
    with pytest.raises(MbqError) as error:
        find_plugin_library(bundle=tmp_path)
    assert error.value.code == "E4602"


TARGETS = ("sm86:rtx", "rtx4090:rtx", "sm120:rtx")
PLANNED = {"w3a16": {"W3Linear": 20}, "w4a16": {"W4A16Linear": 20}, "w4a8": {"W4A8Linear": 20}}
"""Plugin layers of the sample's decoder: five blocks with q|k|v, o, gate|up and down."""


def built(exported: Exported, folder: Path) -> Path:
    (folder / "engines").mkdir(parents=True)
    build_engines(
        exported.plan,
        exported.record,
        onnx=exported.onnx,
        out=folder / "engines",
        logs=folder / "logs",
        progress=silent,
    )
    return folder / "engines"


@pytest.mark.trt
@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", PLANNED)
def test_sample_gets_every_planned_plugin_on_every_device_twice_the_same(
    scheme: str, tmp_path: Path
) -> None:
    options = EngineOptions(plugin_lib=plugin_graphs.library().path)
    exported = export_rounded(
        tmp_path, scheme=scheme, lowering="plugin", targets=TARGETS, engines=options
    )
    first, second = (built(exported, tmp_path / name) for name in ("one", "two"))
    facts = engine_facts(first)
    assert sorted(each["sm"] for each in facts) == [["sm120"], ["sm86"], ["sm89"]]
    for device in facts:
        decoder = device["engines"]["decoder"]
        assert decoder["plugin_layers_expected"] == PLANNED[scheme]
        assert decoder["plugin_layers_found"] == PLANNED[scheme]
        assert [check["name"] for check in decoder["checks"] if not check["pass"]] == []
        assert device["plugin"]["sha256"] == plugin_graphs.library().sha256
    assert engine_facts(second) == facts
    assert [path.read_bytes() for path in sorted(first.rglob("*.engine"))] == [
        path.read_bytes() for path in sorted(second.rglob("*.engine"))
    ]


@pytest.mark.trt
@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bfloat16_engines_hold_every_planned_plugin_and_one_is_the_embedding(
    tmp_path: Path,
) -> None:
    library = plugin_graphs.library().path
    options = EngineOptions(plugin_lib=library, dtype="bf16", embed_engine=True)
    exported = export_rounded(
        tmp_path, lowering="plugin", targets=("rtx4090:rtx",), engines=options
    )
    assert {graph.file.partition(".")[0] for graph in exported.record.graphs} == {
        "decoder_model_merged_plugin_bf16",
        "embed_tokens_bf16",
        "vision_encoder_bf16",
    }
    (path,) = built(exported, tmp_path / "built").rglob("engine.json")
    engines = json.loads(path.read_text())["engines"]
    assert set(engines) == {"decoder", "vision", "embed"}
    for name, engine in engines.items():
        assert engine["dtype"] == "bf16"
        assert [check["name"] for check in engine["checks"] if not check["pass"]] == [], name
    assert engines["decoder"]["plugin_layers_found"] == PLANNED["w3a16"]
    kinds = {port["name"]: port["dtype"] for port in engines["decoder"]["inputs"]}
    assert kinds["inputs_embeds"] == kinds["past_key_values.0.key"] == "bfloat16"
    assert engines["decoder"]["outputs"][0]["dtype"] == "float32"
    assert engines["embed"]["profiles"][0] == {"input_ids": [[1, 1], [1, 1], [1, 512]]}
    assert "engine.A7" in [check["name"] for check in engines["embed"]["checks"]]


@pytest.mark.trt
@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_plan_serves_all_devices_with_the_options_that_were_asked_for(tmp_path: Path) -> None:
    options = EngineOptions(
        plugin_lib=plugin_graphs.library().path,
        one_plan=True,
        max_batch=2,
        max_tiles=3,
        opt_tokens=4,
        workspace_mib=512,
        weight_streaming=True,
    )
    exported = export_rounded(tmp_path, lowering="plugin", targets=TARGETS, engines=options)
    (path,) = built(exported, tmp_path / "built").rglob("engine.json")
    record = json.loads(path.read_text())
    assert path.parent.name == "sm86-sm89-sm120"
    assert record["sm"] == ["sm86", "sm89", "sm120"]
    decoder, vision = record["engines"]["decoder"], record["engines"]["vision"]
    hidden = decoder["profiles"][0]["inputs_embeds"][0][2]
    assert decoder["profiles"][0]["inputs_embeds"] == [
        [1, 1, hidden],
        [1, 4, hidden],
        [2, 512, hidden],
    ]
    assert vision["profiles"][0]["pixel_values"][2][0] == 3
    assert (decoder["workspace_mib"], decoder["weight_streaming"]) == (512, True)
    assert decoder["plugin_layers_found"] == {"W3Linear": 20}
