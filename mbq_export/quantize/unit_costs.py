"""What a unit costs at a width: bits of codes, packed bytes, or nanoseconds of a table that was measured.

A table of times is what ``mbq-export bench --kernels`` writes, of which the CUDA kernels in fp16 count at one token, or
one made by hand:

    {"schema": "mbq-export/latency@1",
     "rows": [{"scheme": "w3a16", "group_size": 128, "n": 1152, "k": 896, "us": 2.31}, ...]}

N is that of the fused unit: q, k and v together, gate and up together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from mbq_export.errors import FormatError, UsageError
from mbq_export.reading import read_json
from mbq_export.schemes.base import group_name
from mbq_export.schemes.layouts.dense import words_per_row

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mbq_export.families.base import ModelFamily
    from mbq_export.schemes.base import QuantScheme

LATENCY_SCHEMA: Final = "mbq-export/latency@1"
KERNELS_SCHEMA: Final = "mbq-export/kernels@1"
LIMIT_BYTES: Final = 64 << 20
WORD_BYTES, SCALE_BYTES, ZERO_BYTES = 4, 2, 1
NS_PER_US: Final = 1000
TIMED_LIKE: Final = {"source": "cuda", "dtype": "float16", "m": 1}
"""Rows of the kernel benchmark that count: what engines run, at one token."""

Entry = tuple[str, int, int, int]
"""Scheme, group size, N, K."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitShape:
    """Sizes of one unit.

    Attributes:
        rows: N of each linear.
        columns: K, which they share.
    """

    rows: tuple[int, ...]
    columns: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(self.rows) * self.columns


def unit_shapes(family: ModelFamily, shapes: Mapping[str, tuple[int, int]]) -> dict[str, UnitShape]:
    """Sizes of the units of a block.

    Args:
        family: Names units and linears.
        shapes: (N, K) of each linear.
    """
    return {
        place.unit: UnitShape(
            rows=tuple(shapes[linear][0] for linear in place.into),
            columns=shapes[place.into[0]][1],
        )
        for place in family.smooth
    }


def packed_bytes(shape: UnitShape, scheme: QuantScheme, group_size: int) -> int:
    """Bytes of a unit's codes, scales and zero points in a checkpoint; biases do not count."""
    groups = scheme.groups_of(shape.columns, group_size)
    codes = words_per_row(shape.columns, scheme.weight_bits) * WORD_BYTES
    return sum(shape.rows) * (codes + groups * (SCALE_BYTES + ZERO_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """Measured times of linears.

    Attributes:
        name: Of the file, for messages.
        times: Nanoseconds of one product.
    """

    name: str
    times: Mapping[Entry, int]

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """Read a table.

        Raises:
            FormatError: E4102 if it is none, or a row is malformed.
        """
        found = read_json(path, limit=LIMIT_BYTES, code="E4102")
        rows = found.get("rows")
        if found.get("schema") not in {LATENCY_SCHEMA, KERNELS_SCHEMA} or not isinstance(
            rows, list
        ):
            _malformed(path, f"its schema is {found.get('schema')!r}")
        times: dict[Entry, int] = {}
        for row in rows:
            if not isinstance(row, dict):
                _malformed(path, "a row is no object")
            if found["schema"] == KERNELS_SCHEMA:
                if any(row.get(key) != value for key, value in TIMED_LIKE.items()):
                    continue
                timing = row.get("timing")
                if timing is None:
                    continue  # not measured
                us = timing.get("median_us") if isinstance(timing, dict) else None
            else:
                us = row.get("us")
            entry, ns = _entry(path, row, us)
            times[entry] = min(ns, times.get(entry, ns))
        return cls(name=path.name, times=times)

    def nanoseconds(self, shape: UnitShape, scheme: QuantScheme, group_size: int) -> int:
        """Time of a fused unit.

        Raises:
            UsageError: E2001 naming the shape that the table lacks.
        """
        n, k = sum(shape.rows), shape.columns
        found = self.times.get((scheme.name, group_size, n, k))
        if found is None:
            raise UsageError(
                "E2001",
                f"{self.name} has no time of {scheme.name} {group_name(group_size)}, {n} x {k}.",
                why=f"it has {len(self.times)} times, and every unit needs one at each width",
                fix=f"mbq-export bench --kernels --shapes {n}x{k} -o DIR, on the device",
            )
        return found


def _entry(path: Path, row: Mapping[str, Any], us: Any) -> tuple[Entry, int]:
    kinds = {"scheme": str, "group_size": int, "n": int, "k": int}
    for name, kind in kinds.items():
        if type(row.get(name)) is not kind:
            _malformed(path, f"{name} of a row is {row.get(name)!r}")
    if not isinstance(us, int | float) or isinstance(us, bool) or not math.isfinite(us) or us <= 0:
        _malformed(path, f"the time of a row is {us!r}")
    return (row["scheme"], row["group_size"], row["n"], row["k"]), round(us * NS_PER_US)


def _malformed(path: Path, what: str) -> NoReturn:
    raise FormatError(
        "E4102",
        f"{path.name} is no table of times: {what}.",
        why=f"known: {LATENCY_SCHEMA}, and {KERNELS_SCHEMA} as bench --kernels writes it",
        fix="mbq-export bench --kernels -o DIR, on the device; then DIR/kernels.json",
    )
