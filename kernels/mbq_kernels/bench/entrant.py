"""What takes part: a way of multiplying, the weights it brings, and what may be asked of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from mbq_kernels.bench.limits import BITS_PER_BYTE, HALF_BYTES, Traffic
from mbq_kernels.bench.machine import Device
from mbq_kernels.bench.shapes import Shape, Suite
from mbq_kernels.library import SCHEME_IDS, KernelLibrary

Source = Literal["base", "cuda", "triton", "peer", "oracle"]
ANY_ROWS: Final = 1 << 20
CHANNEL_SCALE_BYTES: Final = 4
DTYPES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where everything runs.

    Attributes:
        device: Of all tensors.
        machine: What that device is.
        library: The compiled kernels; None in a rehearsal without them.
    """

    device: torch.device
    machine: Device
    library: KernelLibrary | None

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """How weights are to be placed.

    Attributes:
        setting: Where.
        copies: R, so many that no cache holds them.
        largest_m: Most rows of activations that will come.
    """

    setting: Setting
    copies: int
    largest_m: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Weights of one linear in one form on the device.

    Attributes:
        weight_bytes: Bytes that one launch reads of one copy.
        run: (copy, x (M, K)) to y (M, N): queues the work on the current stream.
        wrong: (y, x) to what is wrong with y as the answer of copy 0; empty if nothing is.
        config: M to the config that the kernel library takes; None where there is no such number.
    """

    weight_bytes: int
    run: Callable[[int, Tensor], Tensor]
    wrong: Callable[[Tensor, Tensor], str]
    config: Callable[[int], int | None] = lambda _: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """One contender.

    Attributes:
        name: Unique; what tables call it.
        source: Whose it is; ``base`` is what speed-ups are over, one per dtype.
        scheme: Number format: a scheme of ours, ``fp16``, or a peer's own word.
        dtype: Of activations and outputs.
        group_size: Columns per scale; 0 for a scale per row.
        bits: Bits per weight that it reads, scales included.
        int8: Whether it multiplies integers.
        rows: Smallest and largest M.
        absent: Why it cannot run in a setting; empty if it can.
        place: Make its weights for a linear.
        main: Whether every M of a suite is timed; targets are about those.
    """

    name: str
    source: Source
    scheme: str
    dtype: str
    group_size: int
    bits: float
    int8: bool
    absent: Callable[[Setting], str]
    place: Callable[[Shape, Placing], Placed]
    rows: tuple[int, int] = (1, ANY_ROWS)
    main: bool = False

    def traffic(self, shape: Shape, m: int) -> Traffic:
        """What one launch moves and multiplies at least."""
        # bits leaves out the float32 scale of a channel, which a row has once.
        channels = (
            CHANNEL_SCALE_BYTES * shape.n
            if self.scheme in SCHEME_IDS and not self.group_size
            else 0
        )
        return Traffic(
            weight_bytes=shape.weights * self.bits / BITS_PER_BYTE + channels,
            activation_bytes=HALF_BYTES * m * (shape.n + shape.k),
            operations=2 * m * shape.weights,
            int8=self.int8,
        )

    def takes(self, m: int) -> bool:
        """Whether it can multiply M rows."""
        return self.rows[0] <= m <= self.rows[1]

    def asked(self, suite: Suite, m: int) -> bool:
        """Whether a suite asks it to multiply M rows: main entrants always, others now and then."""
        return self.takes(m) and (self.main or not suite.few_rows or m in suite.few_rows)


def activations(shape: Shape, m: int, *, dtype: str, device: torch.device) -> Tensor:
    """(M, K) random activations; the same for every contender of a dtype."""
    random = torch.Generator(device).manual_seed(m)
    x = torch.randn(m, shape.k, device=device, generator=random)
    return x.to(DTYPES[dtype])
