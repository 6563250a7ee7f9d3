"""fp16 unless activations leave it too little room: asked for, or measured on one sample."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mbq_export.blocks.largest import Largest
from mbq_export.errors import UsageError
from mbq_export.families.base import LoadedModel
from mbq_export.families.llava_onevision import load
from mbq_export.pipeline.engine_dtype import (
    LARGEST_FP16_ACTIVATION,
    RECORD,
    EngineDtype,
    chosen_dtype,
    of_largest,
)
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.plan import Plan, make_plan
from mbq_export.pipeline.request import BuildRequest
from mbq_export.pipeline.stages import graph_forms
from mbq_export.schemes import SCHEMES
from tests.tiny import Tiny, write_tiny

W3, W4A8 = SCHEMES["w3a16"], SCHEMES["w4a8"]
SOME = Largest(size=LARGEST_FP16_ACTIVATION, place="layers.3.mlp.down_proj input")
MORE = replace(SOME, size=LARGEST_FP16_ACTIVATION * 1.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"), Tiny(tied=False))


def plan_of(folder: Path, out: Path, *, dtype: str = "auto", **changes: object) -> Plan:
    """Plugin graphs for a device that builds its own engine: neither a library nor TensorRT is asked for."""
    fixed = {"model": str(folder), "out": out, "group_size": 64, "data": "builtin:shapes"}
    more = {"samples": 2, "targets": ("cpu",), "lowering": "plugin"}
    request = {**fixed, **more, "engines": EngineOptions(dtype=dtype), **changes}
    return make_plan(BuildRequest(**request))


def outliers(folder: Path) -> LoadedModel:
    """The model with a gate whose output leaves fp16."""
    model = load(folder)
    with torch.no_grad():
        block = model.module.get_submodule(model.family.blocks)[1]
        block.mlp.up_proj.weight.mul_(1e6)
    return model


def test_activations_with_room_in_fp16_stay_there(folder: Path, tmp_path: Path) -> None:
    found = chosen_dtype(plan_of(folder, tmp_path / "out"), load(folder))
    assert (found.name, found.asked) == ("fp16", "auto")
    assert found.largest is not None
    assert 0 < found.largest < LARGEST_FP16_ACTIVATION
    assert found.place


def test_activations_beyond_fp16_make_plugin_engines_bf16(folder: Path, tmp_path: Path) -> None:
    found = chosen_dtype(plan_of(folder, tmp_path / "out"), outliers(folder))
    assert found.name == "bf16"
    assert "layers.1.mlp." in found.place
    assert found.reason.startswith("activations reach ")
    assert found.reason.endswith("; fp16 is used up to 30000")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_is_asked_for_is_not_measured(folder: Path, tmp_path: Path, dtype: str) -> None:
    found = chosen_dtype(plan_of(folder, tmp_path / "out", dtype=dtype), outliers(folder))
    assert found == EngineDtype(name=dtype, asked=dtype)
    assert found.reason == f"--engine-dtype {dtype}"


def test_nothing_is_measured_without_engines(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder, tmp_path / "out", lowering="auto")
    assert chosen_dtype(plan, outliers(folder)) == EngineDtype()


def test_limit_itself_is_fp16() -> None:
    assert of_largest(SOME, lowering="plugin", scheme=W3).name == "fp16"
    assert of_largest(MORE, lowering="plugin", scheme=W3).name == "bf16"


def test_forms_without_bf16_are_refused_rather_than_overflown() -> None:
    with pytest.raises(UsageError, match=r"Activations reach 30300 at layers\.3") as error:
        of_largest(MORE, lowering="qdq", scheme=W3)
    assert error.value.code == "E2002"
    assert error.value.fix == ("--lowering plugin", "--engine-dtype fp16 takes the risk")
    assert of_largest(MORE, lowering="qdq", scheme=W4A8).name == "bf16"
    assert of_largest(MORE, lowering="qdq", scheme=None).name == "bf16"


def test_record_comes_back_and_is_json_even_for_an_infinity(tmp_path: Path) -> None:
    found = of_largest(replace(SOME, size=float("inf")), lowering="plugin", scheme=W3)
    found.write(tmp_path)
    assert EngineDtype.read(tmp_path) == found
    assert json.loads((tmp_path / RECORD).read_text())["largest"] == 3.4e38


def test_folder_without_a_record_means_fp16(tmp_path: Path) -> None:
    assert EngineDtype.read(tmp_path) == EngineDtype(name="fp16")


def test_graph_for_engines_is_written_in_the_chosen_type(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder, tmp_path / "out")
    forms = {form.target: form for form in graph_forms(plan, "bf16")}
    assert (forms["trt"].dtype, forms["ort"].dtype) == ("bf16", "fp32")
    assert forms["trt"].file_name == "decoder_model_merged_plugin_bf16.onnx"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"dtype": "fp8"}, "E2001", "Unknown --engine-dtype 'fp8'"),
        (
            {"dtype": "bf16", "lowering": "qdq", "targets": ("rtx4090:rtx",)},
            "E2002",
            "There are no bf16 engines of --lowering qdq here",
        ),
    ],
)
def test_type_that_cannot_be_had_is_refused_in_the_plan(
    folder: Path, tmp_path: Path, changes: dict[str, object], code: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as error:
        plan_of(folder, tmp_path / "out", **changes)
    assert error.value.code == code


def test_baseline_may_be_bf16_with_standard_operators(folder: Path, tmp_path: Path) -> None:
    changes = {"weight_bits": 16, "lowering": "qdq", "targets": ("rtx4090:rtx",)}
    plan = plan_of(folder, tmp_path / "out", dtype="bf16", group_size=None, **changes)
    assert plan.lowering == "qdq"


def test_type_and_embedding_engine_decide_the_result() -> None:
    plain = EngineOptions().fingerprint()
    assert EngineOptions(dtype="bf16").fingerprint() != plain
    assert EngineOptions(embed_engine=True).fingerprint() != plain
