"""Time every legal config of a linear and keep the table of the best.

    python kernels/bench.py tune --shapes 18944x3584 --rows 1,8

Each config passes the gate before it is timed. The config in use is timed with the others, so a gain is measured in
one run and never against yesterday's figure. The weights rotate as in the benchmark.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from mbq_export.errors import MachineError
from mbq_kernels.bench.emulated import show
from mbq_kernels.bench.entrant import Placing, activations
from mbq_kernels.bench.limits import traffic
from mbq_kernels.bench.linears import (
    FORMATS,
    Outputs,
    call_of,
    gate_of,
    scratch_for,
    stream_of,
    struct_of,
    weight_copies,
)
from mbq_kernels.bench.machine import Sensors, software
from mbq_kernels.bench.protocol import measure, rotation
from mbq_kernels.bench.session import Rig, release
from mbq_kernels.bench.shapes import Shape
from mbq_kernels.bench.tuning_table import (
    BUCKETS,
    SCHEMA,
    Candidate,
    bucket_rows,
    choose,
    key_of,
    read_tables,
)
from mbq_kernels.library import LinearCall
from mbq_kernels.weights import DeviceWeight

DTYPES: Final = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One weight, ready to be multiplied under any config.

    Attributes:
        rig: What to time with.
        calls: One per copy.
        weights: The same, kept alive.
        dtype: Of activations.
        scratch: Workspace.
    """

    rig: Rig
    calls: list[LinearCall]
    weights: list[DeviceWeight]
    dtype: str
    scratch: Tensor

    def run(self, config: int, copy: int, x: Tensor, y: Tensor) -> Tensor:
        """Queue one launch."""
        library = self.rig.setting.library
        assert library is not None, "checked by tune"
        weight = self.weights[copy]
        show(
            self.rig.setting,
            reads=(x, weight.codes, weight.scales, weight.zeros),
            writes=(y, self.scratch),
        )
        library.linear(
            self.calls[copy],
            m=len(x),
            x=x.data_ptr(),
            y=y.data_ptr(),
            workspace=(self.scratch.data_ptr(), self.scratch.nbytes),
            stream=stream_of(self.rig.setting.device),
            config=config,
        )
        return y

    def candidate(self, config: int, x: Tensor) -> Candidate | None:
        """Time a config; None if its answer is wrong or nothing is measured."""
        y = Outputs(self.calls[0].n).of(x)
        self.run(config, 0, x, y)
        self.rig.clock.finish()
        gate = gate_of(self.weights[0], dtype=self.dtype, skinny_is_exact=False)
        if gate.wrong(y, x):
            return None
        launches = [partial(self.run, config, copy, x, y) for copy in rotation(len(self.calls))]
        timing = measure(self.rig.clock, launches)
        if timing is None:
            return None
        return Candidate(
            config=config, median_us=timing.median_us, spread_percent=timing.spread_percent
        )

    def legal(self, m: int) -> list[int]:
        """Configs that may run M rows on this device."""
        library = self.rig.setting.library
        assert library is not None, "checked by tune"
        device = struct_of(self.rig.setting)
        ids = [config["id"] for config in library.configs()]
        return [
            config
            for config in ids
            if not library.legal(self.calls[0], m=m, config=config, device=device)
        ]

    def rule(self, m: int) -> int:
        """Config that the library takes by itself: a measured row of its own table, else its rule."""
        library = self.rig.setting.library
        assert library is not None, "checked by tune"
        return library.select_on(self.calls[0], m=m, device=struct_of(self.rig.setting))


def tune(
    rig: Rig,
    shapes: Sequence[Shape],
    *,
    formats: Sequence[tuple[str, int]] = FORMATS,
    dtypes: Sequence[str] = DTYPES,
    buckets: Sequence[tuple[int, int]] = BUCKETS,
) -> list[dict[str, Any]]:
    """Time every legal config of every linear and return one entry per bucket.

    Raises:
        MachineError: E3005 without a kernel library.
    """
    if rig.setting.library is None:
        raise MachineError(
            "E3005",
            "There is no kernel library to tune.",
            why="configs are those of the compiled kernels",
            fix="python kernels/build.py",
        )
    entries = []
    for shape in shapes:
        for scheme, group_size in formats:
            for dtype in dtypes:
                bench = _ready(rig, shape, scheme, group_size, dtype)
                entries += [
                    entry
                    for bucket in buckets
                    if (entry := _entry(bench, shape, bucket)) is not None
                ]
                del bench
                release(rig)
        rig.progress(list(shapes).index(shape) + 1, len(shapes), shape.name)
    return sorted(entries, key=key_of)


def _ready(rig: Rig, shape: Shape, scheme: str, group_size: int, dtype: str) -> Bench:
    copies = rig.copies(traffic(shape, 1, scheme=scheme, group_size=group_size).weight_bytes)
    placing = Placing(setting=rig.setting, copies=copies, largest_m=bucket_rows(BUCKETS[-1]))
    weights = weight_copies(shape, placing, scheme=scheme, group_size=group_size)
    calls = [call_of(weight, dtype) for weight in weights]
    return Bench(
        rig=rig,
        calls=calls,
        weights=weights,
        dtype=dtype,
        scratch=scratch_for(calls[0], placing),
    )


def _entry(bench: Bench, shape: Shape, bucket: tuple[int, int]) -> dict[str, Any] | None:
    """Time one bucket; None if the library's own config is wrong here or nothing is measured."""
    m, call = bucket_rows(bucket), bench.calls[0]
    x = activations(shape, m, dtype=bench.dtype, device=bench.rig.setting.device)
    rule = bench.rule(m)
    timed = [found for config in bench.legal(m) if (found := bench.candidate(config, x))]
    if rule not in {candidate.config for candidate in timed}:
        return None
    chosen, gain = choose(timed, current=rule)
    return {
        "scheme": call.scheme,
        "dtype": bench.dtype,
        "group_size": call.group_size,
        "n": shape.n,
        "k": shape.k,
        "m_lo": bucket[0],
        "m_hi": bucket[1],
        "config": chosen.config,
        "median_us": chosen.median_us,
        "rule_config": rule,
        "gain_percent": gain,
        "spread_percent": chosen.spread_percent,
    }


def merged(rig: Rig, entries: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The table of this SM with new entries in place of old ones for the same linears.

    Args:
        rig: Where they were timed.
        entries: As `tune` returns.
        folder: Of the tables.
    """
    sm = rig.setting.machine.sm
    old = next((table for table in read_tables(folder) if table["sm"] == sm), None)
    kept = {} if old is None else {key_of(entry): entry for entry in old["entries"]}
    kept |= {key_of(entry): entry for entry in entries}
    library = rig.setting.library
    return {
        "schema": SCHEMA,
        "sm": sm,
        "device": rig.setting.machine.name,
        "clocks": Sensors(rig.setting.device).read(),
        "versions": software(None if library is None else library.path),
        "entries": [kept[key] for key in sorted(kept)],
    }
