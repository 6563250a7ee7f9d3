"""How long requests took: phases, percentiles of single tokens, and time to the first token."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from mbq_export.evaluate.document import (
    GOOD,
    UNSURE,
    Block,
    Figure,
    Heading,
    Missing,
    Note,
    Section,
    Table,
    table,
)
from mbq_export.evaluate.gathering import BENCH, Found, Result
from mbq_export.evaluate.lookup import dig, items, number, words
from mbq_export.evaluate.plots import Bar, Line, lines, stacked_bars
from mbq_export.evaluate.wording import figure
from mbq_export.report import Measurement, Statistics

HINT: Final = "mbq-export bench BUNDLE -o DIR"
ONCE: Final = ("preprocess", "vit", "merge", "prefill")
PERCENTILES: Final = tuple(range(0, 101, 2))
MEANING: Final = (
    "vit: vision encoder and projector; tpot: a request's mean gap between tokens; itl: single gaps; "
    "ttft: time to the first token. p99 needs 100 samples."
)
SHOWN: Final = ("vit", "prefill", "decode", "tpot", "itl", "ttft", "e2e")


def section(found: Found) -> Section:
    """Show the times of every benchmark."""
    results = found.of_kind(BENCH)
    blocks: list[Block] = []
    for result in results:
        if len(results) > 1:
            blocks.append(Heading(text=result.name))
        blocks += _result(result)
    if not results:
        blocks.append(Missing(what="Latency", why=f"no benchmark was given: {HINT}"))
    return Section(key="latency", title="Latency", blocks=tuple(blocks))


def _result(result: Result) -> list[Block]:
    report = result.report
    runs = items(report.details.get("runs"))
    if not runs:
        return [Missing(what="Latency", why=f"{result.name} holds no runs")]
    turns = words(dig(report.details, "protocol", "repetitions"))
    warm = words(dig(report.details, "protocol", "warmup"))
    protocol = f"{turns} requests each after {warm} to warm up, bundles in turn, greedy, medians."
    noise = (
        Note(text=f"Valid. {protocol}", tone=GOOD)
        if report.valid
        else Note(text=f"Noisy, for the reasons below. {protocol}", tone=UNSURE)
    )
    samples = _samples(report.measurements)
    return [
        noise,
        _phases(runs),
        _percentiles(samples),
        *_first_token(runs),
        _table(samples, runs),
        Note(text=MEANING),
    ]


def name_of(run: Mapping[str, Any], *, behind: str = ", ") -> str:
    """Bundle and workload of a run."""
    return f"{words(run.get('name'))}{behind}{words(dig(run, 'workload', 'name'))}"


def _phases(runs: Sequence[Mapping[str, Any]]) -> Block:
    found = [(name_of(run), _parts(run)) for run in runs]
    names = [name for name in (*ONCE, "decode") if any(parts.get(name) for _, parts in found)]
    title = "Where the time of a request goes"
    if not names:
        return Missing(what=title, why="the runs hold no phases")
    bars = [
        Bar(label=run, parts={name: parts.get(name, 0.0) for name in names}) for run, parts in found
    ]
    rows = [
        (run, *(figure(parts.get(name)) for name in names), figure(sum(parts.values())))
        for run, parts in found
    ]
    return Figure(
        title=title,
        drawing=stacked_bars(title, bars, unit="ms"),
        numbers=table(("run", *(f"{name} ms" for name in names), "sum ms"), rows),
        note="Medians; decode is the median gap between tokens times the tokens after the first.",
    )


def _parts(run: Mapping[str, Any]) -> dict[str, float]:
    """Phases of a request that were measured, in ms."""
    once = {name: number(dig(run, "phases", name, "p50_ms")) for name in ONCE}
    gap = number(dig(run, "tpot_ms", "p50_ms"))
    tokens = number(dig(run, "workload", "output_tokens")) or 1.0
    decode = None if gap is None else gap * (tokens - 1)
    return {name: value for name, value in {**once, "decode": decode}.items() if value is not None}


Samples = Mapping[tuple[str, str, str], Measurement]
"""By bundle, workload and figure."""


def _samples(measurements: Sequence[Measurement]) -> Samples:
    return {split_name(m.name): m for m in measurements if m.samples}


def split_name(name: str) -> tuple[str, str, str]:
    """Split ``<bundle>/<workload>/<figure>``; a bundle's name may hold slashes."""
    rest, _, last = name.rpartition("/")
    bundle, _, workload = rest.rpartition("/")
    return bundle, workload, last


def _percentiles(samples: Samples) -> Block:
    title = "Gaps between tokens"
    curves = []
    for (bundle, workload, what), measurement in samples.items():
        if what == "itl":
            values = np.percentile(np.array(measurement.samples, np.float64), PERCENTILES)
            points = list(zip(map(float, PERCENTILES), map(float, values), strict=True))
            curves.append(Line(label=f"{bundle}, {workload}", points=points))
    if not curves:
        return Missing(what=title, why="no request generated more than one token")
    return Figure(
        title=title,
        drawing=lines(title, curves, x_title="percentile", y_title="ms"),
        note="How long the next token takes: half of them come within the value at 50.",
    )


def _first_token(runs: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Draw time to the first token over visual tokens, where workloads differ in them."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        visual = number(dig(run, "workload", "visual_tokens"))
        median = number(dig(run, "ttft_ms", "p50_ms"))
        if visual is not None and median is not None:
            found.setdefault(words(run.get("name")), {}).setdefault(visual, []).append(median)
    if max((len(places) for places in found.values()), default=0) < 2:
        return []
    title = "Time to the first token"
    curves = [
        Line(label=name, points=[(x, float(np.median(ys))) for x, ys in sorted(places.items())])
        for name, places in found.items()
    ]
    return [
        Figure(
            title=title,
            drawing=lines(title, curves, x_title="visual tokens", y_title="ms"),
        )
    ]


def _table(samples: Samples, runs: Sequence[Mapping[str, Any]]) -> Table:
    rates = {
        (words(run.get("name")), words(dig(run, "workload", "name"))): run.get("tokens_per_second")
        for run in runs
    }
    rate_of = {"prefill": "prefill", "tpot": "decode", "e2e": "e2e"}
    rows = []
    for (bundle, workload, what), measurement in samples.items():
        if what in SHOWN:
            spread = Statistics.of(measurement.samples)
            rate = dig(rates.get((bundle, workload)), rate_of.get(what, ""))
            rows.append(
                (
                    bundle,
                    workload,
                    what,
                    *(figure(spread.percentiles[p]) for p in (10, 50, 90, 95, 99)),
                    figure(spread.cov_percent, 2),
                    str(spread.count),
                    figure(rate),
                )
            )
    header = ("bundle", "workload", "figure", "p10 ms", "p50", "p90", "p95", "p99", "CoV %", "n")
    return table((*header, "tokens/s"), rows, caption="Times")
