"""The family's four hooks equal transformers, on random models of every form."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModel,
    unpad_image,
)

from mbq_export.errors import FormatError
from mbq_export.families.base import ANSWER, PROMPT, VISION, LoadedModel
from mbq_export.families.llava_onevision import (
    FAMILY,
    load,
    merge_images,
    text_shape,
    token_masks,
    vision_module,
    vision_shape,
)
from tests.families.random_models import SAMPLE, Form, config_of, picture, write_model

FORMS = {
    "siglip": Form(),
    "second last layer": Form(feature_layer=-2),
    "three layers": Form(feature_layer=[-3, -2, -1]),
    "clip, class token dropped": Form(tower="clip_vision_model", feature_layer=-2),
    "untied head": Form(tied=False),
    "one tile at most": Form(most_tiles=1),
    "two tiles at most": Form(most_tiles=2),
    "one canvas": Form(pinpoints=[[24, 24]]),
}
SIZES = [(48, 48), (30, 100), (100, 30), (24, 24), (7, 5), (200, 190), (72, 71)]
SHRUNK = 3e-5
"""Bilinear shrinking in float32: torch's own code for different CPUs disagrees by half of this."""
REAL = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
             "num_hidden_layers": 24, "num_key_value_heads": 2, "vocab_size": 152000,
             "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
           "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152128},
    "72B": {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64,
            "num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 152064},
}  # fmt: skip


@pytest.fixture(scope="module", params=FORMS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, Any]:
    """A model loaded by us, and the same folder loaded by transformers."""
    folder = write_model(tmp_path_factory.mktemp("model"), FORMS[request.param])
    return load(folder), LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )


def test_loaded_parameters_and_buffers_equal_those_of_transformers(
    pair: tuple[LoadedModel, Any],
) -> None:
    ours, theirs = pair
    found = dict(ours.module.named_parameters()) | dict(ours.module.named_buffers())
    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert not any(parameter.requires_grad for parameter in ours.module.parameters())
    assert not ours.module.training
    head, embed = (ours.module.get_submodule(path).weight for path in (FAMILY.head, FAMILY.embed))
    assert (head is embed) == ours.text.tied_head


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_features_equal_those_of_transformers(
    pair: tuple[LoadedModel, Any], size: tuple[int, int]
) -> None:
    ours, theirs = pair
    inputs = ours.processor.inputs("what color is the star ?", [picture(*size)])
    tiles = vision_module(ours)(torch.from_numpy(inputs.pixel_values)).numpy()
    assert tiles.shape[1:] == (ours.vision.tokens_per_tile, ours.text.hidden)
    found = _merged(ours, tiles, inputs)
    expected = theirs.get_image_features(
        torch.from_numpy(inputs.pixel_values), torch.from_numpy(inputs.image_sizes)
    ).pooler_output
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), rtol=0, atol=SHRUNK)
    assert len(found) == (inputs.token_classes == VISION).sum()


@torch.no_grad()
def test_logits_of_several_pictures_equal_those_of_transformers(
    pair: tuple[LoadedModel, Any],
) -> None:
    ours, theirs = pair
    inputs = ours.processor.inputs(
        "is there a red star ?", [picture(30, 50), picture(64, 20, seed=1)]
    )
    assert inputs.tiles_per_image.tolist() == [1, 1]
    assert torch.equal(ours.module(**inputs.tensors()).logits, theirs(**inputs.tensors()).logits)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    most=st.integers(1, 12),
    grid=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_packing_equals_transformers_for_any_picture_size(
    height: int, width: int, most: int, grid: int, seed: int
) -> None:
    config = config_of(Form(most_tiles=most)) | {
        "image_grid_pinpoints": [
            [24 * h, 24 * w] for h in range(1, grid + 1) for w in range(1, grid + 1)
        ]
    }
    reference = _Packer(config)
    best = reference.best(height, width)
    tiles = 1 + best[0] * best[1] // 24**2
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((tiles, 9, 5)).astype(np.float32)
    newline = rng.standard_normal(5).astype(np.float32)
    arguments = {
        "image_sizes": np.array([[height, width]]),
        "tiles_per_image": np.array([tiles]),
        "newline": newline,
        "config": config,
    }
    if reference.degenerates(height, width):
        with pytest.raises(FormatError, match=f"{width} x {height} pixels is too thin"):
            merge_images(features, **arguments)
        return
    found = merge_images(features, **arguments)
    expected = reference.pack(features, (height, width), newline)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=SHRUNK)
    if reference.shrinkage(height, width) <= 1.1:
        assert np.array_equal(found, expected)


class _Packer:
    """Transformers' own packing, without a model around it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = LlavaOnevisionConfig(**copy.deepcopy(config))

    def best(self, height: int, width: int) -> tuple[int, int]:
        return select_best_resolution((height, width), self.config.image_grid_pinpoints)

    def pack(self, features: np.ndarray, size: tuple[int, int], newline: np.ndarray) -> np.ndarray:
        packed, _ = LlavaOnevisionModel.pack_image_features(
            self,
            [torch.from_numpy(features)],
            torch.tensor([size]),
            image_newline=torch.from_numpy(newline),
            vision_aspect_ratio=self.config.vision_aspect_ratio,
        )
        return packed[0].numpy()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens before shrinking."""
        high, wide = (pixels // 8 for pixels in self.best(height, width))
        return tuple(unpad_image(torch.empty(1, high, wide), (height, width)).shape[1:])

    def shrinkage(self, height: int, width: int) -> float:
        high, wide = self.grid(height, width)
        return (high * wide / (int(self.config.vision_aspect_ratio[11:]) * 9)) ** 0.5

    def degenerates(self, height: int, width: int) -> bool:
        ratio = max(self.shrinkage(height, width), 1)
        ratio = ratio if ratio > 1.1 else 1
        return any(side // ratio < 1 for side in self.grid(height, width))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "28"),
        ("num_hidden_layers", 28.5),
        ("num_hidden_layers", True),
        ("num_hidden_layers", None),
        ("hidden_size", 0),
        ("hidden_size", 33),
        ("num_attention_heads", 3),
        ("vocab_size", 10**12),
        ("rms_norm_eps", "tiny"),
        ("rope_parameters", {"rope_theta": -1.0, "rope_type": "default"}),
    ],
)
def test_field_out_of_range_is_named_with_its_value(name: str, value: object) -> None:
    config = config_of(Form(text={name: value}))
    with pytest.raises(FormatError, match="text_config") as caught:
        text_shape(config)
    assert caught.value.code == "E4003"
    assert caught.value.why.startswith("it must be")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"model_type": "qwen2_moe"}, "text_config.model_type = 'qwen2_moe' is not supported"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types = 'sliding_attention'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type = 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_variant_that_would_change_the_function_is_refused(text: dict[str, Any], said: str) -> None:
    with pytest.raises(FormatError) as caught:
        text_shape(config_of(Form(text=text)))
    assert caught.value.code == "E4005"
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"vision_feature_select_strategy": "default"}, "E4005"),
        ({"vision_feature_select_strategy": "half"}, "E4005"),
        ({"vision_aspect_ratio": "pad"}, "E4005"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "E4005"),
        ({"vision_feature_layer": -9}, "E4003"),
        ({"vision_feature_layer": []}, "E4003"),
        ({"image_grid_pinpoints": [[24, 25]]}, "E4003"),
        ({"image_grid_pinpoints": [[24]]}, "E4003"),
        ({"image_grid_pinpoints": "all"}, "E4003"),
        ({"vision_config": []}, "E4003"),
    ],
)
def test_vision_field_out_of_range_is_refused(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(FormatError) as caught:
        vision_shape(config_of(Form()) | changes)
    assert caught.value.code == code


@pytest.mark.parametrize("size", REAL)
def test_published_configs_are_read(size: str) -> None:
    # Fields equal to a class's defaults are left out, as in the published files.
    config = {
        "model_type": "llava_onevision",
        "image_token_index": 151646,
        "tie_word_embeddings": False,
        "vision_aspect_ratio": "anyres_max_9",
        "text_config": {"model_type": "qwen2", "rope_theta": 1000000.0, "use_sliding_window": False,
                        "sliding_window": 131072, **REAL[size]},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384,
                          "intermediate_size": 4304, "num_attention_heads": 16,
                          "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False},
    }  # fmt: skip
    text, vision = text_shape(config), vision_shape(config)
    assert text.head_dim == (64 if size == "0.5B" else 128)
    assert text.tied_head == (size == "0.5B")
    assert text.rope_theta == 1e6
    assert vision.tokens_per_tile == 729


def test_a_full_grid_of_the_published_models_has_at_most_9_tiles_of_tokens_and_a_base() -> None:
    config = {"vision_config": {}, "text_config": {}, "vision_aspect_ratio": "anyres_max_9"}
    features = np.empty((37, 729, 0), np.float32)
    rows = merge_images(
        features,
        image_sizes=np.array([[2304, 2304]]),
        tiles_per_image=np.array([37]),
        newline=np.empty(0, np.float32),
        config=config,
    )
    assert len(rows) == 729 + 81 * (81 + 1)


@given(st.data())
def test_token_classes_partition_the_tokens(data: st.DataObject) -> None:
    ids = np.array(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=40)), np.int64)
    answer = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    classes = token_masks(
        ids, answer=answer, config={"image_token_index": 2, "video_token_index": 3}
    )
    assert classes.dtype == np.int8
    assert set(classes.tolist()) <= {PROMPT, VISION, ANSWER}
    assert ((classes == VISION) == ((ids == 2) | (ids == 3))).all()
    assert ((classes == ANSWER) == (answer & (ids != 2) & (ids != 3))).all()


def test_every_smoothing_pair_and_linear_resolves_to_a_module(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "m"))
    block = model.module.get_submodule(FAMILY.blocks)[0]
    linears = [
        name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    assert sorted(linears) == sorted(FAMILY.linears)
    assert sorted(linear for smooth in FAMILY.smooth for linear in smooth.into) == sorted(
        FAMILY.linears
    )
    for smooth in FAMILY.smooth:
        block.get_submodule(smooth.source)
    for path in (FAMILY.embed, FAMILY.final_norm, FAMILY.head):
        model.module.get_submodule(path)
    assert model.module.get_parameter(FAMILY.newline).shape == (model.text.hidden,)


def test_sample_model_answers_as_transformers_loads_it(tmp_path: Path) -> None:
    shutil.copytree(SAMPLE, tmp_path / "m")
    ours = load(tmp_path / "m")
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "m", dtype=torch.float32
    )
    inputs = ours.processor.inputs("how many objects are there ?", [picture(48, 48)])
    found = ours.module.generate(**inputs.tensors(), max_new_tokens=8)
    assert torch.equal(found, theirs.generate(**inputs.tensors(), max_new_tokens=8))
    assert ours.module.generation_config.max_new_tokens == 40


def _merged(model: LoadedModel, tiles: np.ndarray, inputs: Any) -> np.ndarray:
    return merge_images(
        tiles,
        image_sizes=inputs.image_sizes,
        tiles_per_image=inputs.tiles_per_image,
        newline=model.module.get_parameter(FAMILY.newline).numpy(),
        config=model.config,
    )
