"""Bundles against each other: ratios of times that were taken in turn, and nothing else.

Times of different runs, machines or models are shown side by side and never divided: what looks like a
difference between bundles would be one between days.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mbq_export.evaluate.document import (
    BAD,
    GOOD,
    UNSURE,
    Block,
    Cell,
    Figure,
    Missing,
    Note,
    Section,
    table,
)
from mbq_export.evaluate.gathering import BENCH, Found, Result
from mbq_export.evaluate.lookup import dig, items, number, words
from mbq_export.evaluate.plots import Range, intervals
from mbq_export.evaluate.wording import figure

OTHER_MODEL: Final = "other model"
ENDS: Final = ("ratio", "ratio_p10", "ratio_p90")
HEADER: Final = (
    "bundle",
    "figure",
    "speedup",
    "beyond noise",
    "p10",
    "p90",
    "p50 ms",
    "baseline",
    "its p50 ms",
    "workload",
)


def section(found: Found) -> Section:
    """Show ratios within every benchmark."""
    results = found.of_kind(BENCH)
    blocks: list[Block] = []
    for result in results:
        blocks += _result(result, found)
    if len(results) > 1:
        text = (
            "Results of different runs are not divided: only bundles timed in turn in one run are."
        )
        blocks.append(Note(text=text))
    if not blocks:
        why = (
            "bundles are compared by one benchmark of both: mbq-export bench BASELINE BUNDLE -o DIR"
        )
        blocks.append(Missing(what="Comparison", why=why))
    return Section(key="comparison", title="Comparison", blocks=tuple(blocks))


def _result(result: Result, found: Found) -> list[Block]:
    details = result.report.details
    hashes = {
        words(run.get("name")): dig(run, "bundle", "sha256") for run in items(details.get("runs"))
    }
    rows: list[tuple[str | Cell, ...]] = []
    ranges: dict[str, list[Range]] = {}
    for row in items(details.get("comparison")):
        comparable = same_model(row, hashes, found)
        ends = tuple(number(row.get(key)) if comparable else None for key in ENDS)
        rows.append(_row(row, ends, comparable=comparable))
        value, low, high = ends
        if value is not None and low is not None and high is not None and low > 0:
            name = f"{words(row.get('bundle'))} {words(row.get('figure'))}"
            shown = Range(label=name, value=value, low=low, high=high)
            ranges.setdefault(words(row.get("workload")), []).append(shown)
    if not rows:
        return []
    baseline = words(dig(items(details.get("comparison")), 0, "baseline"))
    caption = f"Times and ratios in {result.name}"
    noisy = Note(text=f"The timings of {result.name} are noisy.", tone=UNSURE)
    return [
        *(() if result.report.valid else (noisy,)),
        *(_figure(f"Speedup over {baseline}, {name}", own) for name, own in ranges.items()),
        table(HEADER, rows, caption=caption),
    ]


def _figure(title: str, ranges: Sequence[Range]) -> Figure:
    drawn = intervals(title, ranges, unit="times as fast", reference=1.0, log=True)
    note = (
        "Median over turns of the baseline's time through the bundle's; lines hold 80 % of turns."
    )
    return Figure(title=title, drawing=drawn, note=note)


def same_model(row: Mapping[str, Any], hashes: Mapping[str, Any], found: Found) -> bool:
    """Whether a ratio compares two forms of one model, as far as the given bundles tell."""
    pair = [found.subject_of(hashes.get(words(row.get(side)))) for side in ("baseline", "bundle")]
    return any(subject is None for subject in pair) or len({str(s.model) for s in pair if s}) == 1


def _row(
    row: Mapping[str, Any],
    ends: tuple[float | None, ...],
    *,
    comparable: bool,
) -> tuple[str | Cell, ...]:
    ratio, low, high = ends
    verdict: str | Cell = ""
    if not comparable:
        verdict = Cell(text=OTHER_MODEL, tone=UNSURE)
    elif low is not None and high is not None:
        faster, slower = low > 1, high < 1
        verdict = (
            Cell(text="faster", tone=GOOD)
            if faster
            else Cell(text="slower", tone=BAD)
            if slower
            else Cell(text="no", tone=UNSURE)
        )
    return (
        words(row.get("bundle")),
        words(row.get("figure")),
        "" if ratio is None else f"{ratio:.2f}x",
        verdict,
        figure(low, 3),
        figure(high, 3),
        figure(row.get("bundle_p50_ms")),
        words(row.get("baseline")),
        figure(row.get("baseline_p50_ms")),
        words(row.get("workload")),
    )
