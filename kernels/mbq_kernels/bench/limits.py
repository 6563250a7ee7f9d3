"""What physics allows: bytes over bandwidth, operations over rate, and what was predicted before measuring.

    time >= t0 + bytes / (e * bandwidth)         reading every input and writing every output once
    time >= t0 + 2 M N K / rate                  multiplying

Bandwidth and rate of a card are its datasheet's. They make *predictions*, recorded beside what came out; a row is
judged against the bandwidth that was measured in the same run.
"""

from dataclasses import dataclass
from typing import Final

from mbq_export.schemes import SCHEMES
from mbq_kernels.bench.shapes import Block, Shape

HALF_BITS: Final = 16
HALF_BYTES: Final = 2
BITS_PER_BYTE: Final = 8
FLOAT: Final = "fp16"
"""Stands for weights that are not quantized, in fp16 or bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU as its datasheet describes it, and two figures of judgement.

    Attributes:
        name: For tables.
        words: All of them stand in the name that the driver gives the card.
        sm: 10 * major + minor.
        gb_s: Memory bandwidth.
        half_tflops: Dense fp16 products, fp32 sums.
        int8_tops: Dense int8 products.
        launch_us: t0: time of a launch in a graph that moves nothing.
        efficiency: e: share of the bandwidth that a good kernel reaches.
    """

    name: str
    words: tuple[str, ...]
    sm: int
    gb_s: float
    half_tflops: float
    int8_tops: float
    launch_us: float
    efficiency: float


CARDS: Final = (
    Card(
        name="H100",
        words=("H100", "HBM3"),
        sm=90,
        gb_s=3350.0,
        half_tflops=989.0,
        int8_tops=1979.0,
        launch_us=2.0,
        efficiency=0.90,
    ),
    Card(
        name="H200",
        words=("H200",),
        sm=90,
        gb_s=4800.0,
        half_tflops=989.0,
        int8_tops=1979.0,
        launch_us=2.0,
        efficiency=0.90,
    ),
    Card(
        name="RTX 4090",
        words=("RTX 4090",),
        sm=89,
        gb_s=1008.0,
        half_tflops=165.2,
        int8_tops=660.6,
        launch_us=2.0,
        efficiency=0.92,
    ),
    Card(
        name="AGX Orin",
        words=("Orin",),
        sm=87,
        gb_s=204.8,
        half_tflops=42.5,
        int8_tops=85.0,
        launch_us=3.0,
        efficiency=0.87,
    ),
)
LARGE_L2_BYTES: Final = 50 << 20
"""Of an H100, for plans."""
PREDICTED: Final = ("H100", "RTX 4090", "AGX Orin")
"""Cards that a dry run predicts times for."""


def card_of(device_name: str) -> Card | None:
    """The card that a driver's name stands for; None for one that is not listed."""
    return next((c for c in CARDS if all(word in device_name for word in c.words)), None)


def card_named(name: str) -> Card:
    """The card of a table's name."""
    return next(card for card in CARDS if card.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one launch must move and multiply at least.

    Attributes:
        weight_bytes: Codes, scales and zero points.
        activation_bytes: x read and y written once.
        operations: 2 M N K.
        int8: Whether products are of integers.
    """

    weight_bytes: float
    activation_bytes: int
    operations: int
    int8: bool = False

    @property
    def total_bytes(self) -> float:
        """Everything that is moved."""
        return self.weight_bytes + self.activation_bytes


def traffic(shape: Shape, m: int, *, scheme: str, group_size: int = 128) -> Traffic:
    """Count one launch.

    Args:
        shape: The linear.
        m: Rows of activations.
        scheme: A scheme's name, or `FLOAT`.
        group_size: Columns per scale.
    """
    bits = HALF_BITS if scheme == FLOAT else SCHEMES[scheme].bits_per_weight(group_size)
    return Traffic(
        weight_bytes=shape.weights * bits / BITS_PER_BYTE,
        activation_bytes=HALF_BYTES * m * (shape.n + shape.k),
        operations=2 * m * shape.weights,
        int8=scheme != FLOAT and SCHEMES[scheme].act_bits == BITS_PER_BYTE,
    )


def predicted_us(moved: Traffic, card: Card) -> float:
    """Time of one launch that the card's datasheet and the model above predict."""
    rate = card.int8_tops if moved.int8 else card.half_tflops
    reading = moved.total_bytes / (card.efficiency * card.gb_s * 1e3)
    return card.launch_us + max(reading, moved.operations / (rate * 1e6))


def predicted_chain_ms(block: Block, card: Card, *, scheme: str, group_size: int = 128) -> float:
    """Predicted time of all linears of all blocks for one token."""
    each = [
        predicted_us(traffic(shape, 1, scheme=scheme, group_size=group_size), card)
        for shape in block.linears
    ]
    return block.layers * sum(each) / 1e3
