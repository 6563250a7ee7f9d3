"""A model folder to a model: names, dtypes, tied heads, and checkpoints that do not fit their config."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration

from mbq_export.errors import FormatError, UsageError
from mbq_export.families.llava_onevision import FAMILY, load
from tests.families.random_models import Form, write_model


def test_blocks_stay_on_the_meta_device_when_asked_and_everything_else_is_loaded(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path / "m")
    whole, empty = load(folder), load(folder, meta_blocks=True, dtype="float16")
    for name, parameter in empty.module.named_parameters():
        assert parameter.is_meta == name.startswith(FAMILY.blocks + "."), name
        assert parameter.dtype == torch.float16
    assert not any(buffer.is_meta for _, buffer in empty.module.named_buffers())
    assert (
        empty.module.get_submodule("model.language_model.rotary_emb").inv_freq.dtype
        == torch.float32
    )
    name = f"{FAMILY.linear_path(1, 'mlp.down_proj')}.weight"
    assert torch.equal(empty.weights.read(name), whole.module.get_parameter(name))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_cast_while_they_are_read(tmp_path: Path, dtype: str) -> None:
    folder = write_model(tmp_path / "m", Form(dtype="bfloat16"))
    found = load(folder, dtype=dtype).module
    expected = LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Unknown dtype 'int8'"):
        load(tmp_path, dtype="int8")


@pytest.mark.parametrize(
    "style", ["transformers 4", "transformers 5 with vision_model", "module paths"]
)
def test_names_of_every_release_are_read(tmp_path: Path, style: str) -> None:
    folder = write_model(tmp_path / "m", Form(tied=False))
    reference = load(folder)
    stored = load_file(folder / "model.safetensors")
    modules = {name: parameter.clone() for name, parameter in reference.module.named_parameters()}
    renamed = {
        "transformers 4": {
            name.replace("vision_tower.", "vision_tower.vision_model."): value
            for name, value in stored.items()
        },
        "transformers 5 with vision_model": {
            name.replace("model.vision_tower.", "model.vision_tower.vision_model."): value
            for name, value in modules.items()
        },
        "module paths": modules,
    }[style]
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    found = load(folder).module
    for name, value in modules.items():
        assert torch.equal(found.get_parameter(name), value), name


def test_tied_head_that_is_stored_all_the_same_is_accepted_if_equal(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    embed = stored["language_model.model.embed_tokens.weight"]
    save_file(
        stored | {"language_model.lm_head.weight": embed.clone()}, folder / "model.safetensors"
    )
    assert load(folder).text.tied_head
    save_file(stored | {"language_model.lm_head.weight": embed + 1}, folder / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"lm_head\.weight is stored and differs from .*embed_tokens\.weight"
    ):
        load(folder)


def test_untied_head_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=r"1 tensors are missing from the checkpoint: lm_head\.weight"
    ):
        load(folder)


def test_layers_missing_from_the_checkpoint_are_named_as_a_range(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"layers\.2-4\.input_layernorm\.weight") as caught:
        load(folder)
    assert caught.value.code == "E4103"


def test_layers_the_config_does_not_know_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=r"belong to no part of the model: .*layers\.1\."
    ) as caught:
        load(folder)
    assert caught.value.code == "E4103"
    assert load(folder, ignore_extra=(r"layers\.1\.",)).text.layers == 1


def test_quantized_checkpoint_is_refused_with_its_method(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"already quantized .method awq.") as caught:
        load(folder)
    assert caught.value.code == "E4009"
    (folder / "mbq.json").write_text("{}")
    with pytest.raises(FormatError, match=r"already quantized .method mbq."):
        load(folder)


def test_generation_settings_that_transformers_refuses_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "max_new_tokens": -5}')
    with pytest.raises(FormatError, match=r"generation_config\.json is refused") as caught:
        load(folder)
    assert caught.value.code == "E4002"


def test_config_field_that_only_transformers_reads_is_checked_too(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["projector_hidden_act"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=r"config\.json is refused by transformers: .*projector_hidden_act"
    ) as caught:
        load(folder)
    assert caught.value.code == "E4003"


def test_nothing_is_allocated_by_numbers_of_a_config(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "num_hidden_layers": 8,
        "num_attention_heads": 512,
        "hidden_size": 65536,
        "intermediate_size": 1 << 20,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="tensors are missing") as caught:
        load(folder)
    assert caught.value.code == "E4103"
