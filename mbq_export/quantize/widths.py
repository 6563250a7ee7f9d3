"""Which bits a user asked for: a budget that decides between 3 and 4, and widths that are fixed by name.

    --avg-bits 3.3                      an average over the weights of all decoder linears, scales not counted
    --bytes-budget 12MiB                codes, scales and zero points of all decoder linears
    --latency-table times.json          with --avg-bits: what is spent are microseconds, see `unit_costs`
    --bits 'layers.0.*=4'               fixed; a pattern may begin at any dot of a module path

One node of a graph holds one width, and q, k, v are one node, as are gate and up: widths are those of fused units.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from mbq_export.errors import UsageError
from mbq_export.reading import sha256_of
from mbq_export.schemes import SCHEMES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mbq_export.families.base import ModelFamily
    from mbq_export.schemes.base import QuantScheme

NARROW, WIDE = 3, 4
SCHEME_OF: Final[Mapping[int, str]] = {NARROW: "w3a16", WIDE: "w4a16"}
"""Weight-only formats that one model may mix: their graphs differ in the nodes of linears alone."""

Unit = tuple[int, str]
"""Layer and name of a unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedBits:
    """What was asked for.

    Attributes:
        patterns: Glob over module paths, and bits; where several match, the last counts.
        avg_bits: Most bits per weight, on average.
        bytes_budget: Most bytes.
        latency_table: File of times; `avg_bits` then says how much time.
    """

    patterns: tuple[tuple[str, int], ...] = ()
    avg_bits: float | None = None
    bytes_budget: int | None = None
    latency_table: Path | None = None

    @property
    def chooses(self) -> bool:
        """Whether units compete for bits, by predicted errors that calibration data is needed for."""
        return self.avg_bits is not None or self.bytes_budget is not None

    @property
    def asked(self) -> bool:
        """Whether anything was asked for."""
        return self != MixedBits()

    def facts(self) -> dict[str, Any]:
        """What decides the result, without paths."""
        table = self.latency_table
        return {
            "avg_bits": self.avg_bits,
            "bytes_budget": self.bytes_budget,
            "latency_table": None if table is None else sha256_of(table),
            "bits": [[pattern, bits] for pattern, bits in self.patterns],
        }

    def check(self, scheme: QuantScheme | None, group_size: int) -> None:
        """Refuse what cannot be mixed.

        Args:
            scheme: Of units that nothing else is said about, and of the search of channel scales.
            group_size: Columns that share a scale, in all units.

        Raises:
            UsageError: E2002 for options that contradict each other, E2003 for an average out of range, E2004 for a
                group size that a format does not have, E2005 for a width that no format has.
        """
        if not self.asked:
            return
        for pattern, bits in self.patterns:
            if bits not in SCHEME_OF:
                raise UsageError(
                    "E2005",
                    f"--bits {pattern}={bits} is no width that can be mixed.",
                    why=f"known: {', '.join(map(str, SCHEME_OF))}",
                    fix=(f"--bits '{pattern}={NARROW}'", f"--bits '{pattern}={WIDE}'"),
                )
        if scheme is None or scheme.name not in SCHEME_OF.values():
            raise UsageError(
                "E2002",
                f"{self._first} does not go with {'--wbits 16' if scheme is None else f'--scheme {scheme.name}'}.",
                why=f"units of {' and '.join(SCHEME_OF.values())} can be mixed",
                fix=("--wbits 3", f"leave out {self._first}"),
            )
        for name in SCHEME_OF.values():
            SCHEMES[name].groups_of(group_size, group_size)  # a row of one group
        self._check_budget(scheme)

    def _check_budget(self, scheme: QuantScheme) -> None:
        if self.avg_bits is not None and self.bytes_budget is not None:
            raise UsageError(
                "E2002",
                "--avg-bits contradicts --bytes-budget.",
                why="each of them says how much may be spent",
                fix=("leave out --bytes-budget", "leave out --avg-bits"),
            )
        if self.latency_table is not None and self.avg_bits is None:
            raise UsageError(
                "E2002",
                "--latency-table does not go without --avg-bits.",
                why="the table says what a unit costs, the average how much of the time between all units at 3 bits "
                "and all at 4 may be spent",
                fix="--avg-bits 3.3",
            )
        if self.chooses and scheme.weight_bits != NARROW:
            raise UsageError(
                "E2002",
                f"{self._first} contradicts {scheme.weight_bits} bits.",
                why=f"it decides which units get more than {NARROW}",
                fix=(f"--wbits {NARROW}", f"leave out {self._first}"),
            )
        if self.avg_bits is not None and not NARROW <= self.avg_bits <= WIDE:
            raise UsageError(
                "E2003",
                f"--avg-bits {self.avg_bits:g} is out of range.",
                why=f"units have {NARROW} or {WIDE} bits, so averages lie from {NARROW} to {WIDE}",
                fix="--avg-bits 3.3",
            )

    @property
    def _first(self) -> str:
        """An option that was given."""
        given = {"--avg-bits": self.avg_bits, "--bytes-budget": self.bytes_budget}
        return next((name for name, value in given.items() if value is not None), "--bits")


def fixed_bits(mixed: MixedBits, *, family: ModelFamily, layers: int) -> dict[Unit, int]:
    """Widths of the units that patterns name.

    Args:
        mixed: Its patterns.
        family: Names units and linears.
        layers: Number of blocks.

    Raises:
        UsageError: E2001 for a pattern that matches nothing, E2006 for a unit whose linears would differ.
    """
    said: dict[str, int] = {}
    paths = [
        family.linear_path(layer, linear) for layer in range(layers) for linear in family.linears
    ]
    for pattern, bits in mixed.patterns:
        matching = [path for path in paths if _matches(path, pattern)]
        if not matching:
            raise UsageError(
                "E2001",
                f"--bits {pattern}={bits} matches no linear.",
                why=f"there are {len(paths)}, from {paths[0]} to {paths[-1]}",
                fix=("--bits 'layers.0.*=4'", "--bits 'mlp.down_proj=4'"),
            )
        said |= dict.fromkeys(matching, bits)
    found: dict[Unit, int] = {}
    for layer in range(layers):
        for place in family.smooth:
            widths = {linear: said.get(family.linear_path(layer, linear)) for linear in place.into}
            common = _common_bits(layer, place.unit, widths)
            if common is not None:
                found[layer, place.unit] = common
    return found


def _common_bits(layer: int, unit: str, widths: Mapping[str, int | None]) -> int | None:
    """The width of all linears of a unit; None if nothing was said about any.

    Raises:
        UsageError: E2006 if they differ.
    """
    if len(set(widths.values())) == 1:
        return next(iter(widths.values()))
    told = ", ".join(f"{name} {bits or 'nothing'}" for name, bits in widths.items())
    raise UsageError(
        "E2006",
        f"Unit {unit} of layer {layer} would have several widths: {told}.",
        why="its linears become one node of a graph, which has one width",
        fix=f"give --bits a pattern for all of {', '.join(widths)}",
    )


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")
