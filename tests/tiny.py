"""A tiny random LLaVA-OneVision folder, as transformers saves one: real classes, 0.4 M parameters, no training.

Tokenizer, chat template and image settings are those of the sample model, so prompts and pictures work.
`tiny_checkpoint` makes a quantized checkpoint of it, with random channel scales folded in.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.families import FAMILIES
from mbq_export.families.base import LoadedModel
from mbq_export.quantize import quantize
from mbq_export.quantize.head import head_format
from mbq_export.schemes import SCHEMES

SAMPLE_WEIGHTS = Path(__file__).parents[1] / "samples" / "tiny_vlm" / "weights"
PROCESSOR_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

WORDS = 60  # token 0 pads, 1 ends, 5 begins an answer
STEP = 14
ANSWER = "? diamond red"  # what follows token 5 in steps of 14: 19, 33, 47, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """Sizes and traits of the model to make; the defaults fit group sizes 32, 64 and 128.

    Attributes:
        layers: Decoder blocks.
        hidden: Width of the residual stream, a multiple of ``32 * heads`` for 32-wide heads.
        intermediate: Width inside the MLP.
        heads: Query heads.
        kv_heads: Key and value heads.
        tied: Whether head and embedding are one tensor.
        dtype: Dtype of the weights in the file.
        seed: Seed of the weights.
        walks: Whether the embedding alone decides what comes next, so that every answer is `ANSWER` and its
            end. Answers of random weights loop, which a build refuses. Needs a head of its own.
    """

    layers: int = 2
    hidden: int = 128
    intermediate: int = 256
    heads: int = 4
    kv_heads: int = 2
    tied: bool = True
    dtype: str = "float16"
    seed: int = 0
    walks: bool = False


def write_tiny(folder: Path, tiny: Tiny | None = None) -> Path:
    """Write the model and its processor files into ``folder`` and return it."""
    tiny = tiny or Tiny()
    with torch.random.fork_rng():
        torch.manual_seed(tiny.seed)
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**_config(tiny)))
        _stir(model)
        if tiny.walks:
            _walk(model)
    model.to(getattr(torch, tiny.dtype)).save_pretrained(folder)
    for name in PROCESSOR_FILES:
        shutil.copyfile(SAMPLE_WEIGHTS / name, folder / name)
    return folder


def load_tiny(folder: Path, tiny: Tiny | None = None) -> LoadedModel:
    """Write the model into ``folder`` and load it."""
    return FAMILIES["llava_onevision"].load(write_tiny(folder, tiny))


def random_scales(model: LoadedModel, *, seed: int = 0) -> ChannelScales:
    """Scales between 1/4 and 4 for every unit of every block, as a calibration would hand them on."""
    rng = np.random.default_rng(seed)
    text = model.text
    widths = {"qkv": text.hidden, "gate_up": text.hidden, "down": text.intermediate}
    scales = {}
    for layer in range(text.layers):
        for unit, width in widths.items():
            scales[f"layers.{layer}.{unit}.e"] = 4 ** rng.uniform(-1, 1, width)
        shared = 4 ** rng.uniform(-1, 1, (text.kv_heads, 1, text.head_dim))
        copies = (text.kv_heads, text.heads // text.kv_heads, text.head_dim)
        scales[f"layers.{layer}.o.e"] = np.broadcast_to(shared, copies).reshape(-1)
    return ChannelScales(
        scales={name: e.astype(np.float32) for name, e in scales.items()},
        sensitivity={},
        calib={"switches": Switches(method="mbq").resolved()},
    )


def tiny_checkpoint(
    folder: Path,
    model: LoadedModel,
    *,
    scheme: str | None = "w3a16",
    group_size: int = 64,
    head_bits: int = 16,
) -> QuantCheckpoint:
    """Quantize with `random_scales` into ``folder``; without a scheme nothing is rounded."""
    return quantize(
        model,
        random_scales(model),
        scheme=None if scheme is None else SCHEMES[scheme],
        group_size=group_size,
        out=folder,
        head=head_format(head_bits, model.text.hidden),
    )


def _config(tiny: Tiny) -> dict[str, Any]:
    """The sample's config at other sizes: token ids and picture settings must stay its own."""
    config: dict[str, Any] = json.loads((SAMPLE_WEIGHTS / "config.json").read_text())
    for key in ("architectures", "model_type", "transformers_version", "dtype"):
        config.pop(key)
    config["tie_word_embeddings"] = tiny.tied
    config["text_config"] |= {
        "hidden_size": tiny.hidden,
        "intermediate_size": tiny.intermediate,
        "layer_types": ["full_attention"] * tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.kv_heads,
        "tie_word_embeddings": tiny.tied,
    }
    config["vision_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    return config


def _stir(model: torch.nn.Module) -> None:
    """Give biases and norms values that matter: fresh ones are 0 and 1, which hides mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)


def _walk(model: LlavaOnevisionForConditionalGeneration) -> None:
    """Let the embedding outweigh the blocks, and the head read it off as another word."""
    ids = torch.arange(1, WORDS + 1)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight.normal_()
        model.lm_head.weight[ids.sub(1).add(STEP).remainder(WORDS).add(1)] = embedding[ids]
