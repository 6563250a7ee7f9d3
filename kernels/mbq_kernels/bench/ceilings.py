"""The bandwidth that this card reaches today, by size: what every other time is held against.

    copy    torch's device-to-device copy at 1 GB, bytes read plus bytes written
    read    the kernel library's read-only sum, at 1 GB and at the bytes of each weight that is timed

A small read is slower per byte than a large one because a launch costs the same; so a layer is compared with a read of
its own size, under the same rotation and in the same kind of graph.
"""

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from mbq_kernels.bench.clock import Clock
from mbq_kernels.bench.emulated import show
from mbq_kernels.bench.entrant import Setting
from mbq_kernels.bench.linears import stream_of
from mbq_kernels.bench.protocol import DRY, Timing, copies_for, measure, rotation

LARGE_BYTES: Final = 1 << 30
REHEARSED_BYTES: Final = 1 << 16
STEP_BYTES: Final = 16
WORDS: Final = 8
"""Bytes of the random integers that fill a buffer."""


class Ceilings:
    """Bandwidth by size, each size measured once."""

    def __init__(self, clock: Clock, setting: Setting) -> None:
        """Measure with a clock in a setting."""
        self._clock, self._setting = clock, setting
        self._read: dict[int, Timing | None] = {}
        self._copy: Timing | None = None
        self.large_bytes = LARGE_BYTES if clock.measures else REHEARSED_BYTES

    def measure_first(self, sizes: list[int]) -> None:
        """Measure copy and read at the large size, then reads of the given sizes."""
        source = self._random(self.large_bytes)
        target = torch.empty_like(source)
        self._copy = measure(self._clock, [partial(target.copy_, source)] * len(rotation(1)))
        del source, target
        for size in (self.large_bytes, *sizes):
            self.read_gb_s(size)

    def read_gb_s(self, size: int) -> float | None:
        """Measured read bandwidth at a size; None where nothing is measured."""
        size -= size % STEP_BYTES
        if size not in self._read:
            self._read[size] = self._measure_read(size)
        timing = self._read[size]
        return None if timing is None else size / timing.median_us / 1e3

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form: copy, and reads by size."""
        why = {} if self._clock.measures else {"why": DRY}
        copied = None if self._copy is None else 2 * self.large_bytes / self._copy.median_us / 1e3
        return {
            "copy": {"bytes": self.large_bytes, "gb_s": copied, **why},
            "read": [
                {
                    "bytes": size,
                    "gb_s": self.read_gb_s(size),
                    "timing": None if timing is None else timing.as_json(),
                    **why,
                }
                for size, timing in sorted(self._read.items())
            ],
        }

    def _measure_read(self, size: int) -> Timing | None:
        library = self._setting.library
        if library is None:
            return None
        copies = copies_for(size, self._setting.machine.l2_bytes) if self._clock.measures else 1
        arena = self._random(copies * size)
        total = torch.zeros(4, dtype=torch.int32, device=self._setting.device)

        def read(copy: int) -> None:
            show(self._setting, reads=(arena,), writes=(total,))
            library.read_bw(
                data=arena.data_ptr() + copy * size,
                size=size,
                total=total.data_ptr(),
                stream=stream_of(self._setting.device),
            )

        return measure(self._clock, [partial(read, copy) for copy in rotation(copies)])

    def _random(self, size: int) -> Tensor:
        words = -(-size // WORDS)
        return torch.randint(
            -(2**63), 2**63 - 1, (words,), dtype=torch.int64, device=self._setting.device
        )
