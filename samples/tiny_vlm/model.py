"""tiny-llava-ov before training: a genuine LlavaOnevisionForConditionalGeneration, 4.4 M parameters.

vision   SigLIP, 48 pixels, patch 8 (36 patches), width 128, 3 layers
bridge   two-layer projector; base view 36 tokens + 6 rows of 6 patches and a newline = 78
decoder  Qwen2, hidden 256, 5 layers, MLP 768, 8 heads x 32, 2 key/value heads, tied embeddings
"""

from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from mbq_export.calibrate.shapes_drawing import SIZE
from mbq_export.calibrate.shapes_questions import WORDS
from mbq_export.writing import json_bytes, partial_path, publish

PATCH: Final = 8
PATCHES: Final = (SIZE // PATCH) ** 2
VOCABULARY_SIZE: Final = 64  # 61 words and marks; the rest makes the matrix a multiple of 64.
SPECIAL: Final = ("<pad>", "<eos>", "<image>", "<video>", "<q>", "<a>", "<unk>")
TOKEN_IDS: Final = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}

# What the three text parts of a chat message become; an image is the one word <image>.
CHAT_TEMPLATE: Final = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<a> ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ ' <eos>' }}"
    "{% else %}{% if m['content'] is string %}{{ '<q> ' + m['content'] + ' ' }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}{{ '<q> ' }}{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def build_model(seed: int) -> LlavaOnevisionForConditionalGeneration:
    """Return the model with random weights that follow from `seed`."""
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    hidden = 256
    text = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.8 / hidden**0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=TOKEN_IDS["<eos>"],
        pad_token_id=TOKEN_IDS["<pad>"],
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_IDS["<image>"],
        video_token_index=TOKEN_IDS["<video>"],
        image_grid_pinpoints=[[SIZE, SIZE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlavaOnevisionForConditionalGeneration(config)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word tokenizer: lower case, split at blanks and punctuation, 61 tokens."""
    padding, end, unknown = "<pad>", "<eos>", "<unk>"
    words = Tokenizer(models.WordLevel(dict(TOKEN_IDS), unk_token=unknown))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=padding,
        eos_token=end,
        unk_token=unknown,
        padding_side="left",
        model_max_length=512,
        # Added tokens: 78 <image> in a row have no blanks between them to split at.
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "question_token": "<q>",
            "answer_token": "<a>",
        },
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def processor_settings() -> dict[str, Any]:
    """Return processor_config.json.

    Written as data, because making a LlavaOnevisionProcessor needs torchvision.
    """
    picture: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIZE, "width": SIZE},
    }
    image_processor = {
        **picture,
        "do_pad": True,
        "image_grid_pinpoints": [[SIZE, SIZE]],
        "image_processor_type": "LlavaOnevisionImageProcessor",
    }
    video_processor = {
        **picture,
        "do_sample_frames": False,
        "return_metadata": False,
        "video_processor_type": "LlavaOnevisionVideoProcessor",
    }
    return {
        "image_processor": image_processor,
        "image_token": "<image>",
        "num_image_tokens": PATCHES,
        "processor_class": "LlavaOnevisionProcessor",
        "video_processor": video_processor,
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
    }


def write_folder(model: LlavaOnevisionForConditionalGeneration, folder: Path) -> None:
    """Write a Hugging Face folder: fp16 weights, settings, tokenizer, chat template.

    Leaves `model` in float16.
    """
    partial = partial_path(folder)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=TOKEN_IDS["<eos>"],
        pad_token_id=TOKEN_IDS["<pad>"],
    )
    model.half().save_pretrained(partial)
    tokenizer = build_tokenizer()
    tokenizer.init_kwargs["processor_class"] = "LlavaOnevisionProcessor"
    tokenizer.save_pretrained(partial)
    (partial / "processor_config.json").write_bytes(json_bytes(processor_settings()))
    publish(partial, folder)
