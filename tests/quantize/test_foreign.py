"""A folder of another project's codes: what it must hold, and every way in which it may not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, UsageError
from mbq_export.families.base import LoadedModel
from mbq_export.families.locate import read_config
from mbq_export.quantize.foreign import ForeignCheckpoint, settings_of
from mbq_export.quantize.formats import FORMATS
from mbq_export.quantize.handover import hand_over
from mbq_export.quantize.importing import import_checkpoint
from mbq_export.schemes.oracle import dequantized
from tests.tiny import load_tiny, tiny_checkpoint

FILE = "model-00001-of-00001.safetensors"
FIRST = "model.language_model.layers.0.self_attn.q_proj"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def checkpoint(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> QuantCheckpoint:
    folder = tmp_path_factory.mktemp("ours") / "checkpoint"
    return tiny_checkpoint(folder, model, scheme="w4a16", group_size=64)


@pytest.fixture
def folder(checkpoint: QuantCheckpoint, tmp_path: Path) -> Callable[[str], Path]:
    def write(form: str) -> Path:
        hand_over(checkpoint, FORMATS[form], tmp_path / form)
        return tmp_path / form

    return write


def opened(folder: Path, model: LoadedModel) -> ForeignCheckpoint:
    return ForeignCheckpoint.open(folder, config=read_config(folder), family=model.family)


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, FILE)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def reconfigure(folder: Path, **settings: object) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


def test_folder_is_described_by_its_config(
    folder: Callable[[str], Path], model: LoadedModel
) -> None:
    found = opened(folder("awq"), model)
    assert (found.format.name, found.scheme.name, found.group_size) == ("awq", "w4a16", 64)
    assert len(found.shapes) == 14
    assert found.shapes[FIRST] == (128, 128)


def test_settings_may_lie_in_the_text_part(
    folder: Callable[[str], Path], model: LoadedModel
) -> None:
    place = folder("gptq")
    config = json.loads((place / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (place / "config.json").write_text(json.dumps(config))
    source = opened(place, model)
    loaded = source.load()
    assert "quantization_config" not in loaded.config["text_config"]
    assert json.loads((place / "config.json").read_text())["text_config"]["quantization_config"]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "hqq"}},
        {"quantization_config": {"quant_method": ["awq"]}},
        {"quantization_config": "awq"},
        {"text_config": "awq"},
    ],
)
def test_other_methods_are_none_of_ours(config: dict[str, Any]) -> None:
    assert settings_of(config) is None


def test_codes_read_as_numbers_are_what_they_stand_for(
    folder: Callable[[str], Path], model: LoadedModel, checkpoint: QuantCheckpoint
) -> None:
    described = opened(folder("awq"), model).described
    assert described.entry(f"{FIRST}.weight").shape == (128, 128)
    wanted = dequantized(checkpoint.packed(FIRST)).astype(np.float32)
    assert np.array_equal(described.read(f"{FIRST}.weight").numpy(), wanted)
    assert described.read("model.language_model.norm.weight").shape == (128,)


def test_names_before_transformers_5_are_understood(
    folder: Callable[[str], Path], model: LoadedModel, checkpoint: QuantCheckpoint, tmp_path: Path
) -> None:
    place = folder("awq")

    def older(tensors: Tensors) -> None:
        for name in list(tensors):
            old = name.replace("model.language_model.", "language_model.model.")
            old = old.replace("model.vision_tower.", "vision_tower.vision_model.")
            old = old.replace("model.multi_modal", "multi_modal").replace("model.image", "image")
            tensors[old] = tensors.pop(name)

    rewrite(place, older)
    source = opened(place, model)
    back = import_checkpoint(source, source.load(), out=tmp_path / "back")
    assert back.linears == checkpoint.linears
    assert np.array_equal(back.packed(FIRST).words, checkpoint.packed(FIRST).words)


def _fuse(tensors: Tensors) -> None:
    for part in ("qweight", "qzeros", "scales"):
        parts = [tensors.pop(FIRST.replace("q_proj", f"{x}_proj") + f".{part}") for x in "qkv"]
        tensors[FIRST.replace("q_proj", "qkv_proj") + f".{part}"] = np.concatenate(parts, axis=1)


def _leave_one(tensors: Tensors) -> None:
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{FIRST}.{part}"]
    tensors[f"{FIRST}.weight"] = np.zeros((128, 128), np.float16)


def _head(tensors: Tensors) -> None:
    tensors["lm_head.qweight"] = np.zeros((128, 8), np.int32)


def _no_codes(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith((".qweight", ".qzeros", ".scales"))]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (_fuse, "E4103", "self_attn.qkv_proj"),
        (_leave_one, "E4103", "1 are missing: .*self_attn.q_proj"),
        (_head, "E4103", "are of no decoder linear: lm_head"),
        (_no_codes, "E4011", "no tensor named qweight"),
    ],
)
def test_other_division_into_codes_and_numbers_is_refused(
    folder: Callable[[str], Path],
    model: LoadedModel,
    change: Callable[[Tensors], None],
    code: str,
    said: str,
) -> None:
    place = folder("awq")
    rewrite(place, change)
    with pytest.raises(FormatError, match=said) as caught:
        opened(place, model)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("form", "settings", "code"),
    [
        ("awq", {"bits": 8}, "E4011"),
        ("awq", {"group_size": 16}, "E4011"),
        ("gptq", {"checkpoint_format": "marlin"}, "E4011"),
        ("gptq", {"bits": 8}, "E4011"),
        ("compressed-tensors", {"format": "float-quantized"}, "E4011"),
    ],
)
def test_settings_that_cannot_be_carried_over_are_refused(
    folder: Callable[[str], Path], model: LoadedModel, form: str, settings: dict, code: str
) -> None:
    place = folder(form)
    reconfigure(place, **settings)
    with pytest.raises(FormatError) as caught:
        opened(place, model)
    assert caught.value.code == code


@pytest.mark.parametrize("settings", [{"bits": 3}, {"group_size": 32}, {"group_size": 128}])
def test_settings_that_do_not_belong_to_the_tensors_are_refused_with_the_linear(
    folder: Callable[[str], Path], model: LoadedModel, settings: dict[str, int]
) -> None:
    place = folder("gptq")
    reconfigure(place, **settings)
    source = opened(place, model)
    with pytest.raises(FormatError) as caught:
        source.linear(FIRST)
    assert caught.value.code in {"E4102", "E4011"}
    assert caught.value.where == [FIRST]


def test_groups_that_kernels_cannot_hold_are_refused(tmp_path: Path, model: LoadedModel) -> None:
    """Whole rows of 4-bit codes with rounded activations run on any width that is a multiple of 8."""
    checkpoint = tiny_checkpoint(tmp_path / "w4a8", model, scheme="w4a8", group_size=0)
    hand_over(checkpoint, FORMATS["compressed-tensors"], tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 260
    with pytest.raises(UsageError) as caught:
        ForeignCheckpoint.open(tmp_path / "ct", config=config, family=model.family)
    assert caught.value.code == "E2004"


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_file_is_refused(
    folder: Callable[[str], Path], model: LoadedModel, keep: int
) -> None:
    place = folder("awq")
    (place / FILE).write_bytes((place / FILE).read_bytes()[:keep])
    with pytest.raises(FormatError) as caught:
        opened(place, model)
    assert caught.value.code in {"E4101", "E4106"}


def test_only_pickles_are_never_loaded(folder: Callable[[str], Path], model: LoadedModel) -> None:
    place = folder("awq")
    (place / FILE).rename(place / "pytorch_model.bin")
    (place / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError) as caught:
        opened(place, model)
    assert caught.value.code == "E4108"
