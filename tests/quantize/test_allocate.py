"""Widths within a budget: what competes, what is fixed, what is out of reach."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mbq_export.errors import UsageError
from mbq_export.families import FAMILIES
from mbq_export.quantize.allocate import Competition, Option, allocate, compete, decide, named
from mbq_export.quantize.widths import MixedBits
from mbq_export.schemes import SCHEMES

FAMILY = FAMILIES["llava_onevision"]
SHAPES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}
WEIGHTS = 2 * (256 + 128 + 512 + 256) * 128
OVERHEAD = WEIGHTS // 64 * 3  # a scale and a zero point per group of 64


def competition(mixed: MixedBits) -> Competition:
    return compete(mixed, family=FAMILY, shapes=SHAPES, layers=2, group_size=64)


def option(unit: int, narrow: int, wide: int, *, fixed: int | None = None) -> Option:
    return Option(unit=(unit, "o"), weights=1, fixed=fixed, costs={3: narrow, 4: wide})


def test_an_average_is_a_share_of_the_bits_of_codes_exactly() -> None:
    found = competition(MixedBits(avg_bits=3.3))
    assert found.cost == "code_bits"
    assert found.budget == WEIGHTS * 33 // 10
    assert sum(each.costs[3] for each in found.options) == 3 * WEIGHTS


def test_a_budget_of_bytes_counts_scales_and_zero_points() -> None:
    least = WEIGHTS * 3 // 8 + OVERHEAD
    assert competition(MixedBits(bytes_budget=least)).budget == least
    with pytest.raises(UsageError, match=f"--bytes-budget {least - 1} is out of reach") as caught:
        competition(MixedBits(bytes_budget=least - 1))
    assert caught.value.code == "E2003"
    assert f"at least {least} bytes" in caught.value.why


def test_a_budget_beyond_four_bits_everywhere_gives_four_bits_everywhere() -> None:
    found = competition(MixedBits(bytes_budget=1 << 30))
    errors = {each.unit: {3: 1.0, 4: 2.0} for each in found.options}
    assert set(decide(found, errors).values()) == {4}


def test_fixed_widths_narrow_what_an_average_can_be() -> None:
    down = ("mlp.down_proj", 4)
    with pytest.raises(UsageError, match=r"--avg-bits 3\.1 is out of reach") as caught:
        competition(MixedBits(avg_bits=3.1, patterns=(down,)))
    assert caught.value.why == "with the widths that --bits fixes, averages lie from 3.222 to 4"
    with pytest.raises(UsageError, match=r"--avg-bits 3\.9 is out of reach"):
        competition(MixedBits(avg_bits=3.9, patterns=(("mlp.down_proj", 3),)))


def test_a_fixed_unit_keeps_its_width_and_its_share_of_the_budget() -> None:
    found = competition(MixedBits(avg_bits=3.3, patterns=(("layers.1.self_attn.o_proj", 4),)))
    errors = {each.unit: {3: 1.0, 4: 0.5} for each in found.options}
    errors[1, "o"] = {3: 0.0, 4: 5.0}
    bits = decide(found, errors)
    assert bits[1, "o"] == 4
    assert found.spent(bits) <= found.budget


def test_widths_are_those_that_trying_all_finds() -> None:
    rng = np.random.default_rng(5)
    for _ in range(5):
        options = tuple(option(i, *sorted(rng.integers(1, 50, 2).tolist())) for i in range(8))
        errors = {each.unit: {3: 1 + rng.random(), 4: rng.random()} for each in options}
        budget = int(rng.integers(*(sum(o.costs[b] for o in options) for b in (3, 4))))
        found = decide(Competition(options=options, cost="ns", budget=budget), errors)
        best = min(
            sum(errors[o.unit][b] for o, b in zip(options, bits, strict=True))
            for bits in itertools.product((3, 4), repeat=8)
            if sum(o.costs[b] for o, b in zip(options, bits, strict=True)) <= budget
        )
        reached = sum(errors[unit][bits] for unit, bits in found.items())
        assert reached == pytest.approx(best)


def test_more_bits_that_cost_no_more_time_are_taken_where_they_help() -> None:
    options = (option(0, 5, 4), option(1, 5, 5), option(2, 5, 4), option(3, 5, 9))
    errors = {(0, "o"): {3: 2.0, 4: 1.0}, (1, "o"): {3: 2.0, 4: 1.0}}
    errors |= {(2, "o"): {3: 1.0, 4: 2.0}, (3, "o"): {3: 2.0, 4: 1.0}}
    bits = decide(Competition(options=options, cost="ns", budget=20), errors)
    assert bits == {(0, "o"): 4, (1, "o"): 4, (2, "o"): 3, (3, "o"): 3}


def test_a_table_of_times_turns_the_average_into_a_share_of_time(tmp_path: Path) -> None:
    shapes = {"qkv": (256, 128), "o": (128, 128), "gate_up": (512, 128), "down": (128, 256)}
    rows = [
        {"scheme": scheme, "group_size": 64, "n": n, "k": k, "us": us}
        for n, k in shapes.values()
        for scheme, us in (("w3a16", 1.0), ("w4a16", 1.5))
    ]
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"schema": "mbq-export/latency@1", "rows": rows}))
    found = competition(MixedBits(avg_bits=3.25, latency_table=path))
    assert found.cost == "nanoseconds"
    assert found.budget == 9000  # 8 units: 8000 ns at 3 bits, 12000 at 4
    gains = {each.unit: {3: 1.0 + place, 4: 0.0} for place, each in enumerate(found.options)}
    assert [unit for unit, bits in decide(found, gains).items() if bits == 4] == [
        (1, "gate_up"),
        (1, "down"),
    ]


def test_the_record_adds_up() -> None:
    mixed = MixedBits(avg_bits=3.5)
    found = competition(mixed)
    errors = {each.unit: {3: 1.0 + each.unit[0], 4: 0.25} for each in found.options}
    allocation = allocate(mixed, found, errors)
    record = allocation.record
    assert record["predicted"]["all_3"] == 4 * 1 + 4 * 2
    assert record["predicted"]["all_4"] == 8 * 0.25
    assert (
        record["predicted"]["all_4"] < record["predicted"]["chosen"] < record["predicted"]["all_3"]
    )
    assert record["spent"] == sum(row["cost"][str(row["bits"])] for row in record["units"])
    assert record["average_bits"] == record["spent"] / WEIGHTS
    assert {unit: scheme.name for unit, scheme in allocation.schemes().items()} == {
        unit: f"w{bits}a16" for unit, bits in allocation.bits.items()
    }


def test_units_that_no_pattern_names_keep_the_scheme() -> None:
    mixed = MixedBits(patterns=(("mlp.down_proj", 3),))
    found = named(mixed, SCHEMES["w4a16"], family=FAMILY, shapes=SHAPES, layers=2)
    assert {unit for unit, bits in found.bits.items() if bits == 3} == {(0, "down"), (1, "down")}
    assert found.record["predicted"] is None
    assert [row["fixed"] for row in found.record["units"]] == [False, False, False, True] * 2
