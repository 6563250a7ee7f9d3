"""A checkpoint in the formats of others: whole folders, settings that transformers reads, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import AwqConfig, GPTQConfig

from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import UsageError
from mbq_export.families.base import LoadedModel
from mbq_export.quantize.formats import FORMATS
from mbq_export.quantize.handover import ORIGIN_FILE, check_holds, hand_over
from mbq_export.reading import sha256_of
from tests.tiny import PROCESSOR_FILES, Tiny, load_tiny, tiny_checkpoint

NAMES = ("awq", "compressed-tensors", "gptq")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny") / "model", Tiny(tied=request.param))


@pytest.fixture(scope="module")
def checkpoint(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> QuantCheckpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("ours") / "checkpoint", model, scheme="w4a16")


@pytest.mark.parametrize("name", NAMES)
def test_folder_holds_what_an_engine_needs(
    checkpoint: QuantCheckpoint, tmp_path: Path, name: str
) -> None:
    hand_over(checkpoint, FORMATS[name], tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    shard = "model-00001-of-00001.safetensors"
    assert files >= {*PROCESSOR_FILES, "config.json", "model.safetensors.index.json", shard}
    assert "mbq.json" not in files
    tensors = load_file(tmp_path / "out" / shard)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(tensors), shard)
    linear = checkpoint.linears[0]
    assert f"{linear}.bias" in tensors
    assert f"{linear}.zeros" not in tensors
    assert set(checkpoint.tensors) <= set(tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == name
    assert config["model_type"] == "llava_onevision"


@pytest.mark.parametrize("name", NAMES)
def test_a_head_of_codes_is_refused(model: LoadedModel, tmp_path: Path, name: str) -> None:
    headed = tiny_checkpoint(tmp_path / "c", model, scheme="w4a16", group_size=128, head_bits=4)
    with pytest.raises(UsageError, match="its output head is codes") as caught:
        hand_over(headed, FORMATS[name], tmp_path / "out")
    assert caught.value.code == "E2006"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "kind"), [("awq", AwqConfig), ("gptq", GPTQConfig)])
def test_transformers_reads_the_settings(
    checkpoint: QuantCheckpoint, tmp_path: Path, name: str, kind: type
) -> None:
    hand_over(checkpoint, FORMATS[name], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[name] is kind
    found = kind.from_dict(dict(config))
    assert (found.bits, found.group_size) == (4, 64)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_code_is_named(checkpoint: QuantCheckpoint, tmp_path: Path, name: str) -> None:
    hand_over(checkpoint, FORMATS[name], tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if name == "compressed-tensors":
        kept = settings["ignore"]
        assert "model.vision_tower.encoder.layers.0.mlp.fc1" in kept
        assert "model.multi_modal_projector.linear_1" in kept
        assert not set(kept) & set(checkpoint.linears)
    elif name == "awq":
        kept = settings["modules_to_not_convert"]
        assert {"model.vision_tower", "model.multi_modal_projector"} <= set(kept)
    else:
        kept = list(settings["dynamic"])
        assert r"-:model\.vision_tower" in kept
    assert any("lm_head" in entry for entry in kept), "tied or not, the head is no code"


@pytest.mark.parametrize("name", NAMES)
def test_same_checkpoint_gives_the_same_bytes(
    checkpoint: QuantCheckpoint, tmp_path: Path, name: str
) -> None:
    for out in ("one", "two"):
        hand_over(checkpoint, FORMATS[name], tmp_path / out)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
        for out in ("one", "two")
    )
    assert one == two


def test_origin_names_the_checkpoint(checkpoint: QuantCheckpoint, tmp_path: Path) -> None:
    hand_over(checkpoint, FORMATS["awq"], tmp_path / "out")
    origin = json.loads((tmp_path / "out" / ORIGIN_FILE).read_text())
    assert origin["checkpoint_sha256"] == sha256_of(checkpoint.folder / "mbq.json")
    assert origin["method"]["name"] == "mbq"


def test_finished_folder_is_replaced_on_request_and_nothing_else_is(
    checkpoint: QuantCheckpoint, tmp_path: Path
) -> None:
    hand_over(checkpoint, FORMATS["awq"], tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        hand_over(checkpoint, FORMATS["gptq"], tmp_path / "out")
    assert caught.value.code == "E2011"
    hand_over(checkpoint, FORMATS["gptq"], tmp_path / "out", force=True)
    assert json.loads((tmp_path / "out" / ORIGIN_FILE).read_text())["format"] == "gptq"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        hand_over(checkpoint, FORMATS["awq"], tmp_path / "mine", force=True)
    assert caught.value.code == "E2011"
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("part", "facts", "what"),
    [("lm_head", {"bits": 4}, "output head"), ("vision", {"linears": ["a.b"]}, "vision tower")],
)
def test_codes_outside_the_decoder_are_refused(
    checkpoint: QuantCheckpoint, part: str, facts: dict[str, object], what: str
) -> None:
    coded = replace(checkpoint, info={**checkpoint.info, part: facts})
    with pytest.raises(UsageError, match=f"its {what} is codes") as caught:
        check_holds(coded, FORMATS["compressed-tensors"])
    assert caught.value.code == "E2006"


@pytest.mark.parametrize(
    ("scheme", "group", "name"),
    [
        ("w3a16", 64, "awq"),
        ("w4a8", 0, "awq"),
        ("w4a8", 0, "gptq"),
        (None, 0, "compressed-tensors"),
    ],
)
def test_checkpoint_that_a_format_cannot_hold_is_refused(
    model: LoadedModel, tmp_path: Path, scheme: str | None, group: int, name: str
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "ours", model, scheme=scheme, group_size=group)
    with pytest.raises(UsageError, match=f"{name} cannot hold this checkpoint") as caught:
        hand_over(checkpoint, FORMATS[name], tmp_path / "out")
    assert caught.value.code == "E2006"
    assert not (tmp_path / "out").exists()
