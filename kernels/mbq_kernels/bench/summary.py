"""A result in short lines: what was timed, or what would be, and how it stands against the targets."""

from collections.abc import Mapping
from typing import Any

from mbq_kernels.bench.limits import PREDICTED
from mbq_kernels.bench.page import remarks


def summary(result: Mapping[str, Any]) -> list[str]:
    """Rows, chain, decode, absentees, targets."""
    lines = planned(result) if result["dry_run"] else timed(result)
    lines += [f"not measured: {each['entrant']}: {each['why']}" for each in result["absent"]]
    for target in result["targets"]:
        found = "" if target["value"] is None else f" ({target['value']:.3g} {target['unit']})"
        lines.append(f"{target['id']:<4} {target['status']:<16} {target['text']}{found}")
    return lines


def planned(result: Mapping[str, Any]) -> list[str]:
    """What a run would time and what is predicted of it, then how the rehearsal went."""
    cards = "".join(f"{name:>10}" for name in PREDICTED)
    lines = [f"{'N x K':>13} {'M':>5}  {'kernel':<28} {'MB':>8}{cards}   predicted us"]
    for row in result["rows"]:
        if row["source"] not in {"base", "cuda"}:
            continue
        predicted = "".join(f"{row['predictions_us'][name]:>10.1f}" for name in PREDICTED)
        lines.append(f"{_problem(row)}  {row['weight_bytes'] / 1e6:>6.1f}{predicted}")
    estimated = ", ".join(
        f"{name} {spent} s" for name, spent in result["suite"]["estimated_seconds"].items()
    )
    rehearsal = result["rehearsal"]
    rows = (*rehearsal["rows"], *rehearsal["chain"], *rehearsal["decode"]["rows"])
    right, wrong, left = (
        sum(row["correct"] is value for row in rows) for value in (True, False, None)
    )
    lines.append(f"{len(result['rows'])} rows; the linears would take about: {estimated}")
    lines.append(
        f"rehearsal on the CPU (kernels: {rehearsal['kernels']}): {right} right, {wrong} wrong, "
        f"{left} not run; nothing was timed"
    )
    return lines


def timed(result: Mapping[str, Any]) -> list[str]:
    """Every time, linears first."""
    lines = [f"{'N x K':>13} {'M':>5}  {'kernel':<28} {'us':>9} {'% read':>7} {'x':>6}  remarks"]
    for row in result["rows"]:
        timing = row["timing"]
        lines.append(
            f"{_problem(row)} {_figure(None if timing is None else timing['median_us'], 9, 2)} "
            f"{_figure(row['percent_of_read'], 7, 1)} {_figure(row['speedup'], 6, 2)}  {remarks(row)}"
        )
    lines += [
        f"chain  {row['entrant']:<28} {_figure(row['token_ms'], 9, 3)} ms  {remarks(row)}"
        for row in result["chain"]
    ]
    return lines + [
        f"decode at {row['context']:>5}  {row['entrant']:<28} {_figure(row['token_ms'], 9, 3)} ms "
        f"{_figure(row['speedup'], 6, 2)}  {remarks(row)}"
        for row in (result["decode"] or {"rows": []})["rows"]
    ]


def _problem(row: Mapping[str, Any]) -> str:
    return f"{row['n']:>6}x{row['k']:<6} {row['m']:>5}  {row['entrant']:<28}"


def _figure(value: float | None, width: int, digits: int) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.{digits}f}"
