"""What it costs: bytes per token against the memory's bandwidth, memory, disk, energy."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mbq_export.evaluate.document import Block, Figure, Missing, Section, table
from mbq_export.evaluate.gathering import BENCH, Found
from mbq_export.evaluate.lookup import dig, entries, items, number, words
from mbq_export.evaluate.plots import Bar, stacked_bars
from mbq_export.evaluate.sections.latency import HINT, name_of
from mbq_export.evaluate.wording import figure, size

COUNTINGS: Final = {"graph": "the graph's own constants", "packed": "packed bits"}
MEMORY: Final = {
    "kept_bytes": "kept after loading",
    "peak_growth_bytes": "peak while loading",
    "peak_rss_bytes": "peak of the process",
}
MEGA: Final = 1e6


def roofline(found: Found) -> Section:
    """Compare speeds with what reading the weights alone would allow."""
    shares, amounts, rows, missing = [], [], [], []
    for run in _runs(found):
        for counting, meaning in COUNTINGS.items():
            roof = dig(run, "roofline", counting)
            share, step = (number(dig(roof, key)) for key in ("percent", "bytes_per_token"))
            name = f"{name_of(run)}, {meaning}"
            if share is None or step is None:
                why = dig(roof, "percent_why") or dig(run, "roofline", f"{counting}_why")
                missing.append(Missing(what=name, why=words(why) or "not recorded"))
                continue
            shares.append(Bar(label=name, parts={"share": share}, note=f"{share:.3g} %"))
            amounts.append(Bar(label=name, parts={"bytes": step / MEGA}, note=size(step)))
            rows.append(_roof_row(run, counting, roof))
    blocks = _roof_figures(shares, amounts, rows)
    if not blocks and not missing:
        missing.append(Missing(what="Roofline", why=f"no benchmark was given: {HINT}"))
    return Section(key="roofline", title="Roofline", blocks=(*blocks, *missing))


def _roof_figures(
    shares: Sequence[Bar], amounts: Sequence[Bar], rows: Sequence[tuple[str, ...]]
) -> list[Block]:
    if not rows:
        return []
    title, read = "Share of the roofline", "Bytes read per token"
    header = ("run", "counting", "bytes per token", "memory GB/s", "from cache GB/s")
    return [
        Figure(
            title=title,
            drawing=stacked_bars(title, shares, unit="%"),
            numbers=table((*header, "ideal tokens/s", "measured tokens/s", "share %"), rows),
            note="100 % is a decode step that only reads; above it the weights came from a cache.",
        ),
        Figure(
            title=read,
            drawing=stacked_bars(read, amounts, unit="MB"),
            note="Weights, one row of the embedding, and keys and values at the mean context.",
        ),
    ]


def _roof_row(run: Mapping[str, Any], counting: str, roof: Any) -> tuple[str, ...]:
    return (
        name_of(run),
        counting,
        size(dig(roof, "bytes_per_token")),
        figure(dig(roof, "bandwidth_gb_s")),
        figure(dig(roof, "bandwidth_at_step_size_gb_s")),
        figure(dig(roof, "ideal_tokens_per_second")),
        figure(dig(run, "tokens_per_second", "decode")),
        figure(dig(roof, "percent")),
    )


def memory(found: Found) -> Section:
    """Show memory of processes, and sizes on disk."""
    return Section(key="memory", title="Memory", blocks=(*_process(found), *_disk(found)))


def _process(found: Found) -> list[Block]:
    # A bundle is loaded once for all its workloads.
    loads = {
        (words(run.get("name")), words(run.get("memory"))): run.get("memory")
        for run in _runs(found)
    }
    if not loads:
        return [Missing(what="Memory", why=f"no benchmark was given: {HINT}")]
    rows = [
        (name, *(_amount(memory, key) for key in MEMORY)) for (name, _), memory in loads.items()
    ]
    numbers = table(("bundle", *MEMORY.values()), rows, caption="Resident memory")
    bars = [bar for (name, _), memory in loads.items() if (bar := _memory_bar(name, memory))]
    if not bars:
        return [numbers]
    title = "Memory that loading adds"
    note = "Resident memory added by opening the session and the first request."
    drawn = stacked_bars(title, bars, unit="MB")
    return [Figure(title=title, drawing=drawn, numbers=numbers, note=note)]


def _amount(memory: Any, key: str) -> str:
    """Bytes, or why nobody knows them."""
    reason = words(dig(memory, f"{key}_why")) or "not recorded"
    return size(dig(memory, key)) or reason


def _memory_bar(name: str, memory: Any) -> Bar | None:
    kept, peak = (number(dig(memory, key)) for key in ("kept_bytes", "peak_growth_bytes"))
    if kept is None:
        return None
    stays, most = max(kept, 0.0), max(kept, peak or 0.0, 0.0)
    parts = {"kept": stays / MEGA, "more at the peak": (most - stays) / MEGA}
    return Bar(label=name, parts=parts, note=size(most))


def _disk(found: Found) -> list[Block]:
    """Sum up a bundle's files by their top folder."""
    bars, rows = [], []
    for subject in found.subjects:
        parts: dict[str, float] = {}
        for record in items(subject.manifest.get("files")):
            folder, slash, _ = words(record.get("path")).partition("/")
            place = folder if slash else "other"
            parts[place] = parts.get(place, 0.0) + (number(record.get("bytes")) or 0.0)
        named = {name: value / MEGA for name, value in sorted(parts.items())}
        bars.append(Bar(label=subject.name, parts=named, note=size(sum(parts.values()))))
        rows += [(subject.name, name, size(value)) for name, value in sorted(parts.items())]
    if not bars:
        return [Missing(what="Sizes on disk", why="no bundle was given")]
    title = "Size on disk"
    drawn = stacked_bars(title, bars, unit="MB")
    return [Figure(title=title, drawing=drawn, numbers=table(("bundle", "part", "size"), rows))]


def energy(found: Found) -> Section:
    """Show joules per token, or why nobody knows."""
    rows = []
    why = f"no benchmark was given: {HINT}"
    for run in _runs(found):
        joules = number(dig(run, "energy", "joules_per_token"))
        if joules is None:
            why = words(dig(run, "energy", "joules_per_token_why")) or "not recorded"
        else:
            rows.append((name_of(run), figure(joules)))
    block: Block = (
        table(("run", "joules per token"), rows) if rows else Missing(what="Energy", why=why)
    )
    return Section(key="energy", title="Energy", blocks=(block,))


def _runs(found: Found) -> list[Mapping[str, Any]]:
    return [
        run for r in found.of_kind(BENCH) for run in items(entries(r.report.details).get("runs"))
    ]
