"""One decoded token of a whole decoder with random weights: everything a user waits for but the pictures.

    ms per token at 0, 2048, 8192 tokens of context      fp16 twin, W3, W3 with a 4-bit head, W4A8

The decoder has the sizes of LLaVA-OneVision 7B and needs no checkpoint. Each step is one replay of a graph; keys and
values of the context are random. fp16 runs before and after the others at every context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch

from mbq_export.errors import MbqError
from mbq_export.schemes import SCHEMES
from mbq_kernels import ops
from mbq_kernels.bench.clock import Clock
from mbq_kernels.bench.entrant import DTYPES, activations
from mbq_kernels.bench.limits import FLOAT, traffic
from mbq_kernels.bench.linears import gate_of
from mbq_kernels.bench.protocol import DRY, REPLAYS, WARM_REPLAYS, Timing, between, timing_of
from mbq_kernels.bench.session import OWN_FAULTS, Rig, release, said
from mbq_kernels.bench.shapes import Shape
from mbq_kernels.decoder import Decoder
from mbq_kernels.decoder_weights import (
    DENSE,
    LLAVA_OV_7B,
    DecoderShape,
    DecoderWeights,
    random_weights,
)
from mbq_kernels.weights import DeviceWeight

CONTEXTS: Final = (0, 2048, 8192)
DTYPE: Final = "float16"
TINY: Final = DecoderShape(
    layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=384, vocab=320
)
TINY_CONTEXTS: Final = (0, 24)
REHEARSED_STEPS: Final = 3
STEPS: Final = WARM_REPLAYS + REPLAYS + 3
"""Two lists of replays begin with a step of their own, and one step follows to look at its logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One decoder.

    Attributes:
        name: Of the entrant whose linears it runs.
        scheme: Of the blocks' linears; `DENSE` for the base.
        head: Of the head.
    """

    name: str
    scheme: str
    head: str = DENSE


BASE: Final = Variant(name="cuBLAS fp16", scheme=DENSE)
VARIANTS: Final = (
    Variant(name="CUDA w3a16 g128", scheme="w3a16"),
    Variant(name="CUDA w3a16 g128, 4-bit head", scheme="w3a16", head="w4a16"),
    Variant(name="CUDA w4a8 channel", scheme="w4a8"),
)


class Steps:
    """Decode steps as something to replay."""

    def __init__(self, decoder: Decoder, clock: Clock) -> None:
        """Steps of a decoder that has its context."""
        self._decoder, self._clock = decoder, clock

    def replay_us(self, count: int) -> list[float]:
        """Decode tokens one after the other; no times without a GPU."""
        if not self._clock.measures:
            for _ in range(REHEARSED_STEPS):
                self._decoder.decode_step()
            return []
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        self._decoder.decode_step()  # captures the graph in the first call
        marks[0].record()
        for mark in marks[1:]:
            self._decoder.decode_step()
            mark.record()
        self._clock.finish()
        return [1e3 * a.elapsed_time(b) for a, b in pairwise(marks)]


def time_decode(
    rig: Rig,
    *,
    shape: DecoderShape = LLAVA_OV_7B,
    contexts: Sequence[int] = CONTEXTS,
    variants: Sequence[Variant] = VARIANTS,
) -> dict[str, Any]:
    """Time one token of every variant at every context.

    Args:
        rig: What to time with.
        shape: Sizes of the decoder.
        contexts: Tokens read before; the timed ones follow them.
        variants: What is compared with fp16.
    """
    if rig.setting.on_gpu:
        ops.use_library(rig.setting.library)
    rows: list[dict[str, Any]] = []
    for context in contexts:
        whys: dict[str, str] = {}
        found = between(
            partial(_timed, rig, shape, BASE, context, whys),
            [partial(_timed, rig, shape, variant, context, whys) for variant in variants],
        )
        base_us = None if found.base is None else found.base.median_us
        for variant, timing in zip((BASE, *variants), (found.base, *found.others), strict=True):
            why = whys.get(variant.name, "")
            rows.append(_row(rig, shape, variant, context, timing=timing, why=why, base_us=base_us))
        rig.progress(len(rows), len(contexts) * (1 + len(variants)), f"context {context}")
    sizes = {name: getattr(shape, name) for name in ("layers", "hidden", "intermediate", "vocab")}
    return {"shape": sizes, "rows": rows}


def _timed(
    rig: Rig, shape: DecoderShape, variant: Variant, context: int, whys: dict[str, str]
) -> Timing | None:
    """Make the decoder, check its linears, time its steps, give its memory back."""
    weights = decoder = None
    try:
        weights = random_weights(
            shape,
            variant.scheme,
            device=rig.setting.device,
            dtype=DTYPES[DTYPE],
            head=variant.head,
        )
        wrong = _wrong(rig, weights)
        if wrong:
            whys[variant.name] = f"wrong: {wrong}"
            return None
        decoder = Decoder(shape, weights, slots=context + STEPS)
        decoder.pretend(context)
        timing = timing_of(Steps(decoder, rig.clock), launches=1)
        if bool(torch.isfinite(decoder.decode_step()).all()):
            return timing
        whys[variant.name] = "wrong: logits are not finite"
    except OWN_FAULTS as error:
        whys[variant.name] = said(error)
    except MbqError as error:
        whys[variant.name] = error.message
    finally:
        del weights, decoder
        release(rig)
    return None


def _wrong(rig: Rig, weights: DecoderWeights) -> str:
    """Gate every quantized linear of the first block, and the head."""
    for linear in (*weights.blocks[0].linears, weights.head):
        if not isinstance(linear, DeviceWeight):
            continue
        plain = replace(linear, bias=None)
        x = activations(Shape(n=linear.n, k=linear.k), 1, dtype=DTYPE, device=rig.setting.device)
        gate = gate_of(plain, dtype=DTYPE, skinny_is_exact=rig.setting.library is not None)
        wrong = gate.wrong(ops.apply(plain, x), x)
        if wrong:
            return f"{linear.n}x{linear.k}: {wrong}"
    return ""


def _row(
    rig: Rig,
    shape: DecoderShape,
    variant: Variant,
    context: int,
    *,
    timing: Timing | None,
    why: str,
    base_us: float | None,
) -> dict[str, Any]:
    token_ms = None if timing is None else timing.median_us / 1e3
    bytes_read = _bytes(shape, variant) + context * shape.kv_bytes_per_token(DTYPES[DTYPE])
    card = rig.card
    return {
        "entrant": variant.name,
        "scheme": variant.scheme,
        "head": variant.head,
        "dtype": DTYPE,
        "context": context,
        "bytes_per_token": bytes_read,
        "correct": False if why.startswith("wrong: ") else None if why else True,
        "timing": None if timing is None else timing.as_json(),
        **({} if timing is not None else {"timing_why": why or DRY}),
        "token_ms": token_ms,
        "speedup": None if timing is None or base_us is None else base_us / timing.median_us,
        "limit_ms": None if card is None else bytes_read / card.gb_s / 1e6,
    }


def _bytes(shape: DecoderShape, variant: Variant) -> int:
    """Weights that a token reads, from the sizes alone."""
    blocks = (
        Shape(n=shape.qkv_rows, k=shape.hidden),
        Shape(n=shape.hidden, k=shape.heads * shape.head_dim),
        Shape(n=2 * shape.intermediate, k=shape.hidden),
        Shape(n=shape.hidden, k=shape.intermediate),
    )
    head = Shape(n=shape.vocab, k=shape.hidden)
    each = sum(_weight_bytes(linear, variant.scheme) for linear in blocks)
    return round(shape.layers * each + _weight_bytes(head, variant.head))


def _weight_bytes(shape: Shape, scheme: str) -> float:
    group_size = 0 if scheme == FLOAT else SCHEMES[scheme].group_size
    return traffic(shape, 1, scheme=scheme, group_size=group_size).weight_bytes
