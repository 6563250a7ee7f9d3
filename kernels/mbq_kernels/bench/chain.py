"""All linears of one decoded token in one graph: the figure that a user feels.

    for every block    q|k|v   o   gate|up   down          each with weights of its own

No attention, norms or head: those are in `decode`. The weights of all blocks together exceed every cache, so nothing
needs rotating. The base runs before and after the others, each alone in memory.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from mbq_export.errors import MbqError
from mbq_kernels.bench.clock import Launch
from mbq_kernels.bench.entrant import Entrant, Placed, Placing, activations
from mbq_kernels.bench.limits import predicted_chain_ms
from mbq_kernels.bench.protocol import DRY, Timing, between, measure
from mbq_kernels.bench.session import Rig, faults_of, release, said
from mbq_kernels.bench.shapes import Block

PEERS_IN_CHAIN: Final = ("torch int4",)
SOURCES: Final = ("base", "cuda", "triton", "oracle")


def chain_entrants(entrants: Sequence[Entrant]) -> list[Entrant]:
    """Those that multiply single rows: all of ours, and the peers worth the time."""
    return [e for e in entrants if e.takes(1) and (e.source in SOURCES or e.name in PEERS_IN_CHAIN)]


def time_chain(rig: Rig, block: Block, entrants: Sequence[Entrant]) -> list[dict[str, Any]]:
    """Time one token's linears for every entrant of the base's dtype.

    Args:
        rig: What to time with.
        block: The decoder's linears, and how often they come.
        entrants: As `chain_entrants` returns; the first of a dtype that is a base is compared with.
    """
    rows: list[dict[str, Any]] = []
    for dtype in dict.fromkeys(entrant.dtype for entrant in entrants):
        own = [entrant for entrant in entrants if entrant.dtype == dtype]
        base = next(entrant for entrant in own if entrant.source == "base")
        others = [entrant for entrant in own if entrant is not base]
        whys: dict[str, str] = {}
        found = between(
            partial(_timed, rig, block, base, whys),
            [partial(_timed, rig, block, entrant, whys) for entrant in others],
        )
        base_us = None if found.base is None else found.base.median_us
        for entrant, timing in zip((base, *others), (found.base, *found.others), strict=True):
            why = whys.get(entrant.name, "")
            rows.append(_row(rig, block, entrant, timing, why, base_us))
    return rows


def _timed(rig: Rig, block: Block, entrant: Entrant, whys: dict[str, str]) -> Timing | None:
    """Place, gate and time one entrant, then give its memory back."""
    try:
        launches, wrong = _launches(rig, block, entrant)
        if not wrong:
            return measure(rig.clock, launches)
        whys[entrant.name] = f"wrong: {wrong}"
    except faults_of(entrant) as error:
        whys[entrant.name] = said(error)
    except MbqError as error:
        whys[entrant.name] = error.message
    finally:
        launches = []
        release(rig)
    return None


def _launches(rig: Rig, block: Block, entrant: Entrant) -> tuple[list[Launch], str]:
    """Every launch of a token in order, and what is wrong with the first block's answers."""
    placing = Placing(setting=rig.setting, copies=block.layers, largest_m=1)
    placed: list[tuple[Placed, Any]] = []
    for shape in block.linears:
        here = entrant.place(shape, placing)
        x = activations(shape, 1, dtype=entrant.dtype, device=rig.setting.device)
        y = here.run(0, x)
        rig.clock.finish()
        wrong = here.wrong(y, x)
        if wrong:
            return [], f"{shape.name}: {wrong}"
        placed.append((here, x))
    return [partial(here.run, layer, x) for layer in range(block.layers) for here, x in placed], ""


def _row(
    rig: Rig,
    block: Block,
    entrant: Entrant,
    timing: Timing | None,
    why: str,
    base_us: float | None,
) -> dict[str, Any]:
    """One line: the time of a token is the mean launch times the launches."""
    launches = block.layers * len(block.linears)
    weight_bytes = block.layers * sum(
        entrant.traffic(shape, 1).weight_bytes for shape in block.linears
    )
    token_ms = None if timing is None else launches * timing.median_us / 1e3
    ours = entrant.source != "peer"
    return {
        "entrant": entrant.name,
        "source": entrant.source,
        "scheme": entrant.scheme,
        "dtype": entrant.dtype,
        "group_size": entrant.group_size,
        "model": block.name,
        "launches": launches,
        "weight_bytes": int(weight_bytes),
        "timing": None if timing is None else timing.as_json(),
        **({} if timing is not None else {"timing_why": why or DRY}),
        "correct": False if why.startswith("wrong: ") else None if why else True,
        "token_ms": token_ms,
        "gb_s": None if token_ms is None else weight_bytes / token_ms / 1e6,
        "speedup": None if timing is None or base_us is None else base_us / timing.median_us,
        "predicted_ms": predicted_chain_ms(
            block, rig.card, scheme=entrant.scheme, group_size=entrant.group_size
        )
        if ours and rig.card is not None
        else None,
    }
