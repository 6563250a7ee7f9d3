"""Scales of others under our names: mapped by their ends, complete, and folded without a change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mbq_export.calibrate import published as module
from mbq_export.calibrate.published import FOLD_RELATIVE, Published, fold_difference
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.errors import FormatError
from mbq_export.families.base import LoadedModel
from tests.tiny import Tiny, load_tiny, random_scales

Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


@pytest.fixture(scope="module", params=[2, 4], ids=["shared value heads", "as many value heads"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny") / "model", Tiny(kv_heads=request.param))


def published(
    folder: Path, model: LoadedModel, *, beginning: str = "model."
) -> tuple[Path, dict[str, np.ndarray]]:
    """The files as the converter writes them, and the scales under our names."""
    ours = dict(random_scales(model).scales)
    shared = model.text.heads != model.text.kv_heads
    tensors, entries = {}, []
    for name in [n for n in ours if shared and ".o." in n]:
        del ours[name]
    for number, (name, scale) in enumerate(ours.items()):
        _, layer, unit, _ = name.split(".")
        place = next(p for p in model.family.smooth if p.unit == unit)
        block = f"{beginning}layers.{layer}."
        tensors[f"scale.{number:05}"] = scale
        entries.append(
            {
                "tensor": f"scale.{number:05}",
                "source": block + place.source,
                "into": [block + linear for linear in reversed(place.into)],
            }
        )
    save_file(tensors, folder / "scales.safetensors")
    record = {"schema": "mbq-export/published-scales@1", "entries": entries, "clip": []}
    (folder / "scales.json").write_text(json.dumps(record))
    return folder / "scales.safetensors", ours


def read(path: Path, model: LoadedModel) -> Published:
    return Published.read(path, family=model.family, text=model.text)


def calibrated(scales: dict[str, np.ndarray]) -> ChannelScales:
    switches = Switches(method="mbq").resolved()
    return ChannelScales(scales=scales, sensitivity={}, calib={"switches": switches})


@pytest.mark.parametrize("beginning", ["model.", "language_model.model.", "", "a.layers.b."])
def test_names_are_mapped_by_their_ends(model: LoadedModel, tmp_path: Path, beginning: str) -> None:
    path, ours = published(tmp_path, model, beginning=beginning)
    found = read(path, model)
    assert found.scales.keys() == ours.keys()
    for name, scale in ours.items():
        assert np.array_equal(found.scales[name], scale)
    assert found.clips == 0


def test_half_floats_are_widened(model: LoadedModel, tmp_path: Path) -> None:
    path, ours = published(tmp_path, model)
    tensors = load_file(path)
    save_file({n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}, path)
    name = next(iter(ours))
    found = read(path, model).scales[name]
    assert found.dtype == np.float32
    assert np.array_equal(found, ours[name].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_folding_them_changes_nothing(model: LoadedModel, tmp_path: Path) -> None:
    path, _ = published(tmp_path, model)
    change = fold_difference(model, calibrated(dict(read(path, model).scales)))
    assert 0 < change <= FOLD_RELATIVE


def test_fold_that_changes_the_model_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for a family whose places are wrong: no such one can be loaded here."""
    real = module.fold

    def wrong(block: Any, scales: dict[str, np.ndarray], **rest: Any) -> None:
        real(block, scales, **rest)
        block.input_layernorm.weight.mul_(1.01)

    monkeypatch.setattr(module, "fold", wrong)
    with pytest.raises(FormatError, match="moves the logits by") as caught:
        fold_difference(model, random_scales(model))
    assert caught.value.code == "E4314"


def _missing(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    del record["entries"][0]


def _surplus_layer(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    text = json.dumps(record["entries"][0]).replace("layers.0.", "layers.7.")
    record["entries"].append(json.loads(text))


def _twice(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    record["entries"].append(record["entries"][0])


def _unknown_place(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    record["entries"][0]["into"].pop()


def _other_layer(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    into = record["entries"][0]["into"]
    into[0] = into[0].replace("layers.0.", "layers.1.")


def _two_beginnings(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    entry = json.dumps(record["entries"][0]).replace("model.layers", "model.vision_tower.layers")
    record["entries"][0] = json.loads(entry)


def _length(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    tensors["scale.00000"] = tensors["scale.00000"][:-1].copy()


def _negative(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    tensors["scale.00000"][3] *= -1


def _no_number(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    tensors["scale.00000"][3] = np.nan


def _integers(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    tensors["scale.00000"] = np.ones(128, np.int32)


def _schema(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    record["schema"] = "mbq-export/calib@1"


def _no_list(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    record["entries"] = {}


def _odd_entry(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    record["entries"][0] = ["scale.00000"]


def _odd_name(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    record["entries"][0]["into"] = [None]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_missing, r"1 scales are missing \(layers.0.qkv.e\), 0 are surplus"),
        (_surplus_layer, r"0 scales are missing \(none\), 1 are surplus \(layers.7.qkv.e\)"),
        (_twice, "has two scales"),
        (_unknown_place, "are no place for a scale in llava_onevision"),
        (_other_layer, "are no place for a scale"),
        (_two_beginnings, "begin in 2 ways"),
        (_length, "The scale is float32"),
        (_negative, "1 of 128 scales are not positive"),
        (_no_number, "1 of 128 scales are not positive"),
        (_integers, "The scale is int32"),
        (_schema, "Its schema is"),
        (_no_list, "entries is no list"),
        (_odd_entry, "An entry is no"),
        (_odd_name, "An entry is no"),
    ],
)
def test_file_that_does_not_fit_is_refused(
    model: LoadedModel, tmp_path: Path, change: Change, said: str
) -> None:
    path, _ = published(tmp_path, model)
    tensors, record = load_file(path), json.loads(path.with_suffix(".json").read_text())
    change(tensors, record)
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match=said) as caught:
        read(path, model)
    assert caught.value.code == "E4314"


def test_scale_of_the_attention_output_is_surplus_where_value_heads_are_shared(
    model: LoadedModel, tmp_path: Path
) -> None:
    path, ours = published(tmp_path, model)
    alike = model.text.heads == model.text.kv_heads
    assert any(".o." in name for name in ours) == alike
    record = json.loads(path.with_suffix(".json").read_text())
    tensors = load_file(path)
    block = "model.layers.0.self_attn."
    if alike:
        record["entries"] = [e for e in record["entries"] if e["source"] != f"{block}v_proj"]
    else:
        entry = {"tensor": "o", "source": f"{block}v_proj", "into": [f"{block}o_proj"]}
        record["entries"].append(entry)
        tensors["o"] = np.ones(128, np.float32)
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match=r"layers\.0\.o\.e"):
        read(path, model)


def test_tensor_that_is_not_there_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    path, _ = published(tmp_path, model)
    tensors = load_file(path)
    del tensors["scale.00000"]
    save_file(tensors, path)
    with pytest.raises(FormatError) as caught:
        read(path, model)
    assert caught.value.code == "E4103"


@pytest.mark.parametrize("name", ["scales.json", "scales.safetensors"])
def test_missing_file_is_named(model: LoadedModel, tmp_path: Path, name: str) -> None:
    path, _ = published(tmp_path, model)
    (tmp_path / name).unlink()
    with pytest.raises(FormatError, match=name) as caught:
        read(path, model)
    assert caught.value.code in {"E4314", "E4106"}
