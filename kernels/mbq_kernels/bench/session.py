"""One run of the benchmark: every linear of a suite, base before and after, wrong answers never timed."""

import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mbq_export.errors import MbqError
from mbq_export.progress import Progress, silent
from mbq_kernels.bench.ceilings import Ceilings
from mbq_kernels.bench.clock import Clock
from mbq_kernels.bench.entrant import Entrant, Placed, Placing, Setting, activations
from mbq_kernels.bench.limits import Card, predicted_us
from mbq_kernels.bench.protocol import DRY, Timing, between, copies_for, measure, rotation
from mbq_kernels.bench.shapes import Shape, Suite

logger = logging.getLogger(__name__)

FOREIGN_FAULTS: Final = (
    RuntimeError,  # torch.OutOfMemoryError and refused operators are among these
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ImportError,
)
"""What code of others raises on a shape or device that it does not take: a reason, not an end of the run."""
OWN_FAULTS: Final = (RuntimeError,)
"""Of our own code only the device's: anything else is a bug that must not pass as a reason."""
WRONG: Final = "wrong: "
DRY_COPIES: Final = 2
"""Enough to see that a second copy is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """What a run needs throughout.

    Attributes:
        clock: Times launches.
        setting: Where they run.
        ceilings: What the card reaches.
        card: Its datasheet, if it is known.
        progress: Told after every problem.
    """

    clock: Clock
    setting: Setting
    ceilings: Ceilings
    card: Card | None
    progress: Progress = silent

    def copies(self, weight_bytes: float) -> int:
        """R for weights of a size."""
        if not self.clock.measures:
            return DRY_COPIES
        return copies_for(weight_bytes, self.setting.machine.l2_bytes)


@dataclass(slots=True, kw_only=True)
class Seat:
    """An entrant at one linear: its weights, or why it has none."""

    entrant: Entrant
    copies: int
    placed: Placed | None
    why: str


def time_linears(
    rig: Rig, suite: Suite, entrants: Sequence[Entrant], rows: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Time every entrant at every problem of a suite.

    Args:
        rig: What to time with.
        suite: Shapes and rows.
        entrants: Those present; each dtype has one base among them.
        rows: Where rows go, shape by shape, so that an ended run leaves them; None for a new list.

    Returns:
        One row per problem and entrant that takes it, with a time or a reason.
    """
    rows = [] if rows is None else rows
    problems = suite.problems()
    for shape in suite.shapes:
        sizes = [m for s, m in problems if s == shape]
        for dtype in dict.fromkeys(entrant.dtype for entrant in entrants):
            own = [entrant for entrant in entrants if entrant.dtype == dtype]
            asked = [e for e in own if any(e.asked(suite, m) for m in sizes)]
            seats = [_seat(rig, entrant, shape, max(sizes)) for entrant in asked]
            for m in sizes:
                here = [seat for seat in seats if seat.entrant.asked(suite, m)]
                if len(here) > 1:
                    rows += _problem(rig, shape, m, here)
            del seats
            release(rig)
        rig.progress(suite.shapes.index(shape) + 1, len(suite.shapes), shape.name)
    return rows


def release(rig: Rig) -> None:
    """Give weights back before the next are placed; a CPU has no pool to empty."""
    if rig.setting.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def _seat(rig: Rig, entrant: Entrant, shape: Shape, largest_m: int) -> Seat:
    copies = rig.copies(entrant.traffic(shape, 1).weight_bytes)
    placing = Placing(setting=rig.setting, copies=copies, largest_m=largest_m)
    try:
        placed = entrant.place(shape, placing)
    except faults_of(entrant) as error:
        return Seat(entrant=entrant, copies=copies, placed=None, why=said(error))
    except MbqError as error:
        return Seat(entrant=entrant, copies=copies, placed=None, why=error.message)
    return Seat(entrant=entrant, copies=copies, placed=placed, why="")


def faults_of(entrant: Entrant) -> tuple[type[Exception], ...]:
    """What an entrant may raise without ending the run."""
    if entrant.source not in {"peer", "triton"}:
        return OWN_FAULTS
    triton = sys.modules.get("triton.errors")
    return FOREIGN_FAULTS if triton is None else (*FOREIGN_FAULTS, triton.TritonError)


def said(error: BaseException) -> str:
    """An error of others in one line."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:160]}"


def _problem(rig: Rig, shape: Shape, m: int, seats: Sequence[Seat]) -> list[dict[str, Any]]:
    """Gate every seat, then time base, others, base."""
    base = next(seat for seat in seats if seat.entrant.source == "base")
    others = [seat for seat in seats if seat is not base]
    x = activations(shape, m, dtype=base.entrant.dtype, device=rig.setting.device)
    whys = {seat.entrant.name: gate(rig, seat, x) for seat in seats}

    def timed(seat: Seat) -> Timing | None:
        if whys[seat.entrant.name]:
            return None
        return _timed(rig, seat, x, whys)

    found = between(lambda: timed(base), [lambda seat=seat: timed(seat) for seat in others])  # type: ignore[misc]
    base_us = None if found.base is None else found.base.median_us
    timings = (found.base, *found.others)
    return [
        row(rig, seat, shape, x, timing=timing, why=whys[seat.entrant.name], base_us=base_us)
        for seat, timing in zip((base, *others), timings, strict=True)
    ]


def gate(rig: Rig, seat: Seat, x: Tensor) -> str:
    """Why a seat is not timed at these activations: absent weights, a fault, or a wrong answer; else empty."""
    if seat.placed is None:
        return seat.why
    try:
        y = seat.placed.run(0, x)
        rig.clock.finish()
        wrong = seat.placed.wrong(y, x)
    except faults_of(seat.entrant) as error:
        return said(error)
    except MbqError as error:
        return f"{error.message} {error.why}".strip()
    if wrong:
        logger.warning("%s is wrong at M = %d: %s", seat.entrant.name, len(x), wrong)
    return f"{WRONG}{wrong}" if wrong else ""


def _timed(rig: Rig, seat: Seat, x: Tensor, whys: dict[str, str]) -> Timing | None:
    """Time a seat that passed; a fault while capturing becomes its reason."""
    placed = seat.placed
    assert placed is not None, "only what passed the gate is timed"
    try:
        return measure(
            rig.clock,
            [lambda copy=copy: placed.run(copy, x) for copy in rotation(seat.copies)],  # type: ignore[misc]
        )
    except faults_of(seat.entrant) as error:
        whys[seat.entrant.name] = said(error)
        return None


def row(
    rig: Rig,
    seat: Seat,
    shape: Shape,
    x: Tensor,
    *,
    timing: Timing | None,
    why: str,
    base_us: float | None,
) -> dict[str, Any]:
    """One line of the result."""
    entrant, m = seat.entrant, len(x)
    weight_bytes = int(entrant.traffic(shape, m).weight_bytes)
    if seat.placed is not None:
        weight_bytes = seat.placed.weight_bytes
    ceiling = rig.ceilings.read_gb_s(weight_bytes) if timing is not None else None
    gb_s = None if timing is None else weight_bytes / timing.median_us / 1e3
    return {
        **described(entrant, shape, m),
        "config": None if seat.placed is None or why else seat.placed.config(m),
        "weight_bytes": weight_bytes,
        "copies": seat.copies,
        "correct": None if why and not why.startswith(WRONG) else not why,
        "timing": None if timing is None else timing.as_json(),
        **({} if timing is not None else {"timing_why": why or DRY}),
        "gb_s": gb_s,
        "read_gb_s": ceiling,
        "limit_us": None if ceiling is None else weight_bytes / ceiling / 1e3,
        "percent_of_read": None if gb_s is None or ceiling is None else 100 * gb_s / ceiling,
        "percent_of_datasheet": None
        if gb_s is None or rig.card is None
        else 100 * gb_s / rig.card.gb_s,
        "speedup": None if timing is None or base_us is None else base_us / timing.median_us,
        "predicted_us": None
        if rig.card is None
        else predicted_us(entrant.traffic(shape, m), rig.card),
    }


def described(entrant: Entrant, shape: Shape, m: int) -> dict[str, Any]:
    """What a row is about."""
    return {
        "entrant": entrant.name,
        "source": entrant.source,
        "scheme": entrant.scheme,
        "dtype": entrant.dtype,
        "group_size": entrant.group_size,
        "n": shape.n,
        "k": shape.k,
        "m": m,
    }
