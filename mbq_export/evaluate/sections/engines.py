"""Compiled engines: what they hold, what was checked in their layer tables, and whether they ever ran."""

from collections import Counter
from typing import Any

from mbq_export.evaluate.document import BAD, GOOD, UNSURE, Block, Cell, Missing, Section, table
from mbq_export.evaluate.gathering import BuiltEngines, Found
from mbq_export.evaluate.lookup import dig, entries, items, words
from mbq_export.evaluate.wording import size

INT4 = "Int4"


def section(found: Found) -> Section:
    """Show the engines of every bundle."""
    rows, checks = [], []
    for subject in found.subjects:
        for built in subject.engines:
            rows += _rows(subject.name, built)
            checks += _checks(subject.name, built)
    blocks: list[Block] = []
    if rows:
        header = ("bundle", "engine", "built by", "devices", "size", "layers", "Int4 constants")
        blocks.append(table((*header, "verified"), rows, caption="Engines"))
    else:
        why = "no bundle holds one: mbq-export build --target rtx4090:rtx"
        blocks.append(Missing(what="Engines", why=why))
    if checks:
        header = ("bundle", "engine", "check", "value", "limit", "verdict", "why")
        blocks.append(table(header, checks, caption="Checks of the layer tables"))
    return Section(key="engines", title="Engines", blocks=tuple(blocks))


def _rows(name: str, built: BuiltEngines) -> list[tuple[str | Cell, ...]]:
    record = built.record
    verified = record.get("verified") is True
    reason = words(record.get("why")) or "no reason was recorded"
    return [
        (
            name,
            f"{built.folder}/{engine}",
            " ".join(words(record.get(key)) for key in ("flavour", "version")),
            words(record.get("sm")),
            size(dig(facts, "bytes")),
            words(dig(facts, "layers")),
            str(constants(built.layers, engine)[INT4]),
            Cell(text="yes", tone=GOOD) if verified else Cell(text=f"no: {reason}", tone=UNSURE),
        )
        for engine, facts in entries(record.get("engines")).items()
    ]


def constants(layers: Any, engine: str) -> Counter[str]:
    """Count the constants of an engine by type, each once though several layers read it."""
    found: dict[str, str] = {}
    for row in items(dig(layers, "engines", engine, "layers")):
        for constant in row.get("const") or []:
            if isinstance(constant, list) and len(constant) >= 2:
                found[words(constant[0])] = words(constant[1])
    return Counter(found.values())


def _checks(name: str, built: BuiltEngines) -> list[tuple[str | Cell, ...]]:
    rows: list[tuple[str | Cell, ...]] = []
    for engine, facts in entries(built.record.get("engines")).items():
        for check in items(dig(facts, "checks")):
            passed = check.get("pass") is True
            verdict = Cell(text="pass", tone=GOOD) if passed else Cell(text="FAIL", tone=BAD)
            if check.get("run") is False:
                verdict = Cell(text="not run", tone=UNSURE)
            values = (words(check.get(key)) for key in ("value", "threshold"))
            rows.append(
                (
                    name,
                    f"{built.folder}/{engine}",
                    words(check.get("name")),
                    *values,
                    verdict,
                    words(check.get("why")),
                )
            )
    return rows
