"""What a run would do, before it does any of it: rows, bytes, predicted times, who is missing, how long it takes."""

from collections.abc import Sequence
from typing import Any, Final

from mbq_kernels.bench.entrant import Entrant, Setting
from mbq_kernels.bench.limits import LARGE_L2_BYTES, PREDICTED, Card, card_named, predicted_us
from mbq_kernels.bench.protocol import (
    DRY,
    WARM_REPLAYS,
    copies_for,
    replays_for,
    rotation,
)
from mbq_kernels.bench.session import described
from mbq_kernels.bench.shapes import Shape, Suite

PLACE_S: Final = 0.3
CHECK_S: Final = 0.05
"""Judgement: drawing and copying the weights of an entrant; checking an answer and capturing a graph."""


def planned_rows(suite: Suite, entrants: Sequence[Entrant]) -> list[dict[str, Any]]:
    """One row per problem and entrant, every time of it not measured, with the predictions of three cards."""
    rows = []
    for shape, m in suite.problems():
        for entrant in entrants:
            if entrant.source == "oracle" or not entrant.asked(suite, m):
                continue
            moved = entrant.traffic(shape, m)
            rows.append(
                {
                    **described(entrant, shape, m),
                    "config": None,
                    "weight_bytes": int(moved.weight_bytes),
                    "copies": copies_for(moved.weight_bytes, LARGE_L2_BYTES),
                    "correct": None,
                    "timing": None,
                    "timing_why": DRY,
                    "gb_s": None,
                    "read_gb_s": None,
                    "limit_us": None,
                    "percent_of_read": None,
                    "percent_of_datasheet": None,
                    "speedup": None,
                    "predicted_us": predicted_us(moved, card_named(PREDICTED[0])),
                    "predictions_us": {
                        name: predicted_us(moved, card_named(name)) for name in PREDICTED
                    },
                }
            )
    return rows


def absent_entrants(
    entrants: Sequence[Entrant], setting: Setting, *, rehearsal: bool
) -> list[dict[str, str]]:
    """Who does not take part and why; stand-ins of a rehearsal are not missed on a GPU."""
    return [
        {"entrant": entrant.name, "source": entrant.source, "why": entrant.absent(setting)}
        for entrant in entrants
        if entrant.absent(setting) and (rehearsal or entrant.source != "oracle")
    ]


def seconds(suite: Suite, entrants: Sequence[Entrant], card: Card) -> float:
    """Estimated length of the linears on a card: the protocol's replays at predicted times."""
    ours = [entrant for entrant in entrants if entrant.source != "oracle"]
    total = PLACE_S * len(suite.shapes) * len(ours)
    for shape, m in suite.problems():
        for entrant in ours:
            if entrant.asked(suite, m):
                times = 2 if entrant.source == "base" else 1
                total += CHECK_S + times * _timed_s(entrant, shape, m, card)
    return total


def _timed_s(entrant: Entrant, shape: Shape, m: int, card: Card) -> float:
    moved = entrant.traffic(shape, m)
    launches = len(rotation(copies_for(moved.weight_bytes, LARGE_L2_BYTES)))
    replay_us = launches * predicted_us(moved, card)
    return (WARM_REPLAYS * replay_us + replays_for(replay_us) * replay_us) / 1e6
