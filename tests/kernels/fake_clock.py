"""A clock whose times are written down: what a GPU would do cannot be had, how its times are judged can."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mbq_kernels.bench.ceilings import Ceilings
from mbq_kernels.bench.clock import Launch, Recorded
from mbq_kernels.bench.entrant import Entrant, Placed, Placing, Setting
from mbq_kernels.bench.gate import float_gate
from mbq_kernels.bench.limits import card_named
from mbq_kernels.bench.linears import float_copies, library_tolerance, row_blocks
from mbq_kernels.bench.machine import Device
from mbq_kernels.bench.session import Rig
from mbq_kernels.bench.shapes import Shape
from mbq_kernels.library import KernelLibrary

FAKE_GPU = Device(
    name="Fake H100 HBM3",
    sm=90,
    sm_count=132,
    l2_bytes=50 << 20,
    memory_bytes=80 << 30,
    smem_optin=232448,
)


class FakeClock:
    """Runs the first launch of a list, and gives the next of the written times to each list.

    Attributes:
        recorded: Number of launches of every list, in order.
        replayed: Counts that were asked for.
    """

    measures = True

    def __init__(self, launch_us: Iterator[float] | Sequence[float], *, spread: float = 0) -> None:
        """Time lists of launches.

        Args:
            launch_us: Time of one launch, list after list.
            spread: Every other replay takes this share longer.
        """
        self.device = torch.device("cpu")
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self._times, self._spread = iter(launch_us), spread

    def record(self, launches: Sequence[Launch]) -> Recorded:
        launches[0]()
        self.recorded.append(len(launches))
        return _Replays(self, next(self._times) * len(launches), self._spread)

    def finish(self) -> None:
        pass


class _Replays:
    def __init__(self, clock: FakeClock, replay_us: float, spread: float) -> None:
        self._clock, self._replay_us, self._spread = clock, replay_us, spread

    def replay_us(self, count: int) -> list[float]:
        self._clock.replayed.append(count)
        return [self._replay_us * (1 + self._spread * (i % 2)) for i in range(count)]


def fake_rig(clock: FakeClock, *, library: KernelLibrary | None = None) -> Rig:
    """Everything a run needs, on a card that is not there; copies stay few, as weights are tiny."""
    setting = Setting(device=clock.device, machine=FAKE_GPU, library=library)
    return FewCopies(
        clock=clock,
        setting=setting,
        ceilings=Ceilings(clock, setting),
        card=card_named("H100"),
    )


class FewCopies(Rig):
    """Tiny weights would need thousands of copies to leave a cache that is not there."""

    def copies(self, weight_bytes: float) -> int:
        return 2


def entrant(
    name: str,
    *,
    source: str = "cuda",
    place: Callable[[Shape, Placing], Placed] | None = None,
    absent: str = "",
) -> Entrant:
    """An entrant that multiplies in torch, or as `place` says."""
    return Entrant(
        name=name,
        source=source,  # type: ignore[arg-type]
        scheme="w3a16" if source == "cuda" else "fp16",
        dtype="float16",
        group_size=128,
        bits=16.0,
        int8=False,
        absent=lambda _: absent,
        place=place or placed_with(lambda x, w: x @ w.T),
        main=True,
    )


def placed_with(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Shape, Placing], Placed]:
    """Weights whose product is computed as given, and gated by the true one."""

    def place(shape: Shape, placing: Placing) -> Placed:
        weights = float_copies(shape, placing.copies, dtype="float16", device=torch.device("cpu"))
        return Placed(
            weight_bytes=weights[0].nbytes,
            run=lambda copy, x: product(x, weights[copy]),
            wrong=float_gate(lambda: row_blocks(weights[0]), library_tolerance("float16")),
        )

    return place
