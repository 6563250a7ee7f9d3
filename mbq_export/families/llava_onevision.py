"""LLaVA-OneVision: a SigLIP tower, a two-layer projector and a Qwen2 decoder.

    picture ──► base view (one tile) + grid of tiles chosen by its shape ──► tower, projector
    features of the grid ──► un-pad ──► shrink if there are too many ──► newline after each row
    one picture = base rows, then grid rows; of several pictures each is one tile and one newline

Sources: "LLaVA-OneVision: Easy Visual Task Transfer", sections 3.1 and 3.2; transformers 5.23,
``modeling_llava_onevision.py``, which the tests compare with, number for number.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import UsageError, located
from mbq_export.families.anyres import AnyResolution, pack_grid
from mbq_export.families.base import (
    ANSWER,
    LINEARS,
    PROMPT,
    SMOOTH,
    VISION,
    Config,
    LoadedModel,
    ModelFamily,
    TextShape,
    VisionShape,
)
from mbq_export.families.fields import Fields
from mbq_export.families.inputs import Processor
from mbq_export.families.loading import (
    DTYPES,
    checked_weights,
    empty_module,
    materialise,
    native_config,
    read_generation_config,
    refuse_quantized,
)
from mbq_export.families.locate import read_config
from mbq_export.families.tower import TowerPlace, siglip_places
from mbq_export.families.weights import SourceWeights

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

NAME: Final = "llava_onevision"
ARCHITECTURE: Final = "LlavaOnevisionForConditionalGeneration"
CONFIG: Final = "LlavaOnevisionConfig"
ANYRES: Final = "anyres_max_"

RENAMES: Final = (
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.model\.", "model.language_model."),
    (r"^(language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", r"model.\1"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
"""Names before transformers 5, and as its `save_pretrained` still writes them."""

HARMLESS: Final = (
    r"rotary_emb\.inv_freq$",
    r"position_ids$",
    # The pooling head of SigLIP, which this family never runs.
    r"^model\.vision_tower\.head\.",
)


def text_shape(config: Config) -> TextShape:
    """Read the decoder's sizes; defaults are those of transformers' Qwen2Config.

    Raises:
        FormatError: E4003 for a field that is missing or out of range, E4005 for a variant that is not
            supported.
    """
    fields = _fields(config)
    text = fields.section("text_config")
    text.choice("model_type", ("qwen2",), default="qwen2")
    heads = text.integer("num_attention_heads", high=1024)
    kv_heads = text.integer("num_key_value_heads", high=heads, default=32)
    hidden = text.integer("hidden_size", high=1 << 17)
    if heads % kv_heads:
        text.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    if "head_dim" not in text.values and hidden % heads:
        text.refuse("hidden_size", hidden, f"a multiple of num_attention_heads {heads}")
    layers = text.integer("num_hidden_layers", high=1024)
    _refuse_variants(text, layers)
    return TextShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=text.integer("head_dim", high=1024, default=hidden // heads),
        intermediate=text.integer("intermediate_size", high=1 << 20),
        vocab=text.integer("vocab_size"),
        norm_eps=text.number("rms_norm_eps", low=1e-12, high=1e-2, default=1e-6),
        rope_theta=_rope_theta(text),
        max_positions=text.integer("max_position_embeddings", default=32768),
        qkv_bias=True,
        o_bias=False,
        qk_norm=False,
        activation=text.choice("hidden_act", ("silu",), default="silu"),
        tied_head=fields.flag("tie_word_embeddings", default=False)
        or text.flag("tie_word_embeddings", default=False),
    )


def vision_shape(config: Config) -> VisionShape:
    """Read the tile sizes; defaults are those of the published models.

    Raises:
        FormatError: E4003 and E4005 likewise.
    """
    fields = _fields(config)
    vision = fields.section("vision_config")
    kind = vision.choice(
        "model_type", ("siglip_vision_model", "clip_vision_model"), default="siglip_vision_model"
    )
    strategy = fields.choice("vision_feature_select_strategy", ("full", "default"), default="full")
    # "default" drops the class token, which CLIP has and SigLIP has not; packing needs a full square.
    if (kind == "clip_vision_model") != (strategy == "default"):
        fields.unsupported(
            "vision_feature_select_strategy",
            strategy,
            f"a {kind} yields no square of patches with it",
        )
    _feature_layers(config, vision.integer("num_hidden_layers", high=512, default=26))
    _largest_grid(config)
    image = vision.integer("image_size", high=4096, default=384)
    patch = vision.integer("patch_size", high=image, default=14)
    for height, width in _pinpoints(config):
        if height % image or width % image:
            fields.refuse("image_grid_pinpoints", [height, width], f"multiples of {image} pixels")
    return VisionShape(
        image_size=image,
        patch_size=patch,
        channels=vision.integer("num_channels", low=3, high=3, default=3),
        tokens_per_tile=(image // patch) ** 2,
    )


def load(
    folder: Path,
    *,
    dtype: str = "float32",
    meta_blocks: bool = False,
    ignore_extra: Sequence[str] = (),
    weights: SourceWeights | None = None,
) -> LoadedModel:
    """Read a model folder; see `base.Load`.

    Args:
        folder: As saved by transformers.
        dtype: One of "float32", "float16", "bfloat16".
        meta_blocks: Leave the decoder blocks on the meta device.
        ignore_extra: Regular expressions of stored tensors that may be ignored.
        weights: Read tensors from here, not from the folder's own files.

    Raises:
        FormatError: E40xx for the config, E41xx for weights, E42xx for the processor files.
        UsageError: E2001 for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UsageError(
            "E2001",
            f"Unknown dtype {dtype!r}.",
            why=f"known: {', '.join(DTYPES)}",
            fix="--dtype fp32",
        )
    with located(folder.name):
        empty = _checked(folder, dtype=dtype, ignore_extra=ignore_extra, weights=weights)
        skip = FAMILY.blocks if meta_blocks else ""
        module = cast("PreTrainedModel", empty.module)
        materialise(module, empty.weights, family=FAMILY, skip=skip)
    return empty


def check(
    folder: Path, *, ignore_extra: Sequence[str] = (), weights: SourceWeights | None = None
) -> None:
    """Raise what `load` would, from headers alone."""
    with located(folder.name):
        _checked(folder, dtype=DTYPES[0], ignore_extra=ignore_extra, weights=weights)


def _checked(
    folder: Path, *, dtype: str, ignore_extra: Sequence[str], weights: SourceWeights | None
) -> LoadedModel:
    """Check every file and return the model, its weights still on the meta device."""
    config = read_config(folder)
    if weights is None:
        refuse_quantized(folder, config)
    text, vision = text_shape(config), vision_shape(config)
    module = empty_module(
        native_config(config, name=CONFIG), architecture=ARCHITECTURE, dtype=dtype
    )
    harmless = (*HARMLESS, *ignore_extra)
    weights = checked_weights(
        folder, module, family=FAMILY, renames=RENAMES, harmless=harmless, weights=weights
    )
    processor = Processor.from_folder(folder, FAMILY)
    read_generation_config(folder, module)
    return LoadedModel(
        family=FAMILY,
        folder=folder,
        config=config,
        text=text,
        vision=vision,
        module=module,
        processor=processor,
        weights=weights,
    )


def token_masks(
    input_ids: NDArray[np.int64], *, answer: NDArray[np.bool_], config: Config
) -> NDArray[np.int8]:
    """Classify tokens; see `base.TokenMasks`. Newline positions are image tokens too."""
    picture = [config.get("image_token_index", 151646), config.get("video_token_index", 151647)]
    classes = np.where(answer, ANSWER, PROMPT).astype(np.int8)
    classes[np.isin(input_ids, picture)] = VISION
    return classes


def vision_module(model: LoadedModel) -> "nn.Module":
    """Return tower and projector as one module, sharing the model's weights.

    Its forward takes (tiles, 3, h, w) and returns (tiles, tokens_per_tile, hidden). Layers after the last
    selected one are not run, and neither is the tower's last norm: features are hidden states.
    """
    import torch
    from torch import nn

    vision = model.config["vision_config"]
    layers = _feature_layers(model.config, vision.get("num_hidden_layers", 26))
    first_token = int(vision.get("model_type") == "clip_vision_model")

    class TowerAndProjector(nn.Module):
        """Pixels of tiles to rows of image features."""

        def __init__(self, tower: Any, projector: nn.Module) -> None:
            super().__init__()
            self.embeddings: nn.Module = tower.embeddings
            self.pre_norm: nn.Module = getattr(tower, "pre_layrnorm", nn.Identity())
            self.layers: nn.ModuleList = tower.encoder.layers[: max(layers)]
            self.projector = projector

        def forward(self, pixel_values: "torch.Tensor") -> "torch.Tensor":
            """Run one batch of tiles."""
            states = [self.pre_norm(self.embeddings(pixel_values))]
            for layer in self.layers:
                states.append(layer(states[-1], None))
            rows = [states[index][:, first_token:] for index in layers]
            features: torch.Tensor = self.projector(torch.cat(rows, dim=-1))
            return features

    part = model.module.get_submodule
    return TowerAndProjector(part("model.vision_tower"), part("model.multi_modal_projector")).eval()


def tower_places(model: LoadedModel) -> tuple[TowerPlace, ...]:
    """Return the linears of all layers that `vision_module` runs."""
    count = model.config["vision_config"].get("num_hidden_layers", 26)
    layers = range(max(_feature_layers(model.config, count)))
    return siglip_places(*(f"model.vision_tower.encoder.layers.{layer}" for layer in layers))


def merge_images(
    features: NDArray[np.floating],
    *,
    image_sizes: NDArray[np.int64],
    tiles_per_image: NDArray[np.int64],
    newline: NDArray[np.floating],
    config: Config,
) -> NDArray[np.floating]:
    """Pack features into image-token rows; see `base.MergeImages`."""
    shape = vision_shape(config)
    anyres = AnyResolution(
        side=shape.side,
        tile=shape.image_size,
        pinpoints=_pinpoints(config),
        most_tiles=_largest_grid(config),
    )
    packed = [np.empty((0, features.shape[-1]), features.dtype)]
    starts = np.cumsum(tiles_per_image) - tiles_per_image
    for start, count, size in zip(starts, tiles_per_image, image_sizes, strict=True):
        base, grid = features[start], features[start + 1 : start + count]
        packed.append(base)
        if count == 1:
            packed.append(newline[None].astype(features.dtype))
        else:
            height, width = int(size[0]), int(size[1])
            packed.append(pack_grid(grid, (height, width), newline, anyres))
    return np.concatenate(packed)


def _fields(config: Config) -> Fields:
    return Fields(values=config, place="config", family=NAME)


def _pinpoints(config: Config) -> Sequence[Sequence[int]]:
    """Return the canvases (height, width) a picture may be laid on; by default 6 x 6 tiles of 384."""
    steps = range(384, 2305, 384)
    found = config.get("image_grid_pinpoints") or [[high, wide] for high in steps for wide in steps]
    if not isinstance(found, list) or len(found) > 4096 or not all(map(_is_size, found)):
        _fields(config).refuse("image_grid_pinpoints", found, "a list of [height, width]")
    return found


def _is_size(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int and 0 < number <= 1 << 16 for number in value)
    )


def _feature_layers(config: Config, count: int) -> tuple[int, ...]:
    """Return the selected hidden states, counted from 0, the tower's embedding."""
    found = config.get("vision_feature_layer", -1)
    chosen = found if isinstance(found, list) else [found]
    if not chosen or not all(type(n) is int and -count - 1 <= n <= count for n in chosen):
        _fields(config).refuse(
            "vision_feature_layer", found, f"whole numbers from {-count - 1} to {count}"
        )
    return tuple(n % (count + 1) for n in chosen)


def _largest_grid(config: Config) -> int:
    """Return the number in ``anyres_max_9``: more tiles' worth of tokens than this are shrunk."""
    found = config.get("vision_aspect_ratio", f"{ANYRES}9")
    number = found.removeprefix(ANYRES) if isinstance(found, str) else ""
    if not (number.isascii() and number.isdigit() and 0 < int(number[:6]) < 10**5):
        _fields(config).unsupported("vision_aspect_ratio", found, f"supported: {ANYRES}N")
    return int(number)


def _rope_theta(text: Fields) -> float:
    """Read the rotary base, in the form of transformers 5 or the earlier one."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.values.get(name)
        if isinstance(rope, dict):
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                text.unsupported(f"{name}.rope_type", kind, "supported: default")
            if "rope_theta" in rope:
                place = Fields(values=rope, place=f"text_config.{name}", family=NAME)
                return place.number("rope_theta", low=1.0, high=1e12)
    return text.number("rope_theta", low=1.0, high=1e12, default=10000.0)


def _refuse_variants(text: Fields, layers: int) -> None:
    """Refuse what would change the decoder's function and is not written by the exporter."""
    if text.flag("use_sliding_window", default=False):
        text.unsupported("use_sliding_window", value=True, why="attention over a window only")
    kinds = text.values.get("layer_types") or ["full_attention"] * layers
    if not isinstance(kinds, list) or len(kinds) != layers:
        text.refuse("layer_types", kinds, f"a list of {layers} names")
    for kind in kinds:
        if kind != "full_attention":
            text.unsupported("layer_types", kind, "supported: full_attention")
    for name in ("num_experts", "num_local_experts"):
        if text.values.get(name):
            text.unsupported(name, text.values[name], "a mixture of experts")


FAMILY: Final = ModelFamily(
    name=NAME,
    model_type="llava_onevision",
    architectures=(ARCHITECTURE,),
    aliases={
        "tiny-llava-ov": "",
        "llava-ov-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-ov-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-ov-72b": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
    },
    blocks="model.language_model.layers",
    embed="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
    head="lm_head",
    newline="model.image_newline",
    linears=LINEARS,
    smooth=SMOOTH,
    text_shape=text_shape,
    vision_shape=vision_shape,
    load=load,
    check=check,
    token_masks=token_masks,
    vision_module=vision_module,
    tower_places=tower_places,
    merge_images=merge_images,
    renames=RENAMES,
)
