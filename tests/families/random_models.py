"""Random LLaVA-OneVision folders in every form the family has: towers, tilings, layers, names, shards.

The tokenizer and chat template are those of the sample model; weights are random and tiny.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

SAMPLE = Path(__file__).parents[2] / "samples" / "tiny_vlm" / "weights"
TILE, PATCH = 24, 8
GRIDS = [[TILE * high, TILE * wide] for high in (1, 2, 3) for wide in (1, 2, 3)]
PROCESSOR_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of the family.

    Attributes:
        tower: Model type of the vision tower.
        feature_layer: Selected hidden states.
        most_tiles: The number in ``anyres_max_9``.
        pinpoints: Canvases.
        tied: Whether head and embedding are one tensor.
        text: More fields of text_config.
        dtype: Dtype on disk.
    """

    tower: str = "siglip_vision_model"
    feature_layer: int | list[int] = -1
    most_tiles: int = 9
    pinpoints: list[list[int]] = field(default_factory=lambda: GRIDS)
    tied: bool = True
    text: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


def config_of(form: Form) -> dict[str, Any]:
    """Config.json of a form, as a dictionary."""
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": form.pinpoints,
        "image_token_index": 2,
        "video_token_index": 3,
        "tie_word_embeddings": form.tied,
        "vision_aspect_ratio": f"anyres_max_{form.most_tiles}",
        "vision_feature_layer": form.feature_layer,
        "vision_feature_select_strategy": "default" if form.tower.startswith("clip") else "full",
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "max_position_embeddings": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
            "tie_word_embeddings": form.tied,
            "vocab_size": 64,
            **form.text,
        },
        "vision_config": {
            "model_type": form.tower,
            "hidden_size": 16,
            "image_size": TILE,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "patch_size": PATCH,
            **({"vision_use_head": False} if form.tower.startswith("siglip") else {}),
        },
    }


def write_model(folder: Path, form: Form | None = None) -> Path:
    """Write a folder of the form, with transformers' own `save_pretrained`."""
    form = form or Form()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**config_of(form)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(getattr(torch, form.dtype)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config_of(form)))
    write_processor(folder, form)
    return folder


def write_processor(folder: Path, form: Form) -> None:
    """Write tokenizer, chat template and picture settings that fit the form."""
    for name in PROCESSOR_FILES:
        shutil.copyfile(SAMPLE / name, folder / name)
    settings = json.loads((SAMPLE / "processor_config.json").read_text())
    class_token = form.tower.startswith("clip")
    settings["num_image_tokens"] = (TILE // PATCH) ** 2 + class_token
    settings["vision_aspect_ratio"] = f"anyres_max_{form.most_tiles}"
    settings["vision_feature_select_strategy"] = "default" if class_token else "full"
    settings["image_processor"] |= {
        "image_grid_pinpoints": form.pinpoints,
        "size": {"height": TILE, "width": TILE},
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def edit_json(path: Path, **changes: Any) -> None:
    """Change or (with None) remove top-level keys of a JSON file."""
    value = json.loads(path.read_text())
    for key, change in changes.items():
        value.pop(key, None)
        if change is not None:
            value[key] = change
    path.write_text(json.dumps(value))
