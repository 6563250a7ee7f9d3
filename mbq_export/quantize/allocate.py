"""Which units get 4 bits: the smallest predicted error that a budget allows (METHODS 11).

    minimise    sum over units of error_b(u)      b = 3 or 4
    subject to  sum over units of cost_b(u) <= budget

Cost is bits of codes, packed bytes, or time. Every unit is taken at the cheaper width - 3 bits, unless a table of times
says otherwise - and the rest of the budget is a knapsack, filled exactly (`knapsack`). Ties go to the earlier unit.
Where a budget holds all units at 4 bits, there is nothing to choose, and all get them.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from mbq_export.errors import UsageError
from mbq_export.quantize.knapsack import best_items
from mbq_export.quantize.unit_costs import LatencyTable, UnitShape, packed_bytes, unit_shapes
from mbq_export.quantize.widths import NARROW, SCHEME_OF, WIDE, MixedBits, Unit, fixed_bits
from mbq_export.schemes import SCHEMES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mbq_export.families.base import ModelFamily
    from mbq_export.quantize.unit_errors import Errors
    from mbq_export.schemes.base import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One unit and what it costs.

    Attributes:
        unit: Which.
        weights: Their number.
        fixed: Its width if that is decided.
        costs: By bits.
    """

    unit: Unit
    weights: int
    fixed: int | None
    costs: Mapping[int, int]

    @property
    def bits(self) -> tuple[int, ...]:
        """Widths that it may get."""
        return (NARROW, WIDE) if self.fixed is None else (self.fixed,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Competition:
    """Units, and what they may cost together.

    Attributes:
        options: In the order of the model.
        cost: What is counted: ``code_bits``, ``bytes`` or ``nanoseconds``.
        budget: Most of it.
    """

    options: tuple[Option, ...]
    cost: str
    budget: int

    def spent(self, bits: Mapping[Unit, int]) -> int:
        """What some widths cost."""
        return sum(option.costs[bits[option.unit]] for option in self.options)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Widths of all units.

    Attributes:
        bits: By unit.
        record: What `mbq.json` says: what was asked for, what it costs, predicted errors.
    """

    bits: Mapping[Unit, int]
    record: Mapping[str, Any]

    def schemes(self) -> dict[Unit, QuantScheme]:
        """Number format of every unit."""
        return {unit: SCHEMES[SCHEME_OF[bits]] for unit, bits in self.bits.items()}


def compete(
    mixed: MixedBits,
    *,
    family: ModelFamily,
    shapes: Mapping[str, tuple[int, int]],
    layers: int,
    group_size: int,
) -> Competition:
    """Work out costs and budget, before anything is computed.

    Args:
        mixed: What was asked for; has a budget.
        family: Names units and linears.
        shapes: (N, K) of each linear of a block.
        layers: Number of blocks.
        group_size: Columns that share a scale.

    Raises:
        UsageError: E2001 or E2006 for patterns, E2001 for a shape without a time, E2003 for a budget out of reach.
        FormatError: E4102 for a table of times that is none.
    """
    fixed = fixed_bits(mixed, family=family, layers=layers)
    units = unit_shapes(family, shapes)
    name, costs = _costs(mixed, units, group_size)
    options = tuple(
        Option(
            unit=(layer, unit),
            weights=shape.weights,
            fixed=fixed.get((layer, unit)),
            costs=costs[unit],
        )
        for layer in range(layers)
        for unit, shape in units.items()
    )
    least, most = (
        sum(choose(option.costs[bits] for bits in option.bits) for option in options)
        for choose in (min, max)
    )
    budget = _budget(mixed, options)
    _check_reach(mixed, options, least=least, budget=budget)
    return Competition(options=options, cost=name, budget=min(budget, most))


def decide(competition: Competition, errors: Mapping[Unit, Errors]) -> dict[Unit, int]:
    """Choose the width of every unit.

    Args:
        competition: Costs and budget.
        errors: Predicted, by unit and bits.
    """
    options, budget = competition.options, competition.budget
    widest = {option.unit: max(option.bits) for option in options}
    if competition.spent(widest) <= budget:
        return widest
    chosen = {
        option.unit: min(option.bits, key=lambda bits: (option.costs[bits], bits))
        for option in options
    }
    rivals = [
        (option.unit, _other(option.bits, chosen[option.unit]), option.costs)
        for option in options
        if len(option.bits) > 1
    ]
    gains = [errors[unit][chosen[unit]] - errors[unit][other] for unit, other, _ in rivals]
    extra = [costs[other] - costs[chosen[unit]] for unit, other, costs in rivals]
    free = [cost == 0 for cost in extra]
    left = budget - competition.spent(chosen)
    paid = iter(
        best_items(
            [gain for gain, zero in zip(gains, free, strict=True) if not zero],
            [cost for cost, zero in zip(extra, free, strict=True) if not zero],
            left,
        )
    )
    for (unit, other, _), gain, zero in zip(rivals, gains, free, strict=True):
        if (gain > 0) if zero else next(paid):
            chosen[unit] = other
    return chosen


def allocate(
    mixed: MixedBits, competition: Competition, errors: Mapping[Unit, Errors]
) -> Allocation:
    """Choose widths, and say what they cost and are predicted to cost the answer.

    Args:
        mixed: What was asked for.
        competition: Costs and budget.
        errors: Predicted, by unit and bits.
    """
    bits = decide(competition, errors)
    record = {
        "asked": mixed.facts(),
        "cost": competition.cost,
        "budget": competition.budget,
        "spent": competition.spent(bits),
        "average_bits": average_bits(
            [(option.weights, bits[option.unit]) for option in competition.options]
        ),
        "predicted": {
            f"all_{NARROW}": _total(errors, dict.fromkeys(bits, NARROW)),
            "chosen": _total(errors, bits),
            f"all_{WIDE}": _total(errors, dict.fromkeys(bits, WIDE)),
        },
        "units": [
            {
                "layer": option.unit[0],
                "unit": option.unit[1],
                "bits": bits[option.unit],
                "fixed": option.fixed is not None,
                "cost": {str(width): cost for width, cost in option.costs.items()},
                "error": {str(width): error for width, error in errors[option.unit].items()},
            }
            for option in competition.options
        ],
    }
    return Allocation(bits=bits, record=record)


def named(
    mixed: MixedBits,
    scheme: QuantScheme,
    *,
    family: ModelFamily,
    shapes: Mapping[str, tuple[int, int]],
    layers: int,
) -> Allocation:
    """Widths where nothing competes: those that patterns name, and the scheme's for the others.

    Args:
        mixed: Patterns, no budget.
        scheme: Of units that no pattern names.
        family: Names units and linears.
        shapes: (N, K) of each linear of a block.
        layers: Number of blocks.

    Raises:
        UsageError: E2001 or E2006 for patterns.
    """
    fixed = fixed_bits(mixed, family=family, layers=layers)
    units = unit_shapes(family, shapes)
    order = [(layer, unit) for layer in range(layers) for unit in units]
    bits = {unit: fixed.get(unit, scheme.weight_bits) for unit in order}
    record = {
        "asked": mixed.facts(),
        "average_bits": average_bits([(units[unit[1]].weights, bits[unit]) for unit in order]),
        "predicted": None,
        "units": [
            {"layer": unit[0], "unit": unit[1], "bits": bits[unit], "fixed": unit in fixed}
            for unit in order
        ],
    }
    return Allocation(bits=bits, record=record)


def average_bits(parts: Sequence[tuple[int, int]]) -> float:
    """Mean bits of a code over weights; scales and zero points are not counted.

    Args:
        parts: Number of weights, and their bits.
    """
    return sum(weights * bits for weights, bits in parts) / sum(weights for weights, _ in parts)


def _costs(
    mixed: MixedBits, units: Mapping[str, UnitShape], group_size: int
) -> tuple[str, dict[str, dict[int, int]]]:
    """What is counted, and how much of it a unit takes at each width."""
    schemes = {bits: SCHEMES[name] for bits, name in SCHEME_OF.items()}
    if mixed.latency_table is not None:
        table = LatencyTable.read(mixed.latency_table)
        return "nanoseconds", {
            name: {
                bits: table.nanoseconds(shape, scheme, group_size)
                for bits, scheme in schemes.items()
            }
            for name, shape in units.items()
        }
    if mixed.bytes_budget is not None:
        return "bytes", {
            name: {
                bits: packed_bytes(shape, scheme, group_size) for bits, scheme in schemes.items()
            }
            for name, shape in units.items()
        }
    return "code_bits", {
        name: {bits: shape.weights * bits for bits in schemes} for name, shape in units.items()
    }


def _budget(mixed: MixedBits, options: Sequence[Option]) -> int:
    """What may be spent. An average is taken as typed: 3.3 is thirty-three tenths."""
    if mixed.bytes_budget is not None:
        return mixed.bytes_budget
    share = Decimal(repr(mixed.avg_bits)) - NARROW
    narrow, wide = (sum(option.costs[bits] for option in options) for bits in (NARROW, WIDE))
    return int(narrow + share * (wide - narrow))


def _check_reach(mixed: MixedBits, options: Sequence[Option], *, least: int, budget: int) -> None:
    """Refuse a budget that no choice of widths meets, and an average above what fixed widths leave.

    Raises:
        UsageError: E2003.
    """
    if mixed.bytes_budget is not None and budget < least:
        raise UsageError(
            "E2003",
            f"--bytes-budget {budget} is out of reach.",
            why=f"codes, scales and zero points of all decoder linears take at least {least} bytes",
            fix=(f"--bytes-budget {least}", "a larger --group-size"),
        )
    if mixed.avg_bits is None:
        return
    low, high = (
        average_bits([(option.weights, choose(option.bits)) for option in options])
        for choose in (min, max)
    )
    beyond = mixed.latency_table is None and mixed.avg_bits > high
    if budget < least or beyond:
        raise UsageError(
            "E2003",
            f"--avg-bits {mixed.avg_bits:g} is out of reach.",
            why=f"with the widths that --bits fixes, averages lie from {low:.4g} to {high:.4g}",
            fix=(f"--avg-bits {(low + high) / 2:.3g}", "fewer --bits"),
        )


def _other(bits: Sequence[int], one: int) -> int:
    return next(each for each in bits if each != one)


def _total(errors: Mapping[Unit, Errors], bits: Mapping[Unit, int]) -> float:
    return float(f"{sum(errors[unit][width] for unit, width in bits.items()):.6g}")
