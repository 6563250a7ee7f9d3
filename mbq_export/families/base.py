"""What a vision-language model is to this project: data, and four hooks where models really differ.

    picture ──► vision_module ──► merge_images ──┐ rows at the image-token positions
    prompt  ──► Processor ──► input_ids ──► embed ──► blocks ──► final norm ──► head
                                  └──► token_masks: prompt, vision or answer, one class per token

Everything that other stages know about a model is here; no stage branches on a family's name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

    from mbq_export.families.inputs import Processor
    from mbq_export.families.tower import TowerPlace
    from mbq_export.families.weights import SourceWeights

PAD: Final = 0
PROMPT: Final = 1
VISION: Final = 2
ANSWER: Final = 3
TOKEN_CLASSES: Final = {PAD: "pad", PROMPT: "prompt", VISION: "vision", ANSWER: "answer"}

LINEARS: Final = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The seven linears of a gated decoder block, relative to the block, in model order."""

Unit = Literal["qkv", "o", "gate_up", "down"]
Config = Mapping[str, Any]
"""A model's config.json, read by `reading.read_json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShape:
    """The decoder, as far as it takes to write its graph.

    Attributes:
        layers: Number of blocks.
        hidden: Width of the residual stream.
        heads: Query heads, H.
        kv_heads: Key and value heads; divides `heads`.
        head_dim: Width of one head, D.
        intermediate: Width inside the MLP.
        vocab: Rows of the embedding and of the head.
        norm_eps: Epsilon of every RMS norm.
        rope_theta: Base of the rotary frequencies.
        max_positions: Longest sequence the model was trained for.
        qkv_bias: Whether q, k and v have a bias.
        o_bias: Whether the attention output has a bias.
        qk_norm: Whether q and k are normalized per head before rotation.
        activation: Gate activation of the MLP.
        rope: Kind of positions: "1d" or "mrope".
        tied_head: Whether head and embedding are one tensor.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    activation: str = "silu"
    rope: str = "1d"
    tied_head: bool = False


def linear_shapes(text: TextShape) -> dict[str, tuple[int, int]]:
    """(N, K) of the seven linears of a block."""
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    return {
        "self_attn.q_proj": (queries, text.hidden),
        "self_attn.k_proj": (keys, text.hidden),
        "self_attn.v_proj": (keys, text.hidden),
        "self_attn.o_proj": (text.hidden, queries),
        "mlp.gate_proj": (text.intermediate, text.hidden),
        "mlp.up_proj": (text.intermediate, text.hidden),
        "mlp.down_proj": (text.hidden, text.intermediate),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionShape:
    """One tile as the vision tower sees it.

    Attributes:
        image_size: Side of a tile in pixels.
        patch_size: Side of a patch in pixels.
        channels: Colour channels.
        tokens_per_tile: Rows of features that one tile yields.
    """

    image_size: int
    patch_size: int
    channels: int
    tokens_per_tile: int

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Smooth:
    """One place where a per-channel scale can be folded without changing the function.

    Paths are relative to a decoder block.

    Attributes:
        source: Module whose output channels are divided by the scale: a norm, or a linear.
        into: Linears whose input channels are multiplied by it.
        unit: Name of the place in scales and reports.
    """

    source: str
    into: tuple[str, ...]
    unit: Unit


SMOOTH: Final = (
    Smooth(
        source="input_layernorm",
        into=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        unit="qkv",
    ),
    Smooth(source="self_attn.v_proj", into=("self_attn.o_proj",), unit="o"),
    Smooth(
        source="post_attention_layernorm", into=("mlp.gate_proj", "mlp.up_proj"), unit="gate_up"
    ),
    Smooth(source="mlp.up_proj", into=("mlp.down_proj",), unit="down"),
)
"""The four places of a pre-norm, gated decoder block, in the order they are searched."""


class Load(Protocol):
    """Read a model folder."""

    def __call__(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        meta_blocks: bool = False,
        ignore_extra: Sequence[str] = (),
        weights: "SourceWeights | None" = None,
    ) -> "LoadedModel":
        """Check every file first, then build the model in eval mode without gradients.

        Args:
            folder: As saved by transformers.
            dtype: "float32", "float16" or "bfloat16"; weights are cast while they are read.
            meta_blocks: Leave the decoder blocks on the meta device, for streaming them one at a
                time from `LoadedModel.weights`; everything else is loaded.
            ignore_extra: Regular expressions of stored tensors that may be ignored.
            weights: Read tensors from here, not from the folder's own files: a quantized checkpoint that
                dequantizes while it is read.

        Raises:
            FormatError: E40xx for the config, E41xx for weights, E42xx for the processor files.
        """


class Check(Protocol):
    """Find what is wrong with a model folder before anything is computed from it."""

    def __call__(
        self,
        folder: Path,
        *,
        ignore_extra: Sequence[str] = (),
        weights: "SourceWeights | None" = None,
    ) -> None:
        """Read headers only, and raise what `Load` would.

        Args:
            folder: As saved by transformers.
            ignore_extra: Regular expressions of stored tensors that may be ignored.
            weights: Check these, not the folder's own files.

        Raises:
            FormatError: E40xx for the config, E41xx for weights, E42xx for the processor files.
        """


class TokenMasks(Protocol):
    """Give every token of a sample its class."""

    def __call__(
        self, input_ids: NDArray[np.int64], *, answer: NDArray[np.bool_], config: Config
    ) -> NDArray[np.int8]:
        """Classify.

        Args:
            input_ids: (T,), image tokens already expanded, no padding.
            answer: (T,), true for answer content and its end-of-turn token.
            config: The model's config.

        Returns:
            (T,) of `PROMPT`, `VISION` and `ANSWER`.
        """


class MergeImages(Protocol):
    """Turn the features of tiles into rows for the image-token positions."""

    def __call__(
        self,
        features: NDArray[np.floating],
        *,
        image_sizes: NDArray[np.int64],
        tiles_per_image: NDArray[np.int64],
        newline: NDArray[np.floating],
        config: Config,
    ) -> NDArray[np.floating]:
        """Pack.

        Args:
            features: (tiles, tokens_per_tile, hidden), the tiles of all images one after the other.
            image_sizes: (images, 2), height and width of each picture before any resizing.
            tiles_per_image: (images,).
            newline: (hidden,), the learned end of an image row.
            config: The model's config.

        Returns:
            (image tokens, hidden), in the dtype of `features`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """One kind of vision-language model.

    Attributes:
        name: The name users see.
        model_type: ``model_type`` in config.json.
        architectures: Classes in config.json that this family reads.
        aliases: Short names to hub ids. The id of a model shipped with the project is empty.
        blocks: Module path of the list of decoder blocks.
        embed: Module path of the token embedding.
        final_norm: Module path of the norm after the last block.
        head: Module path of the output head.
        newline: Tensor path of the learned end of an image row.
        linears: Linears of a block, relative to it, in model order.
        smooth: Places for channel scales, relative to a block.
        text_shape: Decoder sizes out of a config; checks every field it reads (E4003, E4005).
        vision_shape: Tile sizes out of a config; checks likewise.
        load: Reads a model folder.
        check: Checks one.
        token_masks: Classifies tokens.
        vision_module: Tower and projector as one torch module: (tiles, 3, h, w) to (tiles,
            tokens_per_tile, hidden). Shares the loaded model's weights.
        tower_places: Linears of the tower that `vision_module` runs and that may be rounded to 8 bits, in its order.
        merge_images: Packs features on the host.
        renames: Regular expressions over stored names and what replaces them, for tensors by module path.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    aliases: Mapping[str, str]
    blocks: str
    embed: str
    final_norm: str
    head: str
    newline: str
    linears: tuple[str, ...]
    smooth: tuple[Smooth, ...]
    text_shape: Callable[[Config], TextShape]
    vision_shape: Callable[[Config], VisionShape]
    load: Load
    check: Check
    token_masks: TokenMasks
    vision_module: Callable[["LoadedModel"], "nn.Module"]
    tower_places: Callable[["LoadedModel"], "tuple[TowerPlace, ...]"]
    merge_images: MergeImages
    renames: Sequence[tuple[str, str]] = ()

    def linear_path(self, block: int, linear: str) -> str:
        """Module path of one linear, for example ``model.language_model.layers.0.mlp.up_proj``."""
        return f"{self.blocks}.{block}.{linear}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in memory, in eval mode, no parameter requiring a gradient.

    Attributes:
        family: What it is.
        folder: Where it came from.
        config: config.json as read.
        text: Decoder sizes.
        vision: Tile sizes.
        module: The transformers model; decoder blocks may be on the meta device.
        processor: Text and pictures to inputs.
        weights: The checked files behind `module`, by module path: what streaming reads blocks from.
    """

    family: ModelFamily
    folder: Path
    config: Config
    text: TextShape
    vision: VisionShape
    module: "nn.Module"
    processor: "Processor"
    weights: "SourceWeights"

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands for one row of image features."""
        return self.processor.image_token_id
