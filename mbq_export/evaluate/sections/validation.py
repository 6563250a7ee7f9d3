"""What validation found: gates, errors by layer and modality, and the first bad place."""

from collections.abc import Mapping, Sequence
from typing import Final

from mbq_export.evaluate.document import (
    BAD,
    GOOD,
    UNSURE,
    Block,
    Cell,
    Figure,
    Heading,
    Missing,
    Note,
    Section,
    Table,
    table,
)
from mbq_export.evaluate.gathering import VALIDATE, Found, Result
from mbq_export.evaluate.heat_map import Grid, heat_map
from mbq_export.evaluate.lookup import dig, entries, finding, items, words
from mbq_export.evaluate.sections.verdict import place
from mbq_export.evaluate.wording import figure, plain
from mbq_export.report import Check, Report

VERDICTS: Final = {
    None: Cell(text="not run", tone=UNSURE),
    True: Cell(text="pass", tone=GOOD),
    False: Cell(text="FAIL", tone=BAD),
}
STREAM_GATE: Final = "parity.relative_error"
LINEAR_GATE: Final = "parity.linear"
NAMES: Final = {"inputs_embeds": "in", "norm.out": "norm", "logits": "logits"}
MODALITIES: Final = ("", "vision", "prompt", "answer")
HINT: Final = "mbq-export validate BUNDLE -o DIR"


def section(found: Found) -> Section:
    """Show every validation."""
    results = found.of_kind(VALIDATE)
    blocks: list[Block] = []
    for result in results:
        if len(results) > 1:
            blocks.append(Heading(text=result.name))
        blocks += _result(result)
    if not results:
        blocks.append(Missing(what="Validation", why=f"no result was given: {HINT}"))
    return Section(key="validation", title="Validation", blocks=tuple(blocks))


def _result(result: Result) -> list[Block]:
    report = result.report
    return [
        _first_bad(report),
        _gates(report.checks),
        _stream(report),
        _linears(report),
        *_measurements(report),
    ]


def _first_bad(report: Report) -> Block:
    bad = entries(report.details.get("first_bad"))
    if not bad:
        if any(check.tier.startswith("numeric") for check in report.checks):
            return Note(text="No layer, linear or modality is beyond its limit.", tone=GOOD)
        return Missing(what="First bad layer", why="the numeric tier was not run")
    facts = {key: bad.get(key) for key in ("cos", "norm_ratio", "error")}
    numbers = ", ".join(f"{key} {shown(finding(value))}" for key, value in facts.items())
    return Note(
        text=f"First bad place: {place(bad)}. {numbers}. {words(bad.get('hint'))}", tone=BAD
    )


def _gates(checks: Sequence[Check]) -> Block:
    """One row per gate, its modalities side by side."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.tier, check.name), []).append(check)
    if not groups:
        return Missing(what="Gates", why="the result holds no checks")
    rows = [(name, *_gate(own), tier, _reasons(own)) for (tier, name), own in groups.items()]
    header = ("gate", "verdict", "limit", *(kind or "all" for kind in MODALITIES), "tier", "why")
    told = any(row[-1] for row in rows)
    return table(
        header if told else header[:-1],
        rows if told else [row[:-1] for row in rows],
        caption="Gates",
    )


def _gate(checks: Sequence[Check]) -> tuple[str | Cell, ...]:
    """Verdict, limit, and the value per modality."""
    answers = {check.ok for check in checks}
    verdict = VERDICTS[False if False in answers else None if None in answers else True]
    values = {check.modality: shown(check.value) for check in checks}
    return verdict, shown(checks[0].threshold), *(values.get(kind, "") for kind in MODALITIES)


def _reasons(checks: Sequence[Check]) -> str:
    """Where and why gates failed or were not run."""
    return "; ".join(
        " ".join(filter(None, [check.modality, check.place, check.why]))
        for check in checks
        if not check.ok
    )


def _limit(report: Report, name: str) -> float | None:
    limits = [check.threshold for check in report.checks if check.name == name]
    return next((limit for limit in limits if limit is not None), None)


def _stream(report: Report) -> Block:
    found = {
        (words(entry.get("modality")), words(entry.get("value"))): finding(entry.get("error"))
        for entry in items(dig(report.details, "layers", "stream"))
    }
    title = "Relative error by layer and modality"
    if not found:
        return Missing(what=title, why="the numeric tier was not run")
    rows = list(dict.fromkeys(row for row, _ in found))
    columns = list(dict.fromkeys(column for _, column in found))
    note = "Worst position of the hidden states, tested backend against the reference."
    return _map(title, (rows, columns), found, limit=_limit(report, STREAM_GATE), note=note)


def _linears(report: Report) -> Block:
    found = {
        (words(entry.get("linear")).rpartition(".")[2], words(entry.get("layer"))): finding(
            entry.get("error")
        )
        for entry in items(dig(report.details, "layers", "linears"))
    }
    title = "Error of every linear on its own input"
    if not found:
        return Missing(what=title, why="the numeric tier was not run")
    rows = list(dict.fromkeys(row for row, _ in found))
    columns = list(dict.fromkeys(column for _, column in found))
    note = (
        "Worst output column against the codes in float64: an error upstream does not spread here."
    )
    return _map(title, (rows, columns), found, limit=_limit(report, LINEAR_GATE), note=note)


def _map(
    title: str,
    axes: tuple[list[str], list[str]],
    found: Mapping[tuple[str, str], float | None],
    *,
    limit: float | None,
    note: str,
) -> Figure:
    rows, columns = axes
    names = [_short(column) for column in columns]
    values = [[found.get((row, column)) for column in columns] for row in rows]
    grid = Grid(rows=rows, columns=names, values=values, limit=limit)
    beyond = (
        f" Darkest at the limit, {figure(limit)}; framed beyond it." if limit is not None else ""
    )
    numbers: Table = table(
        ("", *names),
        [
            (row, *(shown(value, 3) for value in line))
            for row, line in zip(rows, values, strict=True)
        ],
    )
    return Figure(title=title, drawing=heat_map(title, grid), numbers=numbers, note=note + beyond)


def _short(value: str) -> str:
    return NAMES.get(value, value.removeprefix("layers.").removesuffix(".hidden"))


def _measurements(report: Report) -> list[Block]:
    rows = [
        (
            m.name,
            f"not measured: {m.why}" if m.value is None else f"{shown(m.value)} {m.unit}".rstrip(),
        )
        for m in report.measurements
    ]
    return [table(("measured", "value"), rows, caption="Other measurements")] if rows else []


def shown(value: float | None, digits: int = 4) -> str:
    """A finding, not finite ones included; nothing where nothing was found."""
    return "" if value is None else plain(value, digits)
