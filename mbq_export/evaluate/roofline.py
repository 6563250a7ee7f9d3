"""How many bytes a decode step must read, and how fast it could be if reading them were all.

    bytes per token = constants of the decoder + one embedding row + keys and values of the context
    ideal tokens/s  = measured read bandwidth / bytes per token
    share           = measured tokens/s / ideal tokens/s

Two countings, because they answer different questions. *graph*: what the ONNX file holds, which is what ONNX
Runtime reads of the ``qdq`` lowering; 3-bit codes travel in 4-bit containers there. (The functions of the
``reference`` lowering are folded into float weights when they are loaded, so there the count says nothing.) *packed*: the checkpoint's own bits, which is what a kernel
for the scheme reads, everything else in 16 bits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.families.base import ModelFamily, TextShape
from mbq_export.report import nullable

HALF_BYTES: Final = 2
ITEM_BYTES: Final = {"fp32": 4, "fp16": 2, "bf16": 2}
BITS_PER_BYTE: Final = 8


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What one decode step reads.

    Attributes:
        counting: ``graph`` or ``packed``.
        weights: Constants of the decoder that every step reads.
        embedding: The row of the token.
        kv_per_position: Keys and values of one position, all layers.
    """

    counting: str
    weights: int
    embedding: int
    kv_per_position: int

    def at(self, context: float) -> float:
        """Bytes per token when attention looks at ``context`` positions."""
        return self.weights + self.embedding + self.kv_per_position * context

    def as_json(self, context: float) -> dict[str, Any]:
        """Return the JSON form at a context length."""
        return {
            "counting": self.counting,
            "weights_bytes": self.weights,
            "embedding_bytes": self.embedding,
            "kv_bytes_per_position": self.kv_per_position,
            "context_positions": context,
            "bytes_per_token": self.at(context),
        }


def graph_step(record: Mapping[str, Any], shape: TextShape, *, limit: int) -> StepBytes:
    """Count what the constants of a decoder graph cost a step.

    The tables of rotary positions are left out: a step reads one row of each.

    Args:
        record: The exporter's record of the graph.
        shape: The decoder's sizes.
        limit: Positions of the graph, the rows of its tables when its form names none.
    """
    item = ITEM_BYTES[record["dtype"]]
    rows = (record["form"] or {}).get("max_context") or limit
    tables = rows * shape.head_dim * item
    return StepBytes(
        counting="graph",
        weights=int(record["weight_bytes"]) - tables,
        embedding=shape.hidden * item,
        kv_per_position=_kv_values(shape) * item,
    )


def packed_step(checkpoint: QuantCheckpoint, family: ModelFamily, shape: TextShape) -> StepBytes:
    """Count what a step costs kernels that read the checkpoint's own bits.

    Quantized linears take `QuantScheme.bits_per_weight`; norms, biases and a head of numbers take 16 bits.
    """
    records = checkpoint.records.values()
    bits = sum(r.n * r.k * r.scheme.bits_per_weight(r.group_size) for r in records)
    biases = sum(r.n for r in records if r.bias)
    head = family.embed if checkpoint.tied else family.head
    read = tuple(f"{path}." for path in (family.blocks, family.final_norm, head))
    plain = sum(
        math.prod(checkpoint.files[name].entries[name].shape)
        for name in checkpoint.tensors
        if name.startswith(read)
    )
    return StepBytes(
        counting="packed",
        weights=int(bits / BITS_PER_BYTE) + (biases + plain) * HALF_BYTES,
        embedding=shape.hidden * HALF_BYTES,
        kv_per_position=_kv_values(shape) * HALF_BYTES,
    )


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A measured speed beside the one that reading alone would allow.

    Attributes:
        step: What a step reads.
        context: Mean positions attended to.
        bandwidth_gb_s: Reads from memory, measured.
        cached_gb_s: Reads of a buffer as large as one step's bytes, measured.
        tokens_per_second: Measured.
    """

    step: StepBytes
    context: float
    bandwidth_gb_s: float
    cached_gb_s: float
    tokens_per_second: float | None

    @property
    def ideal_tokens_per_second(self) -> float:
        """Tokens per second if memory bandwidth were the only limit."""
        return self.bandwidth_gb_s * 1e9 / self.step.at(self.context)

    @property
    def percent(self) -> float | None:
        """Share of the ideal that was reached; above 100 the weights came from a cache."""
        if self.tokens_per_second is None:
            return None
        return 100 * self.tokens_per_second / self.ideal_tokens_per_second

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            **self.step.as_json(self.context),
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "bandwidth_at_step_size_gb_s": self.cached_gb_s,
            "source": "measured",
            "ideal_tokens_per_second": self.ideal_tokens_per_second,
            **nullable("percent", self.percent, why="no token was decoded"),
        }


def _kv_values(shape: TextShape) -> int:
    """Keys and values of one position."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim
