"""What the kernels are meant to reach on an H100, as data, and the judge that says reached, missed or not measured.

A target is one figure of the result with a bound, and for some a stretch beyond it. A figure over several rows is its
worst one, and it is not measured unless every row it needs is. Nobody is asked: a figure either holds or does not.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from mbq_kernels.bench.shapes import DOWN, GATE_OR_UP, GATE_UP, OUTPUT, QKV, Shape

Status = Literal["reached", "stretch reached", "missed", "not measured"]
Document = Mapping[str, Any]
Row = Mapping[str, Any]

W3, W4A8 = "CUDA w3a16 g128", "CUDA w4a8 channel"
W3_TRITON: Final = "Triton w3a16 g128"
W3_DEQUANT: Final = "dequantize w3a16 + cuBLAS"
BASE: Final = "cuBLAS fp16"
LARGE: Final = (GATE_OR_UP, GATE_UP, DOWN)
SMALL: Final = (OUTPUT, QKV)
PREFILL_ROWS: Final = 512
DEQUANT_ROWS: Final = 2048
DEVICE: Final = "H100"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One figure and its bound.

    Attributes:
        id: ``T1`` and so on, a letter where a target has several figures.
        text: What is meant, in words.
        value: The figure of a result; None where it was not measured.
        bound: What it must reach.
        at_least: Whether more is better.
        unit: Of figure and bound.
        stretch: A further bound; None if there is none.
    """

    id: str
    text: str
    value: Callable[[Document], float | None]
    bound: float
    at_least: bool
    unit: str
    stretch: float | None = None

    def status(self, value: float | None) -> Status:
        """Judge a figure."""
        if value is None:
            return "not measured"
        if not self._holds(value, self.bound):
            return "missed"
        if self.stretch is not None and self._holds(value, self.stretch):
            return "stretch reached"
        return "reached"

    def _holds(self, value: float, bound: float) -> bool:
        return value >= bound if self.at_least else value <= bound


def judged(document: Document) -> list[dict[str, Any]]:
    """Judge every target on a result; on another card than an H100 nothing counts as measured."""
    there = DEVICE in str(document["device"]["name"])
    lines = []
    for target in TARGETS:
        value = target.value(document) if there else None
        lines.append(
            {
                "id": target.id,
                "text": target.text,
                "value": value,
                "bound": target.bound,
                "at_least": target.at_least,
                "stretch": target.stretch,
                "unit": target.unit,
                "status": target.status(value),
            }
        )
    return lines


def rows_of(
    document: Document, entrant: str, shapes: Iterable[Shape] | None, rows: Callable[[int], bool]
) -> list[Row]:
    """Rows of an entrant at some shapes (None: all) and values of M."""
    wanted = None if shapes is None else {(shape.n, shape.k) for shape in shapes}
    return [
        row
        for row in document["rows"]
        if row["entrant"] == entrant
        and rows(row["m"])
        and (wanted is None or (row["n"], row["k"]) in wanted)
    ]


def worst(
    entrant: str, key: str, shapes: tuple[Shape, ...] | None, rows: Callable[[int], bool]
) -> Callable[[Document], float | None]:
    """The smallest of a figure over rows; none if a row lacks it or a shape has no row."""

    def figure(document: Document) -> float | None:
        found = rows_of(document, entrant, shapes, rows)
        values = [row[key] for row in found]
        complete = shapes is None or {(r["n"], r["k"]) for r in found} >= {
            (s.n, s.k) for s in shapes
        }
        if not values or not complete or None in values:
            return None
        return float(min(values))

    return figure


def one(m: int) -> Callable[[int], bool]:
    """M is this."""
    return lambda rows: rows == m


def from_rows(m: int) -> Callable[[int], bool]:
    """M is at least this."""
    return lambda rows: rows >= m


def slowest_us(
    entrant: str, shapes: tuple[Shape, ...], m: int
) -> Callable[[Document], float | None]:
    """The longest median over shapes."""

    def figure(document: Document) -> float | None:
        times = [_median(row) for row in rows_of(document, entrant, shapes, one(m))]
        known = [time for time in times if time is not None]
        return max(known) if known and len(known) == len(shapes) else None

    return figure


def growth(entrant: str, shapes: tuple[Shape, ...], m: int) -> Callable[[Document], float | None]:
    """The largest ratio of the time at M to the time at 1."""

    def figure(document: Document) -> float | None:
        ratios = [_ratio(document, (entrant, shape, m), (entrant, shape, 1)) for shape in shapes]
        known = [ratio for ratio in ratios if ratio is not None]
        return max(known) if len(known) == len(shapes) else None

    return figure


def against(
    entrant: str, other: str, rows: Callable[[int], bool]
) -> Callable[[Document], float | None]:
    """The smallest ratio of the other's time to the entrant's, over every problem that either has."""

    def figure(document: Document) -> float | None:
        problems = {
            (Shape(n=row["n"], k=row["k"]), row["m"])
            for name in (entrant, other)
            for row in rows_of(document, name, None, rows)
        }
        ratios = [_ratio(document, (other, s, m), (entrant, s, m)) for s, m in sorted(problems)]
        known = [ratio for ratio in ratios if ratio is not None]
        return min(known) if known and len(known) == len(ratios) else None

    return figure


def chain_ms(entrant: str) -> Callable[[Document], float | None]:
    """Milliseconds of a token's linears."""

    def figure(document: Document) -> float | None:
        return next((r["token_ms"] for r in document["chain"] if r["entrant"] == entrant), None)

    return figure


def decode_speedup(document: Document) -> float | None:
    """The smallest gain of our decode over fp16, over the contexts."""
    decode = document.get("decode")
    values = [row["speedup"] for row in decode["rows"] if row["entrant"] == W3] if decode else []
    return None if not values or None in values else float(min(values))


def _median(row: Row) -> float | None:
    return None if row["timing"] is None else float(row["timing"]["median_us"])


def _ratio(
    document: Document, above: tuple[str, Shape, int], below: tuple[str, Shape, int]
) -> float | None:
    found = []
    for entrant, shape, m in (above, below):
        times = [_median(row) for row in rows_of(document, entrant, (shape,), one(m))]
        found.append(times[0] if times else None)
    first, second = found
    return None if first is None or second is None else first / second


def _least(
    id_: str,
    text: str,
    value: Callable[[Document], float | None],
    bound: float,
    unit: str = "x",
    stretch: float | None = None,
) -> Target:
    return Target(
        id=id_, text=text, value=value, bound=bound, at_least=True, unit=unit, stretch=stretch
    )


def _most(
    id_: str,
    text: str,
    value: Callable[[Document], float | None],
    bound: float,
    unit: str = "x",
    stretch: float | None = None,
) -> Target:
    return Target(
        id=id_, text=text, value=value, bound=bound, at_least=False, unit=unit, stretch=stretch
    )


TARGETS: Final = (
    _least(
        "T1a",
        "W3, M = 1, large layers: share of measured read bandwidth",
        worst(W3, "percent_of_read", LARGE, one(1)),
        85.0,
        "%",
        90.0,
    ),
    _least(
        "T1b",
        "W3, M = 1, large layers: over cuBLAS fp16",
        worst(W3, "speedup", LARGE, one(1)),
        4.0,
        "x",
        4.3,
    ),
    _most(
        "T2a",
        "W3, M = 1, 3584x3584 and 4608x3584: time of a launch in a graph",
        slowest_us(W3, SMALL, 1),
        4.0,
        "us",
    ),
    _least(
        "T2b",
        "W3, M = 1, 3584x3584 and 4608x3584: over cuBLAS fp16",
        worst(W3, "speedup", SMALL, one(1)),
        2.3,
    ),
    _most("T3", "W3, M = 8: time over the time of M = 1", growth(W3, (*SMALL, *LARGE), 8), 1.10),
    _least(
        "T4a", "W3, M = 16: over cuBLAS fp16", worst(W3, "speedup", (*SMALL, *LARGE), one(16)), 2.0
    ),
    _least(
        "T4b", "W3, M = 64: over cuBLAS fp16", worst(W3, "speedup", (*SMALL, *LARGE), one(64)), 1.2
    ),
    _least(
        "T5a",
        "W3, M >= 512: over cuBLAS fp16",
        worst(W3, "speedup", (*SMALL, *LARGE), from_rows(PREFILL_ROWS)),
        0.55,
    ),
    _least(
        "T5b",
        "W3 dequantized before cuBLAS, M >= 2048: over cuBLAS fp16",
        worst(W3_DEQUANT, "speedup", (*SMALL, *LARGE), from_rows(DEQUANT_ROWS)),
        0.85,
    ),
    _least(
        "T6a",
        "W4A8, M = 1, large layers: share of measured read bandwidth",
        worst(W4A8, "percent_of_read", LARGE, one(1)),
        80.0,
        "%",
    ),
    _least(
        "T6b",
        "W4A8, M = 1, large layers: over cuBLAS fp16",
        worst(W4A8, "speedup", LARGE, one(1)),
        3.2,
    ),
    _least(
        "T6c",
        "W4A8, M >= 512: over cuBLAS fp16",
        worst(W4A8, "speedup", (*SMALL, *LARGE), from_rows(PREFILL_ROWS)),
        1.0,
        "x",
        1.3,
    ),
    _most("T7a", "W3 chain of one token, 112 launches in a graph", chain_ms(W3), 1.25, "ms", 1.10),
    _most(
        "T7b",
        "fp16 chain of one token, to know that the base is a good one",
        chain_ms(BASE),
        4.6,
        "ms",
    ),
    _least("T8a", "W3, M = 1: CUDA over our Triton kernel", against(W3, W3_TRITON, one(1)), 1.3),
    _least(
        "T8b",
        "W3, every problem: CUDA over our Triton kernel",
        against(W3, W3_TRITON, from_rows(1)),
        1.0,
    ),
    _least(
        "T10",
        "decode of a 7B-class decoder at 0, 2k and 8k context: W3 over fp16",
        decode_speedup,
        3.0,
    ),
)
