"""Codes of others become a checkpoint: the same bytes as before they went out, or a refusal."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mbq_export.backends.torch import fake_quant_model
from mbq_export.checkpoint import CHECKPOINT_FILE, QuantCheckpoint
from mbq_export.errors import FormatError
from mbq_export.families.base import LoadedModel
from mbq_export.families.locate import read_config
from mbq_export.quantize.foreign import ForeignCheckpoint
from mbq_export.quantize.formats import FORMATS
from mbq_export.quantize.handover import hand_over
from mbq_export.quantize.importing import import_checkpoint
from mbq_export.schemes import SCHEMES
from tests.reference import foreign
from tests.tiny import Tiny, load_tiny, tiny_checkpoint

FILE = "model-00001-of-00001.safetensors"
FIRST = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny") / "model", Tiny(dtype="bfloat16", tied=False))


def imported(folder: Path, model: LoadedModel, out: Path) -> QuantCheckpoint:
    source = ForeignCheckpoint.open(folder, config=read_config(folder), family=model.family)
    import_checkpoint(source, source.load(), out=out)
    return QuantCheckpoint.open(out)


@pytest.mark.parametrize(
    ("scheme", "group", "form"),
    [
        ("w4a16", 32, "awq"),
        ("w4a16", 128, "awq"),
        ("w3a16", 64, "gptq"),
        ("w4a16", 64, "gptq"),
        ("w3a16", 64, "compressed-tensors"),
        ("w4a16", 32, "compressed-tensors"),
        ("w4a8", 0, "compressed-tensors"),
        ("w4a8", 128, "compressed-tensors"),
        ("w8a8", 0, "compressed-tensors"),
        ("w8a16", 0, "compressed-tensors"),
    ],
)
def test_checkpoint_that_went_out_and_came_back_has_the_same_bytes(
    model: LoadedModel, tmp_path: Path, scheme: str, group: int, form: str
) -> None:
    before = tiny_checkpoint(tmp_path / "before", model, scheme=scheme, group_size=group)
    hand_over(before, FORMATS[form], tmp_path / "out")
    after = imported(tmp_path / "out", model, tmp_path / "after")
    assert (tmp_path / "after" / FILE).read_bytes() == (tmp_path / "before" / FILE).read_bytes()
    same = ("scheme", "layout", "skipped", "tied", "lm_head")
    assert {key: after.info[key] for key in same} == {key: before.info[key] for key in same}
    assert after.info["method"] | {"variant": ""} == {
        "name": "imported",
        "format": form,
        "variant": "",
        "group_size": group,
        "symmetric": SCHEMES[scheme].symmetric,
        "calibration_sha256": None,
        "seed": None,
    }
    assert {row["error"] for row in after.info["linears"]} == {None}
    assert after.config == before.config


def test_same_files_give_the_same_checkpoint(model: LoadedModel, tmp_path: Path) -> None:
    before = tiny_checkpoint(tmp_path / "before", model, scheme="w4a16")
    hand_over(before, FORMATS["awq"], tmp_path / "out")
    for name in ("one", "two"):
        imported(tmp_path / "out", model, tmp_path / name)
    one, two = ((tmp_path / name / CHECKPOINT_FILE).read_bytes() for name in ("one", "two"))
    assert one == two


def test_codes_of_the_slow_packer_compute_what_they_stand_for(
    model: LoadedModel, tmp_path: Path
) -> None:
    """A GPTQ file of 3 bits and the older zero rule, made without our packers, in every linear."""
    before = tiny_checkpoint(tmp_path / "before", model, scheme="w3a16", group_size=64)
    hand_over(before, FORMATS["gptq"], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / FILE)
    rng, weights = np.random.default_rng(7), {}
    for name, record in before.records.items():
        linear = foreign.random_linear(rng, record.n, record.k, bits=3, group=64)
        linear.scales[:] = (linear.scales * 0.001 + 0.001).astype(np.float16)
        for part, array in foreign.gptq(linear, minus_one=True, group=64).items():
            tensors[f"{name}.{part}"] = array
        columns = np.arange(record.k) // 64
        real = linear.codes.astype(np.float32) - linear.zeros[:, columns]
        weights[name] = torch.from_numpy(real * linear.scales.astype(np.float32)[:, columns])
    save_file(tensors, tmp_path / "out" / FILE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] = foreign.gptq_settings(3, 64, "gptq")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    after = fake_quant_model(imported(tmp_path / "out", model, tmp_path / "after"))
    for name, weight in weights.items():
        assert torch.equal(after.module.get_parameter(f"{name}.weight"), weight), name


def test_wider_groups_of_a_file_are_split(model: LoadedModel, tmp_path: Path) -> None:
    """AWQ with one scale per row: ours repeats it in every group of 128."""
    before = tiny_checkpoint(tmp_path / "before", model, scheme="w4a16", group_size=128)
    hand_over(before, FORMATS["awq"], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / FILE)
    for name in list(tensors):
        if name.endswith((".qzeros", ".scales")):
            tensors[name] = np.ascontiguousarray(tensors[name][:1])
    save_file(tensors, tmp_path / "out" / FILE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["group_size"] = -1
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    after = imported(tmp_path / "out", model, tmp_path / "after")
    assert after.group_size == 128
    down = after.packed("model.language_model.layers.0.mlp.down_proj")
    assert down.groups == 2
    assert np.array_equal(down.scales[:, 0], down.scales[:, 1])
    assert after.info["method"]["group_size"] == 0


@pytest.mark.parametrize(
    ("value", "code"),
    [(np.inf, "E4411"), (0.0, "E4411"), (-0.5, "E4411"), (np.nan, "E4112")],
)
def test_scale_that_is_none_is_refused_with_its_linear(
    model: LoadedModel, tmp_path: Path, value: float, code: str
) -> None:
    before = tiny_checkpoint(tmp_path / "before", model, scheme="w4a16")
    hand_over(before, FORMATS["awq"], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / FILE)
    tensors[f"{FIRST}.scales"][0, 3] = value
    save_file(tensors, tmp_path / "out" / FILE)
    with pytest.raises(FormatError) as caught:
        imported(tmp_path / "out", model, tmp_path / "after")
    assert (caught.value.code, caught.value.where) == (code, [FIRST])
    assert not (tmp_path / "after").exists()


def test_weight_beside_the_codes_that_is_no_number_is_refused(
    model: LoadedModel, tmp_path: Path
) -> None:
    before = tiny_checkpoint(tmp_path / "before", model, scheme="w4a16")
    hand_over(before, FORMATS["awq"], tmp_path / "out")
    name = "model.multi_modal_projector.linear_1.bias"
    tensors = load_file(tmp_path / "out" / FILE)
    tensors[name][0] = np.nan
    save_file(tensors, tmp_path / "out" / FILE)
    with pytest.raises(FormatError, match=name) as caught:
        imported(tmp_path / "out", model, tmp_path / "after")
    assert caught.value.code == "E4110"


def test_file_that_changes_meanwhile_is_noticed(model: LoadedModel, tmp_path: Path) -> None:
    before = tiny_checkpoint(tmp_path / "before", model, scheme="w4a16")
    hand_over(before, FORMATS["awq"], tmp_path / "out")
    source = ForeignCheckpoint.open(
        tmp_path / "out", config=read_config(tmp_path / "out"), family=model.family
    )
    loaded = source.load()
    os.utime(tmp_path / "out" / FILE, ns=(1, 1))
    with pytest.raises(FormatError) as caught:
        import_checkpoint(source, loaded, out=tmp_path / "after")
    assert caught.value.code == "E4104"
    assert not (tmp_path / "after").exists()


def test_small_scales_are_warned_of_once(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = tiny_checkpoint(tmp_path / "before", model, scheme="w4a16")
    hand_over(before, FORMATS["gptq"], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / FILE)
    tensors[f"{FIRST}.scales"][:] = np.float16(2.0**-16)
    save_file(tensors, tmp_path / "out" / FILE)
    with caplog.at_level(logging.WARNING, logger="mbq_export"):
        imported(tmp_path / "out", model, tmp_path / "after")
    warnings = [text for text in caplog.messages if "W4113" in text]
    assert warnings == [
        "MBQ-W4113: 256 scales are below the normal fp16 numbers, 0 of them changed by less than 2**-24"
    ]
