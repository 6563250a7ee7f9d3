"""What an export says about itself, written and read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from mbq_export.errors import FormatError, IncompatibleError, UsageError
from mbq_export.export.record import (
    RECORD,
    ExportRecord,
    GraphForm,
    GraphRecord,
    LinearNode,
    LinearPart,
    Port,
)
from mbq_export.writing import json_bytes

RECORDED = ExportRecord(
    family="llava_onevision",
    scheme="w3a16",
    group_size=64,
    graphs=(
        GraphRecord(
            name="decoder_model_merged",
            file="decoder_model_merged_qdq_ort.onnx",
            data=("decoder_model_merged_qdq_ort.onnx_data",),
            dtype="fp32",
            opset=23,
            inputs=(Port(name="inputs_embeds", dtype="float32", shape=("batch_size", 4, 256)),),
            outputs=(Port(name="logits", dtype="float32", shape=("batch_size", 4, 64)),),
            nodes={"Add": 3},
            weight_bytes=12,
            sha256={"decoder_model_merged_qdq_ort.onnx": "ab"},
            form=GraphForm(max_context=512),
            scheme="w3a16",
            linears=(
                LinearNode(
                    node="layers.0.qkv_proj",
                    n=48,
                    k=64,
                    scheme="w3a16",
                    group_size=64,
                    parts=(LinearPart(module="a.q_proj", rows=(0, 32)),),
                ),
            ),
            declined=("layers.1: why",),
            plugin_layers={"W3Linear": ("layers.0.qkv_proj", "layers.0.o_proj")},
        ),
    ),
    host_tensors={"image_newline": (256,)},
    versions={"onnx": "1.23.2"},
)


def stored(folder: Path, **changes: Any) -> Path:
    (folder / RECORD).write_bytes(json_bytes({**RECORDED.as_json(), **changes}))
    return folder


def test_record_reads_back_as_it_was(tmp_path: Path) -> None:
    assert ExportRecord.read(stored(tmp_path)) == RECORDED


def test_record_names_its_schema_and_the_merge_rule(tmp_path: Path) -> None:
    found = json.loads((stored(tmp_path) / RECORD).read_text())
    assert (found["schema"], found["merge"]) == ("mbq-export/graphs@1", "replace_rows")
    assert found["domain"] == {"name": "mbq", "version": 1}


def test_fields_of_a_later_release_are_left_out(tmp_path: Path) -> None:
    graph = {**RECORDED.as_json()["graphs"][0], "later": 1}
    assert ExportRecord.read(stored(tmp_path, graphs=[graph], later=2)) == RECORDED


def test_a_record_of_a_release_without_plugins_names_none(tmp_path: Path) -> None:
    graph = dict(RECORDED.as_json()["graphs"][0])
    del graph["plugin_layers"]
    assert ExportRecord.read(stored(tmp_path, graphs=[graph])).graphs[0].plugin_layers == {}


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="has schema 'mbq-export/graphs@2'"):
        ExportRecord.read(stored(tmp_path, schema="mbq-export/graphs@2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other"}, "its schema is 'other'"),
        ({"graphs": [{"name": "x"}]}, "a field is missing or of another kind"),
        ({"graphs": 3}, "a field is missing or of another kind"),
        ({"graphs": [{**RECORDED.as_json()["graphs"][0], "plugin_layers": 3}]}, "of another kind"),
        ({"host_tensors": [1]}, "a field is missing or of another kind"),
    ],
)
def test_malformed_records_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError) as caught:
        ExportRecord.read(stored(tmp_path, **changes))
    assert caught.value.code == "E4604"
    assert message in caught.value.message


def test_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"there is no mbq_export\.json in"):
        ExportRecord.read(tmp_path)


def test_graph_is_found_by_its_file() -> None:
    assert RECORDED.graph("decoder_model_merged_qdq_ort.onnx") is RECORDED.graphs[0]


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (GraphForm(lowering="reference"), "decoder_model_merged_reference.onnx"),
        (GraphForm(), "decoder_model_merged_qdq_ort.onnx"),
        (GraphForm(dtype="fp16"), "decoder_model_merged_qdq_ort_fp16.onnx"),
        (GraphForm(target="trt", dtype="fp16"), "decoder_model_merged_qdq_trt_fp16.onnx"),
        (
            GraphForm(lowering="plugin", target="trt", dtype="bf16"),
            "decoder_model_merged_plugin_bf16.onnx",
        ),
    ],
)
def test_file_name_tells_lowering_target_and_dtype(form: GraphForm, name: str) -> None:
    assert form.file_name == name


def test_fp32_for_tensorrt_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        GraphForm(target="trt")
    assert str(caught.value) == (
        "MBQ-E2002: A graph for TensorRT cannot be fp32.\n"
        "  why     TensorRT has no fp32 kernel for the Attention operator\n"
        "  fix     --dtype fp16"
    )


@pytest.mark.parametrize(
    ("field", "value", "known"),
    [
        ("target", "tpu", "ort, trt"),
        ("dtype", "fp8", "fp32, fp16, bf16"),
        ("kv", "paged", "concat, static"),
        ("logits", "none", "all, last"),
    ],
)
def test_unknown_choice_lists_the_known_ones(field: str, value: str, known: str) -> None:
    with pytest.raises(UsageError) as caught:
        GraphForm(**{field: value})
    assert (caught.value.code, caught.value.message) == ("E2001", f"Unknown {field} {value!r}.")
    assert caught.value.why == f"known: {known}"


def test_empty_context_is_refused() -> None:
    with pytest.raises(UsageError, match="A context of 0 tokens holds nothing"):
        GraphForm(max_context=0)
