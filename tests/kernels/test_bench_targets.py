"""Targets and limits: the judge holds each figure against its bound, the model gives the figures of the design."""

from typing import Any

import pytest

from mbq_kernels.bench.limits import (
    FLOAT,
    card_named,
    card_of,
    predicted_chain_ms,
    predicted_us,
    traffic,
)
from mbq_kernels.bench.shapes import DOWN, GATE_OR_UP, GATE_UP, LLAVA_OV_7B, OUTPUT, QKV, Shape
from mbq_kernels.bench.targets import TARGETS, judged

Rows = list[dict[str, Any]]
LARGE = (GATE_OR_UP, GATE_UP, DOWN)


def row(entrant: str, shape: Shape, m: int, us: float | None, **more: object) -> dict[str, Any]:
    timing = None if us is None else {"median_us": us}
    found = {"entrant": entrant, "n": shape.n, "k": shape.k, "m": m, "timing": timing}
    return {**found, "percent_of_read": None, "speedup": None, **more}


def statuses(rows: Rows, chain: Rows | None = None, **more: object) -> dict[str, str]:
    document = {"rows": rows, "chain": chain or [], "decode": None}
    document |= {"device": {"name": "NVIDIA H100 80GB HBM3"}, **more}
    return {line["id"]: line["status"] for line in judged(document)}


def test_nothing_is_judged_without_measurements() -> None:
    assert set(statuses([]).values()) == {"not measured"}


@pytest.mark.parametrize(
    ("shares", "status"),
    [
        ((91.0, 92.0, 93.0), "stretch reached"),
        ((85.0, 95.0, 95.0), "reached"),
        ((84.9, 95.0, 95.0), "missed"),
        ((95.0, 95.0, None), "not measured"),
    ],
)
def test_the_worst_of_the_large_layers_decides(
    shares: tuple[float | None, ...], status: str
) -> None:
    rows = [
        row("CUDA w3a16 g128", shape, 1, 10.0, percent_of_read=share)
        for shape, share in zip(LARGE, shares, strict=True)
    ]
    assert statuses(rows)["T1a"] == status


def test_a_target_over_three_layers_is_not_reached_by_two() -> None:
    rows = [row("CUDA w3a16 g128", s, 1, 10.0, percent_of_read=95.0) for s in LARGE[:2]]
    assert statuses(rows)["T1a"] == "not measured"


@pytest.mark.parametrize(("us", "status"), [(4.0, "reached"), (4.1, "missed")])
def test_a_time_is_reached_from_above(us: float, status: str) -> None:
    rows = [row("CUDA w3a16 g128", OUTPUT, 1, us), row("CUDA w3a16 g128", QKV, 1, 3.0)]
    assert statuses(rows)["T2a"] == status


def test_eight_rows_are_held_against_one() -> None:
    shapes = (OUTPUT, QKV, *LARGE)
    rows = [row("CUDA w3a16 g128", shape, 1, 10.0) for shape in shapes]
    for us, status in ((11.0, "reached"), (11.1, "missed")):
        eight = [row("CUDA w3a16 g128", shape, 8, us) for shape in shapes]
        assert statuses([*rows, *eight])["T3"] == status


def test_triton_is_beaten_only_where_both_were_timed() -> None:
    rows = [row("CUDA w3a16 g128", OUTPUT, 1, 3.0), row("Triton w3a16 g128", OUTPUT, 1, 4.0)]
    assert statuses(rows)["T8a"] == "reached"
    half_timed = [*rows, row("CUDA w3a16 g128", QKV, 1, 3.0)]
    assert statuses(half_timed)["T8a"] == "not measured"


@pytest.mark.parametrize(
    ("token_ms", "status"), [(1.05, "stretch reached"), (1.2, "reached"), (1.3, "missed")]
)
def test_the_chain_is_judged_in_milliseconds(token_ms: float, status: str) -> None:
    chain = [{"entrant": "CUDA w3a16 g128", "token_ms": token_ms}]
    assert statuses([], chain)["T7a"] == status


def test_decode_is_judged_by_its_worst_context() -> None:
    rows = [{"entrant": "CUDA w3a16 g128", "speedup": s} for s in (3.4, 3.2, 2.9)]
    assert statuses([], decode={"rows": rows})["T10"] == "missed"
    assert statuses([], decode={"rows": rows[:2]})["T10"] == "reached"


def test_another_card_is_not_judged() -> None:
    chain = [{"entrant": "CUDA w3a16 g128", "token_ms": 1.0}]
    found = statuses([], chain, device={"name": "NVIDIA GeForce RTX 4090"})
    assert found["T7a"] == "not measured"


def test_targets_have_names_of_their_own() -> None:
    assert len({target.id for target in TARGETS}) == len(TARGETS)


@pytest.mark.parametrize(
    ("shape", "card", "speedup"),
    [
        (OUTPUT, "H100", 2.9),
        (OUTPUT, "RTX 4090", 4.0),
        (QKV, "H100", 3.1),
        (GATE_OR_UP, "H100", 4.3),
        (GATE_UP, "H100", 4.7),
        (DOWN, "AGX Orin", 5.0),
    ],
)
def test_the_model_predicts_what_bytes_and_a_launch_allow(
    shape: Shape, card: str, speedup: float
) -> None:
    fp16, w3 = (
        predicted_us(traffic(shape, 1, scheme=scheme), card_named(card))
        for scheme in (FLOAT, "w3a16")
    )
    assert fp16 / w3 == pytest.approx(speedup, abs=0.06)


def test_the_chain_is_predicted_near_its_target() -> None:
    h100 = card_named("H100")
    assert predicted_chain_ms(LLAVA_OV_7B, h100, scheme="w3a16") == pytest.approx(1.08, abs=0.01)


def test_many_rows_are_bound_by_multiplying() -> None:
    h100 = card_named("H100")
    few, many = (traffic(GATE_UP, m, scheme="w3a16") for m in (1, 4096))
    assert predicted_us(many, h100) == pytest.approx(2.0 + many.operations / 989e6)
    assert predicted_us(few, h100) < 21


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Orin", "AGX Orin"),
        ("NVIDIA H100 PCIe", None),  # slower memory than the other H100: no datasheet here
    ],
)
def test_a_card_is_known_by_the_drivers_name(name: str, card: str | None) -> None:
    found = card_of(name)
    assert (None if found is None else found.name) == card
