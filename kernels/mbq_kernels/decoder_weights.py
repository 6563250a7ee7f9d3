"""What a decoder of the Qwen2 or Llama kind is made of: sizes, weights, and random weights for timing.

    block    norm ─ q|k|v ─ rotation ─ attention ─ o ─ + ─ norm ─ gate|up ─ silu(gate) * up ─ down ─ +

q|k|v and gate|up are one linear each where their parts could be joined, else one linear per part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, QuantScheme
from mbq_export.schemes.layouts.tiles import TILE_COLUMNS, TILE_ROWS, padded
from mbq_kernels.weights import DeviceWeight

DENSE: Final = "fp16"
"""Name of the twin whose linears are plain matrices in the dtype of the activations."""
WORD_RANGE: Final = 2**31
_NIBBLES: Final = {3: 0x77777777, 4: -1}
"""Bits of a word of zero points that may be set, as int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes of a decoder.

    Attributes:
        layers: Number of blocks.
        hidden: Width of the residual stream.
        heads: Query heads, H.
        kv_heads: Key and value heads; divides ``heads``.
        head_dim: Width of one head, D, even.
        intermediate: Width inside the MLP.
        vocab: Rows of the embedding and of the head, V.
        norm_eps: Epsilon of every RMS norm.
        rope_theta: Base of the rotary frequencies.
        qkv_bias: Whether random weights give q, k and v a bias.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_bias: bool = True

    @property
    def qkv_rows(self) -> int:
        """Output features of q|k|v."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one position keeps."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


LLAVA_OV_7B: Final = DecoderShape(
    layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, intermediate=18944, vocab=152064
)
"""Sizes of the decoder of LLaVA-OneVision 7B, which is Qwen2 7B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeight:
    """A linear that is not quantized.

    Attributes:
        weight: (N, K) in the dtype of the activations.
        bias: (N,) likewise, or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weights reads."""
        return self.weight.nbytes


Linear = DeviceWeight | DenseWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """One decoder block.

    Attributes:
        input_norm: (hidden,) of the norm before attention.
        qkv: One linear of q, k and v, in this order along N, or three.
        o: Attention output.
        post_norm: (hidden,) of the norm before the MLP.
        gate_up: Gate and up as two linears, or as one: a `DeviceWeight` has its rows interleaved by 16, a
            `DenseWeight` has all rows of gate first.
        down: MLP output.
    """

    input_norm: Tensor
    qkv: tuple[Linear, ...]
    o: Linear
    post_norm: Tensor
    gate_up: tuple[Linear, ...]
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All of them, in the order they run."""
        return (*self.qkv, self.o, *self.gate_up, self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """All of a decoder, on one device, floats in one dtype.

    Attributes:
        embed: (V, hidden) token embedding.
        blocks: In order.
        final_norm: (hidden,).
        head: V by hidden.
    """

    embed: Tensor
    blocks: tuple[BlockWeights, ...]
    final_norm: Tensor
    head: Linear

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one decoded token reads; one row of the embedding counts as nothing."""
        return self.head.nbytes + sum(
            linear.nbytes for block in self.blocks for linear in block.linears
        )


def random_weights(
    shape: DecoderShape,
    scheme: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    head: str = DENSE,
) -> DecoderWeights:
    """Draw weights whose linears keep the size of their input, so that activations stay in range.

    They are drawn on the device: other bits on another device, the same bits from the same seed on one.

    Args:
        shape: Sizes.
        scheme: Number format of the blocks' linears in its default groups, or ``fp16`` for plain matrices.
        device: Where they are made.
        dtype: Of all floats, torch.float16 or torch.bfloat16; ``fp16`` stands for this dtype.
        seed: Of the generator.
        head: Number format of the head, likewise.

    Raises:
        UsageError: E2001 for an unknown scheme, E2004 if its groups do not divide a width.
    """
    draw = _Draw(
        generator=torch.Generator(device=device).manual_seed(seed), device=device, dtype=dtype
    )
    linear: Callable[..., Linear] = draw.dense if scheme == DENSE else draw.tiled(SCHEMES[scheme])
    last: Callable[..., Linear] = draw.dense if head == DENSE else draw.tiled(SCHEMES[head])

    def blocks() -> Iterator[BlockWeights]:
        attention = shape.heads * shape.head_dim
        for _ in range(shape.layers):
            yield BlockWeights(
                input_norm=draw.ones(shape.hidden),
                qkv=(linear(shape.qkv_rows, shape.hidden, bias=shape.qkv_bias),),
                o=linear(shape.hidden, attention),
                post_norm=draw.ones(shape.hidden),
                gate_up=(linear(2 * shape.intermediate, shape.hidden),),
                down=linear(shape.hidden, shape.intermediate),
            )

    return DecoderWeights(
        embed=draw.normal(shape.vocab, shape.hidden),
        blocks=tuple(blocks()),
        final_norm=draw.ones(shape.hidden),
        head=last(shape.vocab, shape.hidden),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """Random tensors of one generator."""

    generator: torch.Generator
    device: str | torch.device
    dtype: torch.dtype

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=self.dtype)

    def ones(self, size: int) -> Tensor:
        return torch.ones(size, device=self.device, dtype=self.dtype)

    def words(self, *sizes: int) -> Tensor:
        return torch.randint(
            -WORD_RANGE,
            WORD_RANGE,
            sizes,
            generator=self.generator,
            device=self.device,
            dtype=torch.int32,
        )

    def dense(self, n: int, k: int, *, bias: bool = False) -> DenseWeight:
        weight = self.normal(n, k).mul_(k**-0.5)
        return DenseWeight(weight=weight, bias=self.normal(n) if bias else None)

    def tiled(self, scheme: QuantScheme) -> Callable[..., DeviceWeight]:
        """Make tiles directly: any bits are codes, so nothing has to be packed."""

        def linear(n: int, k: int, *, bias: bool = False) -> DeviceWeight:
            down, across = (
                padded(n, TILE_ROWS) // TILE_ROWS,
                padded(k, TILE_COLUMNS) // TILE_COLUMNS,
            )
            groups = scheme.groups_of(k, scheme.group_size)
            scale = _unit_scale(scheme, k)
            if scheme.group_size == CHANNEL:
                # Tiles hold a sixteenth of a channel's scale (docs/formats/tiles.md).
                scales = torch.full((down * TILE_ROWS,), scale / 16, device=self.device)
            else:
                sizes = (down, groups, 8, 2)
                scales = torch.full(sizes, scale, device=self.device, dtype=torch.float16)
            return DeviceWeight(
                scheme=scheme.name,
                n=n,
                k=k,
                group_size=scheme.group_size,
                codes=self.words(down, across, TILE_ROWS * TILE_COLUMNS * scheme.weight_bits // 32),
                scales=scales,
                zeros=None
                if scheme.symmetric
                else self.words(down, groups, 2) & _NIBBLES[scheme.weight_bits],
                bias=self.normal(n) if bias else None,
            )

        return linear


def _unit_scale(scheme: QuantScheme, k: int) -> float:
    """Scale at which a row of uniform codes has norm 1: the variance of a code is (levels^2 - 1) / 12."""
    variance = (scheme.levels**2 - 1) / 12
    return float((k * variance * (1 if scheme.symmetric else 2)) ** -0.5)
