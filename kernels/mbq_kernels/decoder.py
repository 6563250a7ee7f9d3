"""A decoder of the Qwen2 or Llama kind on the kernels: static cache, one captured graph per token on a GPU.

    decoder = random_decoder(LLAVA_OV_7B, "w3a16", slots=2304, device="cuda")     or Decoder(shape, weights, slots=...)
    decoder.pretend(2048)                    as if 2048 tokens had been read
    decoder.decode_step()                    one more token: the best one after the last; logits (V,)

    generate(decoder, embeds, new_tokens=64, ends={1})          prompt in, greedy tokens out

Everything a step reads lies at fixed addresses: the embedding of its token, its position, the cache. A step
leaves the logits, the best token, that token's embedding and the next position behind, so that replaying the
graph again decodes greedily without the host. Batch 1.

On a GPU with Triton a step attends by `decode_attention`, which reads the filled slots alone. Elsewhere it is
torch's own attention over all slots with those after the position masked, since sizes inside a graph cannot
change: that costs what the slots cost.
"""

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from mbq_export.errors import UsageError
from mbq_kernels import ops
from mbq_kernels.decoder_weights import (
    DENSE,
    LLAVA_OV_7B,
    BlockWeights,
    DecoderShape,
    DecoderWeights,
    DenseWeight,
    Linear,
    random_weights,
)
from mbq_kernels.linear_checks import HALVES, SILU_MUL
from mbq_kernels.plain_attention import cached_attention, later_masked, rotated, rotations

__all__ = ["LLAVA_OV_7B", "Decoder", "DecoderShape", "DecoderWeights", "generate", "random_decoder"]

SLOT_STEP: Final = 64
"""Slots are a multiple: masks of attention kernels want aligned rows."""
WARM_UP_STEPS: Final = 2
"""Steps before a capture: libraries allocate and Triton compiles in the first."""


StepAttention = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor], Tensor]
"""See `decode_attention.attend`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """How new positions are rotated and what they see.

    Attributes:
        cos: (T, 1, D).
        sin: (T, 1, D), negative in the first half.
        mask: (T, slots) added to the scores, or None if the new positions see themselves alone.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


class Decoder:
    """A decoder and the sequence it is in.

    Attributes:
        shape: Sizes.
        weights: On one device; the dtype of the embedding is that of all activations.
        slots: Positions of the cache.
    """

    def __init__(self, shape: DecoderShape, weights: DecoderWeights, *, slots: int) -> None:
        """Allocate a cache.

        Args:
            shape: Sizes.
            weights: Their device and dtype are the decoder's.
            slots: Positions that prompt and answer may use together; rounded up.
        """
        self.shape, self.weights = shape, weights
        self.slots = -(-slots // SLOT_STEP) * SLOT_STEP
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        kept = (shape.layers, shape.kv_heads, self.slots, shape.head_dim)
        self._keys = torch.zeros(kept, device=self.device, dtype=self.dtype)
        self._values = torch.zeros_like(self._keys)
        self._cos, self._sin = rotations(shape, self.slots, self.device, self.dtype)
        self._slot_numbers = torch.arange(self.slots, device=self.device)
        self._embeds = torch.zeros((1, shape.hidden), device=self.device, dtype=self.dtype)
        self._position = torch.zeros(1, device=self.device, dtype=torch.int64)
        self._logits = torch.zeros(shape.vocab, device=self.device, dtype=self.dtype)
        self._token = torch.zeros(1, device=self.device, dtype=torch.int64)
        self._length = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._step_attention = _attention_of_steps(shape, self.device, self.dtype)

    @property
    def length(self) -> int:
        """Positions read so far."""
        return self._length

    @property
    def token(self) -> Tensor:
        """(1,) int64, the best token after the last position; overwritten by the next call."""
        return self._token

    def reset(self) -> None:
        """Begin a new sequence."""
        self._seek(0)

    @torch.no_grad()
    def pretend(self, length: int, *, seed: int = 0) -> None:
        """Go on as if ``length`` tokens had been read: random keys and values, for timing.

        Raises:
            UsageError: E2009 if there are fewer slots.
        """
        self._seek(0)
        self._check_room(length)
        generator = torch.Generator(device=self.device).manual_seed(seed)
        self._keys.normal_(generator=generator)
        self._values.normal_(generator=generator)
        self._seek(length)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Look up (T,) token ids; (T, hidden)."""
        return functional.embedding(ids, self.weights.embed)

    @torch.no_grad()
    def prefill(self, embeds: Tensor) -> Tensor:
        """Read new positions.

        Args:
            embeds: (T, hidden), T at least 1, in the decoder's dtype, on its device.

        Returns:
            (V,) logits of the last position; overwritten by the next call.

        Raises:
            UsageError: E2009 if there are not T slots left.
        """
        count, start = len(embeds), self._length
        self._check_room(count)
        positions = self._slot_numbers[start : start + count]
        self._leave(self._forward(embeds, positions, alone=start == 0))
        self._seek(start + count)
        return self._logits

    @torch.no_grad()
    def decode_step(self, embeds: Tensor | None = None) -> Tensor:
        """Read one more position; on a GPU by replaying a graph, which the first call captures.

        Args:
            embeds: (1, hidden) of the token to read; None takes the best token after the last position.

        Returns:
            (V,) logits; overwritten by the next call.

        Raises:
            UsageError: E2009 if no slot is left.
        """
        self._check_room(1)
        if embeds is not None:
            self._embeds.copy_(embeds)
        if self.device.type == "cuda":
            self._captured().replay()
        else:
            self._step()
        self._length += 1
        return self._logits

    def _captured(self) -> torch.cuda.CUDAGraph:
        if self._graph is None:
            saved = self._embeds.clone()
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    # Each writes only what the real step writes over: its own slot and the outputs.
                    self._step()
                    self._embeds.copy_(saved)
                    self._position.fill_(self._length)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self._step()
            self._graph = graph
        return self._graph

    def _step(self) -> None:
        """What a graph holds: buffers in, buffers out."""
        self._leave(self._forward(self._embeds, self._position))
        self._position.add_(1)

    def _leave(self, logits: Tensor) -> None:
        self._logits.copy_(logits[0])
        self._token.copy_(logits.argmax(dim=-1))
        self._embeds.copy_(functional.embedding(self._token, self.weights.embed))

    def _forward(self, x: Tensor, positions: Tensor, *, alone: bool = False) -> Tensor:
        """Run all blocks.

        Args:
            x: (T, hidden).
            positions: (T,) slots to write to.
            alone: Nothing but x itself is seen, by each row what is not after it.

        Returns:
            (1, V) logits of the last row.
        """
        eps = self.shape.norm_eps
        view = None
        if self._step_attention is None or len(x) > 1:
            view = _View(
                cos=self._cos.index_select(0, positions),
                sin=self._sin.index_select(0, positions),
                mask=None if alone else later_masked(self._slot_numbers, positions, self.dtype),
            )
        for layer, block in enumerate(self.weights.blocks):
            normed = functional.rms_norm(x, x.shape[-1:], block.input_norm, eps)
            seen = self._attend(layer, _joined(block.qkv, normed), positions, view)
            x = _added(block.o, seen, x)
            normed = functional.rms_norm(x, x.shape[-1:], block.post_norm, eps)
            x = _added(block.down, _gated(block, normed), x)
        last = functional.rms_norm(x[-1:], x.shape[-1:], self.weights.final_norm, eps)
        return _linear(self.weights.head, last)

    def _attend(self, layer: int, qkv: Tensor, positions: Tensor, view: "_View | None") -> Tensor:
        """Rotate q and k, keep k and v, attend; (T, H * D)."""
        keys, values = self._keys[layer], self._values[layer]
        if view is None and self._step_attention is not None:
            return self._step_attention(qkv, keys, values, (self._cos, self._sin), positions)
        assert view is not None, "without kernels every call has a view"
        shape, count = self.shape, len(qkv)
        parts = qkv.view(count, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        turned = rotated(parts[:, : shape.heads + shape.kv_heads], view.cos, view.sin)
        q = turned[:, : shape.heads]
        k = turned[:, shape.heads :].transpose(0, 1)
        v = parts[:, shape.heads + shape.kv_heads :].transpose(0, 1)
        keys.index_copy_(1, positions, k)
        values.index_copy_(1, positions, v)
        if view.mask is None:
            q = q.transpose(0, 1)[None]
            seen = functional.scaled_dot_product_attention(
                q, k[None], v[None], is_causal=True, enable_gqa=True
            )
            return seen[0].transpose(0, 1).reshape(count, -1)
        return cached_attention(q, keys, values, view.mask)

    def _seek(self, length: int) -> None:
        self._length = length
        self._position.fill_(length)

    def _check_room(self, count: int) -> None:
        need = self._length + count
        if need > self.slots:
            raise UsageError(
                "E2009",
                f"The sequence needs {need} positions, the cache has {self.slots}.",
                why="the cache of a captured graph cannot grow",
                fix="make the decoder with more slots",
                context={"limit": self.slots, "need": need},
            )


def random_decoder(
    shape: DecoderShape,
    scheme: str,
    *,
    slots: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    head: str = DENSE,
) -> Decoder:
    """Make a decoder of random weights, for timing; arguments and errors as of `random_weights`.

    Args:
        shape: Sizes.
        scheme: Number format of the blocks' linears, or ``fp16`` for the plain twin.
        slots: Positions of the cache.
        device: Where it lives.
        dtype: Of activations, cache and plain weights.
        seed: Of the generator.
        head: Number format of the head.
    """
    weights = random_weights(shape, scheme, device=device, dtype=dtype, seed=seed, head=head)
    return Decoder(shape, weights, slots=slots)


def generate(
    decoder: Decoder, prompt: Tensor, *, new_tokens: int, ends: Collection[int] = ()
) -> list[int]:
    """Answer greedily; the host sees no token before the last one is queued.

    Args:
        decoder: Its sequence so far is forgotten.
        prompt: (T, hidden) embeddings.
        new_tokens: Most tokens.
        ends: Tokens that end the answer.

    Returns:
        The answer, its end token included.

    Raises:
        UsageError: E2009 if prompt and answer have no room.
    """
    decoder.reset()
    decoder.prefill(prompt)
    found = [decoder.token.clone()]
    for _ in range(new_tokens - 1):
        decoder.decode_step()
        found.append(decoder.token.clone())
    ids: list[int] = torch.cat(found).tolist()
    end = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:end]


def _attention_of_steps(
    shape: DecoderShape, device: torch.device, dtype: torch.dtype
) -> StepAttention | None:
    """The kernels for one new token, or None where they do not run."""
    halves_on_a_gpu = device.type == "cuda" and dtype in HALVES
    if not halves_on_a_gpu or importlib.util.find_spec("triton") is None:
        return None
    from mbq_kernels import decode_attention  # noqa: PLC0415  (Triton is an extra)

    fits = decode_attention.supports(
        heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim
    )
    return decode_attention.attend if fits else None


def _linear(weight: Linear, x: Tensor) -> Tensor:
    if isinstance(weight, DenseWeight):
        return functional.linear(x, weight.weight, weight.bias)
    return ops.apply(weight, x)


def _added(weight: Linear, x: Tensor, residual: Tensor) -> Tensor:
    if isinstance(weight, DenseWeight):
        return residual + functional.linear(x, weight.weight, weight.bias)
    return ops.apply(weight, x, residual=residual)


def _joined(parts: tuple[Linear, ...], x: Tensor) -> Tensor:
    found = [_linear(part, x) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _gated(block: BlockWeights, x: Tensor) -> Tensor:
    """silu(gate) * up."""
    first = block.gate_up[0]
    if len(block.gate_up) == 1 and not isinstance(first, DenseWeight):
        return ops.apply(first, x, epilogue=SILU_MUL)
    gate, up = _joined(block.gate_up, x).chunk(2, dim=-1)
    return functional.silu(gate) * up
