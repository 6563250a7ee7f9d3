"""A checkpoint's decoder on the kernels: packed weights stay packed, on a CPU or a GPU.

    checkpoint ── packed ── fused q|k|v, gate|up ── tile ──► Decoder ──► engine   embeddings, positions -> logits

Not the oracle, which is the model's own code on dequantized weights (`torch.fake_quant_model`). On a CPU the
operators compute in float32 by the schemes' oracles: slow, and for checking. On a GPU they are the kernels.

The engine keeps keys and values of one sequence to itself; a call whose first position is 0 begins a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from mbq_export.backends.base import TensorSpec
from mbq_export.backends.torch import BATCH, FLOAT, SEQUENCE, TorchEngine
from mbq_export.errors import FormatError, InternalError, MachineError, UsageError
from mbq_export.families import FAMILIES
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.layouts.tiles import fused, reason_to_keep_apart, tile
from mbq_export.schemes.oracle import dequantized
from mbq_kernels.decoder import Decoder
from mbq_kernels.decoder_weights import (
    BlockWeights,
    DecoderShape,
    DecoderWeights,
    DenseWeight,
    Linear,
)
from mbq_kernels.weights import device_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.families.base import TextShape
    from mbq_export.schemes.base import PackedWeight
    from mbq_export.schemes.layouts.tiles import RowOrder

DEVICES: Final = ("auto", "cpu", "cuda")
BFLOAT16: Final = "bfloat16"


def device_of(name: str) -> torch.device:
    """Choose where to compute.

    Args:
        name: One of `DEVICES`; ``auto`` takes a GPU if there is one.

    Raises:
        UsageError: E2001 for another name.
        MachineError: E3001 if there is no GPU that torch can use.
    """
    if name not in DEVICES:
        raise UsageError(
            "E2001",
            f"Unknown device {name!r}.",
            why=f"known: {', '.join(DEVICES)}",
            fix=tuple(f"--device {known}" for known in DEVICES),
        )
    here = torch.cuda.is_available()
    if name == "cuda" and not here:
        raise MachineError(
            "E3001",
            "torch finds no NVIDIA GPU.",
            why=f"torch {torch.__version__} reports no CUDA device",
            fix=("--device cpu", "mbq-export doctor"),
        )
    return torch.device("cuda" if here and name != "cpu" else "cpu")


def dtype_on(device: torch.device, checkpoint: QuantCheckpoint) -> torch.dtype:
    """Type of activations: float32 on a CPU, on a GPU the half that the model was trained in."""
    if device.type == "cpu":
        return torch.float32
    config = checkpoint.config
    trained = config.get("dtype") or config.get("text_config", {}).get("dtype")
    return torch.bfloat16 if trained == BFLOAT16 else torch.float16


def open_kernel_decoder(
    checkpoint: QuantCheckpoint, *, device: torch.device, dtype: torch.dtype, slots: int
) -> TorchEngine:
    """Load the decoder of a checkpoint onto a device.

    Args:
        checkpoint: Opened.
        device: From `device_of`.
        dtype: Of activations and cache, usually from `dtype_on`.
        slots: Positions of its cache.

    Raises:
        FormatError: E4005 for a kind of decoder that is not supported, E41xx for tensors.
    """
    decoder = load_decoder(checkpoint, device=device, dtype=dtype, slots=slots)
    text = FAMILIES[checkpoint.info["model"]["family"]].text_shape(checkpoint.config)
    return TorchEngine(
        "decoder",
        inputs=(
            TensorSpec(name="inputs_embeds", dtype=FLOAT, shape=(BATCH, SEQUENCE, text.hidden)),
            TensorSpec(name="position_ids", dtype="int64", shape=(BATCH, SEQUENCE)),
            TensorSpec(name="sequence", dtype="int64", shape=(1,)),
        ),
        outputs=(TensorSpec(name="logits", dtype=FLOAT, shape=(BATCH, 1, text.vocab)),),
        act=_OneSequence(decoder),
    )


def load_decoder(
    checkpoint: QuantCheckpoint, *, device: torch.device, dtype: torch.dtype, slots: int
) -> Decoder:
    """Load the decoder itself; arguments and errors as of `open_kernel_decoder`."""
    family = FAMILIES[checkpoint.info["model"]["family"]]
    text = family.text_shape(checkpoint.config)
    _check_kind(text)
    source = _Source(checkpoint=checkpoint, device=device, dtype=dtype)
    weights = DecoderWeights(
        embed=source.tensor(f"{family.embed}.weight"),
        blocks=tuple(source.block(f"{family.blocks}.{layer}") for layer in range(text.layers)),
        final_norm=source.tensor(f"{family.final_norm}.weight"),
        head=source.linear(family.head),
    )
    shape = DecoderShape(
        layers=text.layers,
        hidden=text.hidden,
        heads=text.heads,
        kv_heads=text.kv_heads,
        head_dim=text.head_dim,
        intermediate=text.intermediate,
        vocab=text.vocab,
        norm_eps=text.norm_eps,
        rope_theta=text.rope_theta,
        qkv_bias=text.qkv_bias,
    )
    return Decoder(shape, weights, slots=slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A checkpoint, read as what kernels take.

    Attributes:
        checkpoint: Opened.
        device: Where tensors go.
        dtype: Of everything that is not packed.
    """

    checkpoint: QuantCheckpoint
    device: torch.device
    dtype: torch.dtype

    def tensor(self, name: str) -> Tensor:
        values = np.array(self.checkpoint.tensor(name), np.float32)
        return torch.from_numpy(values).to(self.device, self.dtype)

    def block(self, path: str) -> BlockWeights:
        attention, mlp = f"{path}.self_attn", f"{path}.mlp"
        return BlockWeights(
            input_norm=self.tensor(f"{path}.input_layernorm.weight"),
            qkv=self.together([f"{attention}.{part}_proj" for part in "qkv"], "concat"),
            o=self.linear(f"{attention}.o_proj"),
            post_norm=self.tensor(f"{path}.post_attention_layernorm.weight"),
            gate_up=self.together([f"{mlp}.gate_proj", f"{mlp}.up_proj"], "interleave16"),
            down=self.linear(f"{mlp}.down_proj"),
        )

    def together(self, names: list[str], row_order: RowOrder) -> tuple[Linear, ...]:
        """One linear of several where formats allow it, else one per name."""
        records = [self.checkpoint.records.get(name) for name in names]
        schemes = {None if record is None else record.scheme.name for record in records}
        if None in schemes or len(schemes) > 1:
            return tuple(self.linear(name) for name in names)
        parts = [self.checkpoint.packed(name) for name in names]
        if reason_to_keep_apart(parts, row_order=row_order) is not None:
            return tuple(self.linear(name) for name in names)
        return (self._tiled(fused(parts, row_order=row_order), str(schemes.pop())),)

    def linear(self, name: str) -> Linear:
        record = self.checkpoint.records.get(name)
        if record is not None:
            packed = self.checkpoint.packed(name)
            if record.scheme.kernel_layout is None and not record.scheme.rounds_activations:
                return self._dense(packed)
            return self._tiled(packed, record.scheme.name)
        bias = f"{name}.bias"
        return DenseWeight(
            weight=self.tensor(f"{name}.weight"),
            bias=self.tensor(bias) if self.checkpoint.has(bias) else None,
        )

    def _dense(self, packed: PackedWeight) -> Linear:
        """Codes that no kernel reads, an 8-bit head's, as numbers."""
        values = torch.from_numpy(dequantized(packed).astype(np.float32))
        bias = None if packed.bias is None else torch.from_numpy(packed.bias.astype(np.float32))
        return DenseWeight(
            weight=values.to(self.device, self.dtype),
            bias=None if bias is None else bias.to(self.device, self.dtype),
        )

    def _tiled(self, packed: PackedWeight, scheme: str) -> Linear:
        tiled = tile(packed, scheme=SCHEMES[scheme])
        return device_weight(tiled, dtype=self.dtype, device=self.device)


class _OneSequence:
    """Reads one sequence at a time, in order and without gaps."""

    def __init__(self, decoder: Decoder) -> None:
        """Begin with an empty cache."""
        self._decoder = decoder
        self._number = 0

    def __call__(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor]:
        """Read new positions; (1, 1, V) logits of the last."""
        decoder, embeds = self._decoder, feeds["inputs_embeds"]
        start, count = int(feeds["position_ids"][0, 0]), feeds["position_ids"].shape[1]
        number = int(feeds["sequence"])
        if start == 0:
            decoder.reset()
            self._number = number
        whole = len(embeds) == 1 and embeds.shape[1] == count
        if not whole or (number, start) != (self._number, decoder.length):
            raise InternalError(
                "E9001",
                f"The decoder was asked for {embeds.shape[1]} positions of sequence {number} from {start} on; "
                f"its cache holds {decoder.length} of sequence {self._number}.",
                why="it reads one sequence from its start, without gaps",
            )
        rows = embeds[0].to(decoder.device, decoder.dtype)
        logits = decoder.decode_step(rows) if count == 1 else decoder.prefill(rows)
        # A copy: the decoder writes the next logits to the same place.
        return (logits.clone()[None, None],)


def _check_kind(text: TextShape) -> None:
    odd = {
        f"positions of kind {text.rope}": text.rope != "1d",
        "norms of q and k": text.qk_norm,
        f"activation {text.activation}": text.activation != "silu",
    }
    found = [what for what, is_so in odd.items() if is_so]
    if found:
        raise FormatError(
            "E4005",
            f"The decoder has {' and '.join(found)}.",
            why="the torch backend runs rotary positions of one axis, silu and no norms of q and k",
            fix="--backend oracle",
        )
